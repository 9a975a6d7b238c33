"""Methods that leave neurons of the feed-forward blocks out, token by token, where they hardly matter.

The base class owns what sits in the hook ``feed_forward``: taps on the input of every down projection, which a mask multiplies, and on the output
of the activation function, which some rules look at. A masked neuron is one whose column of W_out, and whose rows of the
matrices before it, need not be read for this token. Nothing is skipped here: the pass stays dense and the mask is counted.

Shape suffixes: B batch, T tokens, F neurons of a block, L layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model
from isoflop.models.decoder_model import DecoderModel, decoder_model
from isoflop.models.hooks.feed_forward import FEED_FORWARD, Mlp, MlpPolicy, mlps_of, rows_mean
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.taps import ActivationTap

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

Rule = Callable[[Tensor, Tensor], Tensor]
"""(values of the neurons, output of the activation function), both (B, T, F) -> the neurons that stay, boolean."""


@dataclass(frozen=True)
class ActivationSparsityMethod(Method):
    """Base class of methods that choose, per token, which neurons of the feed-forward blocks are active."""

    family: ClassVar[str] = "activation-sparsity"
    ratio_of: ClassVar[str] = "neurons"
    version: ClassVar[str] = "2"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (FEED_FORWARD,)

    @abstractmethod
    def rules(self, mlps: Sequence[Mlp], prepared: Any) -> list[Rule]:
        """One rule per block, for the weights as they are now."""

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The masks."""
        decoder = decoder_model(model, self.name)
        mlps = blocks_of(decoder, self.name)
        return {FEED_FORWARD: Sparsity(decoder, mlps, self.rules(mlps, prepared), getattr(prepared, "figures", {}))}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Over the tokens of all passes that were observed: those of the examples that the task scored.

        ``activation_ratio``: active neurons over all, mean over tokens and layers; ``ratio``: its inverse, which is that of
        the FLOPs, and of the bytes read, of the blocks' matrices; ``mlp_flops`` and ``mlp_flops_dense``: of these per token.
        Figures of the calibration follow (``cett``, ``calibration_ppl_ratio`` …).
        What it costs to know which neurons are active (a predictor, or the gate in full) is not in them.

        Raises:
            ValueError: the method is not applied, or nobody observed a pass.
        """
        sparsity = model.occupant(FEED_FORWARD)
        if not isinstance(sparsity, Sparsity):
            raise ValueError(f"method {self.name} is not applied")
        if not sparsity.tokens:
            raise ValueError(
                f"method {self.name}: no pass was observed; a task calls observed() after each pass that it scores"
            )
        active = sparsity.active_share()
        dense = 2 * sum(
            mlp.weights_per_neuron * width for mlp, width in zip(sparsity.mlps, sparsity.widths, strict=True)
        )
        return {
            "ratio": 1 / active,
            "activation_ratio": active,
            "mlp_flops": active * dense,
            "mlp_flops_dense": dense,
            **sparsity.figures,
        }

    @classmethod
    def probe(cls) -> Probe:
        """An untrained decoder."""
        from isoflop.methods.activation_sparsity.probe import ActivationProbe

        return ActivationProbe()


class Sparsity(MlpPolicy):
    """Rules at work in a decoder.

    Args:
        model: whose passes are followed.
        mlps, rules: its blocks, and which neurons stay in each.
        figures: of the calibration, for the footprint.

    Attributes:
        widths: neurons of each block.
        tokens: real tokens of the passes that were observed.
    """

    def __init__(
        self,
        model: DecoderModel,
        mlps: Sequence[Mlp],
        rules: Sequence[Rule],
        figures: Mapping[str, float] | None = None,
    ) -> None:
        self.mlps = mlps
        self.figures = dict(figures or {})
        self.widths = [len(mlp.norms_F()) for mlp in mlps]
        self._model = model
        self._rules = rules
        self._gates: dict[int, Tensor] = {}
        self._valid_BT: Tensor | None = None
        self._rows, self._device = 1, torch.device("cpu")
        self._last: dict[int, Tensor] = {}
        self._unobserved = False
        self.tokens, self._total = 0.0, 0.0

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """Masks in place inside the block."""
        with ExitStack() as stack:
            entering = self._model.decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(entering.remove)
            for place, mlp in enumerate(self.mlps):
                if mlp.act is not None:
                    stack.enter_context(ActivationTap(mlp.act, "output").through(partial(self._note_gate, place)))
                stack.enter_context(ActivationTap(mlp.down).through(partial(self._mask, place)))
            yield

    def observed(self) -> dict[str, Tensor]:
        """``activation_ratio`` of each row of the last pass; its tokens enter the totals.

        Raises:
            ValueError: there was no pass since the last one that was observed, which would count twice.
        """
        if not self._unobserved:
            raise ValueError("no pass has been run since the last one that was observed")
        self._unobserved = False
        shares_BL = [rows_mean(self._last[place], self._valid_of(self._last[place])) for place in range(len(self.mlps))]
        tokens, total = self._sums()
        self.tokens, self._total = self.tokens + tokens, self._total + total
        return {"activation_ratio": torch.stack(shares_BL).mean(0)}

    def active_share(self) -> float:
        """Active neurons over all, mean over the observed tokens and the layers; a single neuron where none is active."""
        if not self.tokens:
            raise ValueError("no pass has been observed yet")
        return max(self._total, 1 / max(self.widths) / len(self.mlps)) / self.tokens

    def share_of_layer(self, place: int) -> float:
        """Active neurons of one block in the last pass over all of them, padding included."""
        return float(self._last[place].mean())

    def _sums(self) -> tuple[float, float]:
        """Real tokens of the last pass, and the sum of their shares of active neurons."""
        shares_BT = torch.stack([self._last[place] for place in range(len(self.mlps))]).mean(0)
        valid_BT = self._valid_of(shares_BT)
        kept = shares_BT.flatten() if valid_BT is None else shares_BT[valid_BT]
        return float(kept.numel()), float(kept.sum())

    def _valid_of(self, like_BT: Tensor) -> Tensor | None:
        return None if self._valid_BT is None else self._valid_BT[:, -like_BT.shape[1] :]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        entering = next(tensor for tensor in given if tensor is not None)
        self._rows, self._device = len(entering), entering.device
        mask = kwargs.get("attention_mask")
        self._valid_BT = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._gates, self._last, self._unobserved = {}, {}, True

    def _note_gate(self, place: int, gate_BTF: Tensor) -> None:
        self._gates[place] = gate_BTF

    def _mask(self, place: int, a_BTF: Tensor) -> Tensor:
        kept_BTF = self._rules[place](a_BTF, self._gates.pop(place, a_BTF))
        share_BT = kept_BTF.sum(-1).double() / kept_BTF.shape[-1]
        self._last[place] = share_BT.view(self._rows, -1).to(self._device)  # OPT's blocks see (B·T, F)
        return torch.where(kept_BTF, a_BTF, torch.zeros((), dtype=a_BTF.dtype, device=a_BTF.device))


def blocks_of(model: DecoderModel, method: str) -> list[Mlp]:
    """The feed-forward blocks of a model's decoder; Infeasible when there is not one in every layer."""
    found = mlps_of(model.decoder)
    if not found:
        raise Infeasible(
            f"method {method}: model {model.info.ref} does not have one feed-forward block with a down projection in every layer"
        )
    return found
