"""Exact zeros: what a model computes for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from isoflop.methods.activation_sparsity.base import ActivationSparsityMethod, Rule
from isoflop.methods.activation_sparsity.rules import nonzero
from isoflop.methods.base import METHODS, Method
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.feed_forward import Mlp


@METHODS.register("mlp-exact-zero")
@dataclass(frozen=True)
class MlpExactZero(ActivationSparsityMethod):
    """A neuron is inactive where its value is exactly zero: outputs stay, and only ReLU and its like gain.

    There is no knob; the ratio is what the model gives.
    """

    @classmethod
    def identity(cls, info: ModelInfo) -> Method | None:
        """It always is the identity."""
        return cls()

    def rules(self, mlps: Sequence[Mlp], prepared: Any) -> list[Rule]:
        """The same for every block."""
        return [_not_zero] * len(mlps)


def _not_zero(a_BTF: Tensor, gate_BTF: Tensor) -> Tensor:
    return nonzero(a_BTF)
