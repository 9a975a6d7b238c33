"""Rotary embeddings: what turned a layer's queries and keys in a pass, taken back, and what would turn later ones.

Which channels turn in pairs differs between architectures, and some layers turn none. It is found by trying each attention
module on angles at random; modules that turn in another way are refused.

Shape suffixes: B batch, H heads, T tokens, D head width, r channels that turn.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.models.hooks.one_attention import called_with

HALVES, HALVES_ONCE, NEIGHBOURS, NEIGHBOURS_ONCE = "halves", "halves once", "neighbours", "neighbours once"
LAYOUTS = HALVES, HALVES_ONCE, NEIGHBOURS, NEIGHBOURS_ONCE
"""A channel turns with the one half the turned width on (Llama; GPT-OSS, which gives an angle per pair) or with its neighbour (Cohere;
GLM, which takes the first half of the angles, one per pair)."""
NONE, OTHER = "none", "other"
_CLOSE = 0.02
"""Of the largest entry: far more than rounding in bfloat16, far less than what a wrong pair does."""
Embed = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a layer turned the tokens of a call.

    Attributes:
        cos_BTr, sin_BTr: of each token, batch dimension 1 where all rows agree.
        positions_BT: the positions, the last one that of the call's last token; tokens dropped before the layer still have theirs.
        embed: cosines and sines of other positions.
        layout: which channels turn together.
    """

    cos_BTr: Tensor
    sin_BTr: Tensor
    positions_BT: Tensor
    embed: Embed
    layout: str = HALVES

    def sliced(self, start: int, stop: int | None) -> Rotation:
        """Of tokens ``start`` to ``stop``."""
        length = self.cos_BTr.shape[1]
        behind = length - len(range(length)[:stop])
        positions_BT = self.positions_BT[:, : self.positions_BT.shape[1] - behind]
        return replace(
            self, cos_BTr=self.cos_BTr[:, start:stop], sin_BTr=self.sin_BTr[:, start:stop], positions_BT=positions_BT
        )

    def undone(self, x_BHTD: Tensor) -> Tensor:
        """Queries or keys as they were before, in float32."""
        cos_BTr, sin_BTr = self.cos_BTr.float(), self.sin_BTr.float()
        size_BTr = cos_BTr.square() + sin_BTr.square()
        return turned(x_BHTD.float(), cos_BTr / size_BTr, -sin_BTr / size_BTr, self.layout)

    def ahead(self, count: int) -> Callable[[Tensor], Tensor]:
        """The mean rotation of the ``count`` positions behind the last, for vectors (B, H, N, D) in float32."""
        steps_T = torch.arange(1, count + 1, device=self.positions_BT.device)
        cos_BTr, sin_BTr = self.embed(self.positions_BT[:, -1:] + steps_T)
        cos_B1r, sin_B1r = (x.float().mean(1, keepdim=True).to(self.cos_BTr.device) for x in (cos_BTr, sin_BTr))
        return lambda x_BHND: turned(x_BHND, cos_B1r, sin_B1r, self.layout)


def turned(x_BHTD: Tensor, cos_BTr: Tensor, sin_BTr: Tensor, layout: str) -> Tensor:
    """``x`` with its first r channels turned."""
    cos_B1Tr, sin_B1Tr = (_per_channel(x, layout)[:, None] for x in (cos_BTr, sin_BTr))
    width = cos_B1Tr.shape[-1]
    half = width // 2
    pair = (
        (slice(0, half), slice(half, width))
        if layout in (HALVES, HALVES_ONCE)
        else (slice(0, width, 2), slice(1, width, 2))
    )
    out_BHTD = x_BHTD.clone()
    out_BHTD[..., :width] *= cos_B1Tr
    for one, other, sign in ((*pair, -1), (*reversed(pair), 1)):
        out_BHTD[..., one].addcmul_(x_BHTD[..., other], sin_B1Tr[..., one], value=sign)
    return out_BHTD


def _per_channel(angle_BTr: Tensor, layout: str) -> Tensor:
    if layout == HALVES_ONCE:
        return torch.cat((angle_BTr, angle_BTr), dim=-1)
    if layout == NEIGHBOURS_ONCE:
        return angle_BTr[..., : angle_BTr.shape[-1] // 2].repeat_interleave(2, dim=-1)
    return angle_BTr


def layout_of(attention: Any, arguments: dict[str, Any]) -> str:
    """How an attention module pairs the channels that it turns.

    Args:
        arguments: what its layer calls it with, by name; ``position_embeddings`` among them.
    """
    rng = torch.Generator().manual_seed(0)
    like, width = arguments["hidden_states"], arguments["position_embeddings"][0].shape[-1]
    hidden, cos_BTr, sin_BTr = (torch.randn(1, 2, n, generator=rng).to(like) for n in (like.shape[-1], width, width))

    def queries(cos: Tensor, sin: Tensor) -> Tensor:
        given = {**arguments, "hidden_states": hidden, "position_embeddings": (cos, sin)}
        return called_with(attention, (), given).q_BHTD.float()

    try:
        still, found = queries(torch.ones_like(cos_BTr), torch.zeros_like(sin_BTr)), queries(cos_BTr, sin_BTr)
    except Exception:  # a module that needs to know more of the tokens than how they turn
        return OTHER
    if torch.equal(still, found):
        return NONE
    for layout in LAYOUTS:
        if width * (1 + (layout == HALVES_ONCE)) <= still.shape[-1] and width % 2 == 0:
            expected = turned(still, cos_BTr.float(), sin_BTr.float(), layout)
            if float((expected - found).abs().max()) <= _CLOSE * float(found.abs().max()):
                return layout
    return OTHER


@contextmanager
def followed_rotations(decoder: Any) -> Iterator[Callable[[int], Rotation | None]]:
    """Inside the block: a function from the number of a layer to how it turns the tokens of the pass that runs."""
    layouts: dict[int, str] = {}
    embeds: list[tuple[Tensor, Tensor, Embed]] = []
    given: dict[int, tuple[Tensor, Tensor]] = {}

    def noted(module: Any, args: Any, kwargs: Any) -> None:
        arguments = _named(module, args, kwargs)
        if isinstance(arguments.get("position_embeddings"), tuple):
            given[module.layer_idx] = arguments["position_embeddings"]
            if module.layer_idx not in layouts:
                layouts[module.layer_idx] = layout_of(module, arguments)

    def embedded(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        arguments = _named(module, args, kwargs)
        x, positions_BT = arguments.pop("x"), arguments.pop("position_ids")
        like = x.new_empty(1, dtype=torch.float32)
        then = _twin(module)
        embeds.append((output[0], positions_BT, lambda p: _twin(then).forward(x=like, position_ids=p, **arguments)))

    def started(module: Any, args: Any) -> None:
        embeds.clear()
        given.clear()

    def rotation_of(layer: int) -> Rotation | None:
        if layer not in given or layouts[layer] == NONE:
            return None
        cos_BTr, sin_BTr = given[layer]
        known = [embed for embed in embeds if embed[0] is cos_BTr] or (embeds if len(embeds) == 1 else [])
        if layouts[layer] == OTHER or not known:
            raise Infeasible(unknown_rotation(f"layer {layer} of {type(decoder).__name__}"))
        return Rotation(cos_BTr, sin_BTr, known[0][1], known[0][2], layouts[layer])

    handles = [decoder.register_forward_pre_hook(started)]
    handles += [m.register_forward_pre_hook(noted, with_kwargs=True) for m in attentions(decoder)]
    handles += [m.register_forward_hook(embedded, with_kwargs=True) for m in _embeddings(decoder)]
    try:
        yield rotation_of
    finally:
        for handle in handles:
            handle.remove()


def unknown_rotation(where: str) -> str:
    """What to say of a model or a layer whose rotation is not known."""
    return (
        f"{where} turns queries by their positions in a way that cannot be taken back here; allowed: rotary embeddings of halves or "
        "of neighbouring channels, of all channels or the first ones, or none"
    )


def attentions(decoder: Any) -> list[Any]:
    """Modules of a decoder that are told how to turn their queries: innermost, with the number of their layer."""
    told = [
        module
        for module in decoder.modules()
        if hasattr(module, "layer_idx") and "position_embeddings" in inspect.signature(module.forward).parameters
    ]
    return [m for m in told if not any(other is not m and other in set(m.modules()) for other in told)]


def _embeddings(decoder: Any) -> list[Any]:
    return [module for module in decoder.modules() if "Rotary" in type(module).__name__]


def _twin(module: Any) -> Any:
    """A module with buffers of its own: frequencies that follow the positions asked for stay those of the pass in the other."""
    twin = copy.copy(module)
    twin._buffers = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
    return twin


def _named(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of a call by name, further ones among them."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}


def rotation_known(decoder: Any, head_width: int) -> bool:
    """Whether the first layer of a decoder without weights turns queries in a way that can be taken back."""
    if not _embeddings(decoder):
        return True
    told = attentions(decoder)
    if not told:
        return False
    try:
        attention = copy.deepcopy(told[0])
        for linear in [m for m in attention.modules() if isinstance(m, nn.Linear)]:
            linear.forward = _projecting(linear.out_features)  # type: ignore[method-assign,assignment]
        for module in attention.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.ones(1).expand(parameter.shape), requires_grad=False)
        hidden = torch.ones(1, 2, decoder.config.hidden_size)
        turned_width = _turned_width(decoder, head_width)
        return any(
            layout_of(attention, {"hidden_states": hidden, "position_embeddings": (torch.ones(1, 2, width),) * 2})
            != OTHER
            for width in (turned_width, turned_width // 2)  # an angle per channel, or per pair
        )
    except Exception:  # code from elsewhere may refuse to be copied
        return False


def _projecting(width: int) -> Callable[[Tensor], Tensor]:
    """Stands for a matrix of unknown weights: the same numbers at random for the same shape."""

    def forward(x: Tensor) -> Tensor:
        return torch.randn(*x.shape[:-1], width, generator=torch.Generator().manual_seed(width))

    return forward


def _turned_width(decoder: Any, head_width: int) -> int:
    """Channels that turn, as the decoder's embedding says."""
    frequencies = [b for m in _embeddings(decoder) for name, b in m.named_buffers() if name.endswith("inv_freq")]
    return 2 * frequencies[0].shape[-1] if frequencies else head_width
