"""AQLM: additive codebooks, fitted to the outputs and searched with beams (arXiv 2401.06118).

Shape suffixes: O outputs (rows), I inputs (columns), M tables, K entries of a table, G weights of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch
from torch import Tensor

from isoflop.core.knobs import Knob, KnobValue
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.additive import Additive, fit
from isoflop.methods.weights.base import known_matrices
from isoflop.methods.weights.codebooks import code_bits
from isoflop.methods.weights.healing import Form, HealedMethod, Whole
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo


@METHODS.register("aqlm")
@dataclass(frozen=True)
class Aqlm(HealedMethod):
    """Groups of ``group`` inputs of a row are sums of one entry from each of ``codebooks`` tables, times a scale of the row.

    Tables begin as clusters of what the tables before them leave. Then, in turn, Adam fits tables and scales to the outputs' squared
    error on calibration inputs, and a beam search chooses better codes, until a round gains less than ``tolerance``. Last the tables
    and scales of all matrices are trained together on the model's loss (``heal_steps``). Stored are codebooks·code_bits/group bits
    per weight, the tables, 16·2^code_bits·group bits each, and 16 bits a row: 2 bits at the defaults and large matrices, but tables
    dominate small ones, where fewer ``code_bits`` are better. Use it at 1 to 3 bits; above, grids do as well and cost less time.

    On purpose not as released: tables begin with k-means++ (released, random points); the inputs are those of the uncompressed model
    (released, of the compressed blocks before); and what the paper trains block by block on the block's outputs is trained here on
    the loss of the whole model, by the training that all healed methods share. Codes of more than 12 bits, quantised tables, and
    groups that span several outputs, all off by default there, are not offered.
    """

    paper: ClassVar[str] = "arXiv 2401.06118"

    codebooks: Annotated[int, Knob(choices=(1, 2, 3, 4), ratio=True, unit="tables", doc="whose entries are added up")] = 2  # fmt: skip
    code_bits: Annotated[int, Knob(choices=(2, 4, 6, 8, 10, 12), unit="bits", doc="of a code: a table has 2^code_bits entries, at most one for each group")] = 8  # fmt: skip
    group: Annotated[int, Knob(choices=(4, 8, 16), unit="weights", doc="of a row that share their codes")] = 8
    beam: Annotated[int, Knob(low=1, high=32, log=True, doc="encodings of a row that a search carries on")] = 1
    rounds: Annotated[int, Knob(low=0, high=1000, doc="of fitting tables and searching codes, at most; 0 leaves the clusters")] = 10  # fmt: skip
    steps: Annotated[int, Knob(low=1, high=10_000, doc="of Adam in a round")] = 100
    lr: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="learning rate of that")] = 1e-4
    tolerance: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the error that a round must gain for another one")] = 0.01  # fmt: skip
    n_calib: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples to fit on")] = 128  # fmt: skip

    @property
    def calibration_examples(self) -> int:
        """For the fit."""
        return self.n_calib if self.rounds else 0

    def relevant(self) -> Aqlm:
        """Without rounds nothing is fitted."""
        method = super().relevant()
        return method if self.rounds else method.at_defaults("beam", "steps", "lr", "tolerance", "n_calib")

    def begun(self, steps: int) -> Self:
        """The fit, too."""
        return replace(super().begun(steps), rounds=min(self.rounds, steps), steps=min(self.steps, steps))

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per weight, tables and scales included where the matrices are known."""
        known = known_matrices(info)
        if not known:
            bits = self.codebooks * self.code_bits / self.group
            return Axes(bits=bits, ratio=info.dense_bits / bits)
        count = sum(rows * cols * n for rows, cols, n in known)
        total = sum(n * min(16 * rows * cols, self._stored_bits(rows, cols)) for rows, cols, n in known)
        return Axes(bits=total / count, ratio=info.dense_bits * count / total)

    def _entries(self, rows: int, cols: int) -> int:
        return min(2**self.code_bits, rows * -(-cols // self.group))

    def _stored_bits(self, rows: int, cols: int) -> int:
        """Of codes, tables and scales."""
        entries = self._entries(rows, cols)
        codes = rows * -(-cols // self.group) * code_bits(entries)
        return self.codebooks * (codes + 16 * entries * self.group) + 16 * rows

    def form(self, weight_OI: Tensor, stats: ViewStats | None, seed: int) -> Form:
        """Fitted to its inputs; a matrix that codes and tables would not shorten stays whole."""
        rows, cols = weight_OI.shape
        if self._stored_bits(rows, cols) >= 16 * rows * cols:
            return Whole(weight_OI)
        weight_OI = weight_OI.float()
        generator = torch.Generator().manual_seed(seed)
        form = Additive.begun(weight_OI, self.codebooks, self._entries(rows, cols), self.group, generator)
        if stats is not None:
            fit(
                form, weight_OI, _gram(stats), rounds=self.rounds, steps=self.steps, lr=self.lr, beam=self.beam,
                tolerance=self.tolerance, generator=generator,
            )  # fmt: skip
        return form

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """What is fitted shows after some steps, and when rounds end, where some are allowed."""
        return {
            "lr": [{"lr": 1e-4}, {"lr": 0.1}],
            "tolerance": [{"tolerance": 0.0}, {"tolerance": 1.0}],
            "rounds": [{"rounds": 0}, {"rounds": 1}],
            "steps": [{"steps": 1, "lr": 0.1}, {"steps": 2, "lr": 0.1}],
            **{name: [{"rounds": 1, "steps": 1, name: value} for value in values] for name, values in QUICKLY.items()},
        }


QUICKLY: Mapping[str, Sequence[KnobValue]] = {
    "code_bits": (2, 4), "codebooks": (1, 2), "group": (4, 8), "beam": (1, 4), "n_calib": (1, 4)
}  # fmt: skip
"""What shows after one step."""


def _gram(stats: ViewStats) -> Tensor:
    """1/N XᵀX of the inputs; without any, every weight counts alike."""
    if stats.tokens:
        return stats.hessian_II / 2
    return torch.eye(len(stats.hessian_II), device=stats.hessian_II.device)
