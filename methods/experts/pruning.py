"""Tokens that do without their second expert, but for those that others look at: ODP at work (arXiv 2410.06270, section 3.3).

Shape suffixes: B batch, T tokens of a row, S tokens of a batch (B·T), k experts per token, d width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.models.decoder_model import DecoderModel
from isoflop.models.hooks.experts import ExpertPolicy, Routing, experts_of, routers_of
from isoflop.models.hooks.matrices import held_matrices
from isoflop.models.taps import Tap, attention_in

RECEIVED, RELEASED = "received", "released"
IMPORTANCES = (RECEIVED, RELEASED)
PER_TOKEN = 2
"""Experts of a token, a first and a second, that the rule knows."""


def pair_routers(model: DecoderModel, method: str) -> dict[int, nn.Module]:
    """Routers by layer, each of which sends a token to two experts.

    Raises:
        Infeasible: there are none, or some send a token elsewhere.
    """
    routers = routers_of(model.decoder)
    others = {int(router.top_k) for router in routers.values()} - {PER_TOKEN}  # type: ignore[arg-type]
    if not routers or others or experts_of(model.decoder).keys() != routers.keys():
        found = (
            f"sends a token to {max(others)} experts" if others else "keeps its experts where they cannot be reached"
        )
        raise Infeasible(f"method {method}: model {model.info.ref} {found}; allowed: {PER_TOKEN} experts per token")
    return routers


def weights_sum(router: nn.Module) -> float | None:
    """What a router makes the weights of a token sum to; None where it leaves probabilities as they are."""
    scaled = float(getattr(router, "routed_scaling_factor", 1.0))
    return scaled if getattr(router, "norm_topk_prob", True) else None


def ratios_of(weights_Sk: Tensor) -> Tensor:
    """w₁/w₀ of each token, (S,) in float32."""
    weights_Sk = weights_Sk.float()
    return weights_Sk.amin(-1) / weights_Sk.amax(-1)


class Pruning(ExpertPolicy):
    """Thresholds at work in a decoder; the passes through it are counted.

    Args:
        model: whose passes are followed.
        thresholds: μ of the layers that prune; a token loses its second expert where w₁/w₀ is less.
        protect: share of a row's real tokens, the most important ones, that lose none.
        importance: of ``IMPORTANCES``; see ``Odp``.

    Attributes:
        tokens, pairs: real tokens that the layers have seen, and the experts that ran for them, by layer.
    """

    def __init__(
        self, model: DecoderModel, thresholds: Mapping[int, float], protect: float, importance: str, method: str
    ) -> None:
        routers = pair_routers(model, method)
        self.thresholds, self.protect = dict(thresholds), protect
        self.tokens: Counter[int] = Counter()
        self.pairs: Counter[int] = Counter()
        self._model, self._method = model, method
        self._sums = {layer: weights_sum(router) for layer, router in routers.items()}
        tapped = self.thresholds if protect and importance == RECEIVED else ()
        self._taps = {layer: Tap(attention_in(model.decoder_layers[layer])) for layer in tapped}
        self._rope: dict[int, Any] = {}
        self._rows = 1
        self._valid_BT: Tensor | None = None

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """What tells of padding, and taps on the attention of layers that prune."""
        with ExitStack() as stack:
            begin: Callable[..., None] = self._begin
            stack.callback(self._model.decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for layer, tap in self._taps.items():
                stack.enter_context(tap.listening())
                note = partial(self._note_rope, layer)
                block = self._model.decoder_layers[layer]
                stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            yield

    def route(self, layer: int, hidden_Sd: Tensor, routing: Routing) -> Routing:
        """The first expert alone, at the weight that both had where the router makes weights sum to 1, where the second may go."""
        weights_Sk = routing.weights_Sk
        drops_S = ratios_of(weights_Sk) < self.thresholds.get(layer, 0.0)
        valid_BT = self._valid(drops_S)
        if self.protect and layer in self.thresholds and valid_BT.shape[1] > 1:
            drops_S = drops_S & ~self._protected(layer, hidden_Sd, valid_BT).flatten()
        self._count(layer, drops_S, valid_BT)
        second_S1 = weights_Sk.argmin(-1, keepdim=True)
        gone_Sk = torch.zeros_like(weights_Sk, dtype=torch.bool).scatter(1, second_S1, drops_S[:, None])
        left_Sk = weights_Sk.masked_fill(gone_Sk, 0.0)
        whole = self._sums[layer]
        if whole is not None:
            left_Sk = torch.where(drops_S[:, None], whole * (left_Sk / left_Sk.sum(-1, keepdim=True)), left_Sk)
        return replace(routing, weights_Sk=left_Sk)

    def active_experts(self) -> float:
        """Experts that ran per token and layer.

        Raises:
            ValueError: nothing has run yet.
        """
        if not self.tokens:
            raise ValueError(f"method {self._method}: no pass has been run yet")
        return self.pairs.total() / self.tokens.total()

    def active_params(self) -> float:
        """Parameters of the decoder's layers less those of the experts that a token does not meet, mean over tokens."""
        unused = 0.0
        for layer, experts in experts_of(self._model.decoder).items():
            for held, _, _ in held_matrices(experts):
                count = held.shape[0]
                unused += (count - self.pairs[layer] / self.tokens[layer]) * held.numel() / count
        return self._model.info.n_params - unused

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        self._rows = len(next(tensor for tensor in given if tensor is not None))
        mask = kwargs.get("attention_mask")
        self._valid_BT = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _note_rope(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rope[layer] = kwargs.get("position_embeddings")

    def _valid(self, like_S: Tensor) -> Tensor:
        """Which of the layer's tokens are real, (B, T)."""
        length = len(like_S) // self._rows
        if self._valid_BT is None:
            return torch.ones(self._rows, length, dtype=torch.bool, device=like_S.device)
        return self._valid_BT[:, -length:].to(like_S.device)

    def _protected(self, layer: int, hidden_Sd: Tensor, valid_BT: Tensor) -> Tensor:
        """The most important tokens of each row, (B, T); the earlier of two that are equally so."""
        if layer in self._taps:
            share_BT = self._taps[layer].received(self._rope.pop(layer, None), valid_BT).to(hidden_Sd.device)
        else:
            share_BT = 1 / valid_BT.flip(-1).cumsum(-1).flip(-1).clamp(min=1)
        score_BT = share_BT * hidden_Sd.float().abs().sum(-1).view_as(valid_BT)
        order_BT = score_BT.masked_fill(~valid_BT, -1.0).argsort(dim=-1, descending=True, stable=True)
        most_B1 = (self.protect * valid_BT.sum(-1, keepdim=True).double() + 1e-9).floor()
        first_BT = torch.arange(valid_BT.shape[1], device=valid_BT.device)[None] < most_B1
        return torch.zeros_like(valid_BT).scatter(1, order_BT, first_BT)

    def _count(self, layer: int, drops_S: Tensor, valid_BT: Tensor) -> None:
        tokens = int(valid_BT.sum())
        self.tokens[layer] += tokens
        self.pairs[layer] += PER_TOKEN * tokens - int((drops_S & valid_BT.flatten()).sum())


class RatioNotes(ExpertPolicy):
    """Changes nothing; ``ratios`` are those of all tokens, by layer."""

    def __init__(self) -> None:
        self.ratios: dict[int, list[Tensor]] = {}

    def route(self, layer: int, hidden_Sd: Tensor, routing: Routing) -> Routing:
        """As it is."""
        self.ratios.setdefault(layer, []).append(ratios_of(routing.weights_Sk).cpu())
        return routing
