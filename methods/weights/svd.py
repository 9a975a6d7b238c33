"""Truncated singular value decomposition, plain or aware of the inputs: the baseline of every factorised method.

Shape suffixes: O outputs (rows), I inputs (columns), K rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from isoflop.core.knobs import Knob, KnobValue
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.base import known_matrices
from isoflop.methods.weights.healing import Form, HealedMethod, Whole
from isoflop.methods.weights.payloads import StackPayload
from isoflop.methods.weights.stacks import low_rank
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo

PLAIN, ASVD, WHITEN = "none", "asvd", "svd-llm"
EPSILON = 1e-6
"""Added to ASVD's scales, and to a Gram matrix that is not positive, as in the released codes."""


@METHODS.register("svd")
@dataclass(frozen=True)
class Svd(HealedMethod):
    """Two factors in float16 in each matrix's place, of the rank at which they take the share ``keep`` of its weights.

    ``scaling: none`` gives the best rank for the weights themselves. ``asvd`` (arXiv 2312.05821) first scales each input channel by the
    mean magnitude of its inputs to the power ``alpha``, ``svd-llm`` (arXiv 2403.07378) by a Cholesky factor of the inputs' Gram matrix, after
    which what is cut is the error of the outputs on the calibration's inputs; both undo the scaling in the second factor. The
    factors may then be trained (``heal_steps``), as those of other factorised methods are.

    On purpose not as released: all matrices keep the same share (ASVD searches one for each), and second factors are not fitted anew
    to the outputs (SVD-LLM's update). Nothing is trained unless ``heal_steps`` says so.
    """

    paper: ClassVar[str] = "arXiv 2403.07378"

    keep: Annotated[float, Knob(low=0.01, high=1.0, ratio=True, doc="share of a matrix's weights that its factors take; 1 leaves it as it is")] = 0.5  # fmt: skip
    scaling: Annotated[str, Knob(choices=(PLAIN, ASVD, WHITEN), doc="of input channels before the decomposition, by their inputs")] = PLAIN  # fmt: skip
    alpha: Annotated[float, Knob(low=0.0, high=2.0, doc="power of ASVD's scales")] = 0.5
    n_calib: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples for the scaling")] = 128  # fmt: skip
    heal_steps: Annotated[int, Knob(low=0, high=1_000_000, doc="of training the factors; 0 for none")] = 0

    @classmethod
    def identity(cls, info: ModelInfo) -> Svd:
        """Everything is kept."""
        return cls(keep=1.0)

    @property
    def calibration_examples(self) -> int:
        """For the scaling."""
        return 0 if self.scaling == PLAIN or self.keep == 1 else self.n_calib

    @property
    def calibration_sizes(self) -> bool:
        """For ASVD's scales."""
        return self.scaling == ASVD

    def relevant(self) -> Svd:
        """Scales have a power, and want examples."""
        method = super().relevant()
        if self.keep == 1:
            return method.at_defaults("scaling", "alpha", "n_calib", "heal_steps", "heal_lr", "heal_batch", "heal_kd")
        idle = {PLAIN: ("alpha", "n_calib"), ASVD: (), WHITEN: ("alpha",)}[self.scaling]
        return method.at_defaults(*idle)

    def axes(self, info: ModelInfo) -> Axes:
        """Weights over those of the factors."""
        known = known_matrices(info)
        dense = sum(rows * cols * count for rows, cols, count in known)
        kept = sum(count * self._planned(rows, cols) for rows, cols, count in known)
        return Axes(ratio=dense / kept if known else 1 / self.keep)

    def _planned(self, rows: int, cols: int) -> int:
        """Weights of its factors, or of the matrix itself."""
        return rows * cols if self.keep == 1 else rank_of(rows, cols, self.keep) * (rows + cols)

    def form(self, weight_OI: Tensor, stats: ViewStats | None, seed: int) -> Form:
        """Its factors; a row or a column that one of rank 1 would not shorten stays whole."""
        rows, cols = weight_OI.shape
        if self._planned(rows, cols) >= rows * cols:
            return Whole(weight_OI)
        rank = rank_of(rows, cols, self.keep)
        weight_OI = weight_OI.float()
        if self.scaling == PLAIN or stats is None:
            return Factors(*low_rank(weight_OI, rank))
        if self.scaling == ASVD:
            return Factors(*scaled_low_rank(weight_OI, magnitudes(stats) ** self.alpha + EPSILON, rank))
        return Factors(*whitened_low_rank(weight_OI, stats.hessian_II, rank))

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """Scales show where there are some."""
        return {
            "alpha": [{"scaling": ASVD, "alpha": alpha} for alpha in (0.5, 1.0)],
            "n_calib": [{"scaling": ASVD, "n_calib": count} for count in (1, 2)],
        }


class Factors(Form):
    """A matrix as the product of two."""

    def __init__(self, left_OK: Tensor, right_KI: Tensor) -> None:
        super().__init__()
        self.left_OK, self.right_KI = nn.Parameter(left_OK.contiguous()), nn.Parameter(right_KI.contiguous())

    def weight(self) -> Tensor:
        """The product."""
        return self.left_OK @ self.right_KI

    def payload(self) -> StackPayload:
        """One block without signs, 2·K·(O + I) bytes."""
        left_OK, right_KI = self.left_OK.detach().half(), self.right_KI.detach().half()
        return StackPayload((left_OK.shape[0], right_KI.shape[1]), left_OK[None], right_KI[None], None)


def rank_of(rows: int, cols: int, keep: float) -> int:
    """⌊keep · O·I / (O + I)⌋ as in both released codes, but at least 1."""
    return max(1, int(keep * rows * cols / (rows + cols)))


def magnitudes(stats: ViewStats) -> Tensor:
    """Mean magnitude of each input channel, (I,); all alike where nothing was observed."""
    if stats.means_I is None:
        raise ValueError("scaling = asvd needs mean magnitudes, which this calibration lacks")
    return stats.means_I if stats.tokens else torch.ones_like(stats.means_I)


def scaled_low_rank(weight_OI: Tensor, scale_I: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (O, K) and (K, I) of the best rank for W·diag(s), divided by s again."""
    left_OK, right_KI = low_rank(weight_OI * scale_I, rank)
    return left_OK, right_KI / scale_I


def whitened_low_rank(weight_OI: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (O, K) and (K, I) of rank K that are least apart from W on inputs with this Gram matrix (SVD-LLM, section 3.1).

    With S Sᵀ the Gram matrix, the outputs' squared error of W' is ‖(W - W')S‖². In float64, as released.
    """
    root_II = _root(gram_II.double())
    left_OK, scaled_KI = low_rank(weight_OI.double() @ root_II, rank)
    right_KI = torch.linalg.solve_triangular(root_II, scaled_KI, upper=False, left=False)
    return left_OK.float(), right_KI.float()


def _root(gram_II: Tensor) -> Tensor:
    """Lower Cholesky factor; eigenvalues are lifted to a little above 0 where one is not."""
    if not bool(gram_II.any()):
        return torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    root_II, failed = torch.linalg.cholesky_ex(gram_II)
    if not bool(failed):
        return root_II
    lift = EPSILON * gram_II.diagonal().mean() - torch.linalg.eigvalsh(gram_II)[0].clamp(max=0)
    return torch.linalg.cholesky(gram_II + lift * torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device))
