"""Top-k: as many neurons of every layer for every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.activation_sparsity.base import ActivationSparsityMethod, Rule
from isoflop.methods.activation_sparsity.rules import top_of_each, units_kept
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.feed_forward import Mlp


@METHODS.register("mlp-topk")
@dataclass(frozen=True)
class MlpTopK(ActivationSparsityMethod):
    """The k neurons with the largest magnitudes are active, chosen for each token by itself; those at zero never are.

    Of the released code of arXiv 2411.02335 it takes the magnitude of the gate as the score, and not the choice over all
    tokens of a batch at once, which would make a token's output depend on its neighbours. Training-free.
    """

    active: Annotated[float, Knob(low=0.01, high=1.0, ratio=True, doc="k as a share of the block's neurons")] = 0.3
    score: Annotated[str, Knob(choices=("gate", "value"), doc="whose magnitude counts")] = "gate"

    def axes(self, info: ModelInfo) -> Axes:
        """1 / active."""
        return Axes(ratio=1 / self.active)

    @classmethod
    def identity(cls, info: ModelInfo) -> Method | None:
        """All stay."""
        return cls(active=1.0)

    def rules(self, mlps: Sequence[Mlp], prepared: Any) -> list[Rule]:
        """The same for every block."""
        return [self._kept] * len(mlps)

    def _kept(self, a_BTF: Tensor, gate_BTF: Tensor) -> Tensor:
        score_BTF = (gate_BTF if self.score == "gate" else a_BTF).abs()
        return top_of_each(score_BTF, units_kept(self.active, score_BTF.shape[-1]))
