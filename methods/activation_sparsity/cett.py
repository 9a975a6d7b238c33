"""CETT, the cumulative error of tail truncation: how much of a block's output its smallest contributions make up.

Neuron i contributes n_i = a_i W_out[:, i] to the output of its block, whose norm is |a_i| ||W_out[:, i]||. CETT(eps) is
the mean over tokens of || sum of the n_i shorter than eps || / || sum of all n_i ||, a bias of the block left aside
(arXiv 2411.02335, section 3; ReLU² wins, arXiv 2402.03804, equation 4).

Shape suffixes: S tokens, F neurons, d width, N contributions between two ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from isoflop.methods.activation_sparsity.rules import at_least, just_above
from isoflop.methods.bisection import Crossing, largest_allowed

NEAR = 2**-9
"""Share of the contributions between two that were tried, up to which the next ones are added to the smaller one's sum."""
WORTH_IT = 2**20
"""Contributions of a block, from which on that pays."""


class Contributions:
    """The contributions of one block's neurons on some text, the model dense.

    Thresholds are searched for among the norms that occur, by rank, so that a search ends with the exact threshold: no
    grid whose ends a target could fall outside of, and a CETT of 0 removes what is exactly zero and nothing else.

    Args:
        a_SF: values of the neurons; tokens at which all contributions cancel are left out.
        out_Fd: what each adds per unit of its value.
        lay: is given large tensors, and returns them where they are to lie.
    """

    def __init__(self, a_SF: Tensor, out_Fd: Tensor, lay: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        whole_S = (a_SF @ out_Fd).norm(dim=-1)
        said_S = whole_S > 0
        self._a_SF = a_SF if bool(said_S.all()) else lay(a_SF[said_S])
        self._whole_S = whole_S[said_S]
        self._out_Fd = out_Fd
        self._norms_F = out_Fd.norm(dim=-1)
        self._ranked = lay(self.norm_SF.flatten().sort().values)
        self._known: dict[int, float] = {}
        self._base: _Base | None = None

    @property
    def norm_SF(self) -> Tensor:
        """Norms of all contributions; worked out anew each time, since they are as many as the values."""
        return self._a_SF.abs() * self._norms_F

    def cett(self, threshold: float) -> float:
        """CETT of leaving out every contribution whose norm is below a threshold."""
        return self._mean(self._tail(threshold)) if len(self._a_SF) else 0.0

    def _tail(self, threshold: float) -> Tensor:
        """The sum (S, d) of what is left out."""
        return self._a_SF.masked_fill(at_least(self.norm_SF, threshold), 0.0) @ self._out_Fd

    def _mean(self, tail_Sd: Tensor) -> float:
        return float((tail_Sd.norm(dim=-1) / self._whole_S).double().mean())

    def threshold_of_rank(self, rank: int) -> float:
        """The threshold that leaves out the ``rank`` smallest contributions, and those equal to the last of them."""
        return just_above(float(self._ranked[rank - 1])) if rank else 0.0

    def search(self, target: float) -> Crossing:
        """The most contributions, by rank, whose removal has a CETT of at most ``target``.

        CETT falls by about 1e-4 here and there while the threshold rises; larger dips end at the first crossing. Every
        search halves the whole bracket: what earlier ones tried saves its evaluation and decides nothing, since a
        narrower bracket would end at another one of several crossings.

        Where two ranks that were tried lie near each other, those between them are tried by adding the few contributions
        to the sum of the smaller one. That rounds otherwise than the whole sum does, so what comes as near to the target as
        roundings could reach is worked out whole: the search ends where it would without.
        """
        count = self._ranked.numel()
        close = 1e-5 / max(len(self._a_SF), 1) ** 0.5
        tried: dict[int, float] = {}

        def of(x: float) -> float:
            rank = int(x)
            if rank not in self._known and count >= WORTH_IT:
                low = max((r for r in tried if r < rank), default=None)
                high = min((r for r in tried if r > rank), default=None)
                if low is not None and high is not None and high - low <= NEAR * count:
                    found = self._near(low, high, rank)
                    if abs(found - target) > close:
                        tried[rank] = found
                        return found
            if rank not in self._known:
                self._known[rank] = self.cett(self.threshold_of_rank(rank))
            tried[rank] = self._known[rank]
            return tried[rank]

        found = largest_allowed(of, target, 0, count, 1, slack=1e-3)
        self._base = None
        return found

    def _near(self, low: int, high: int, rank: int) -> float:
        """CETT of a rank between two others."""
        base = self._base
        if base is None or not base.low <= low < high <= base.high:
            smaller, larger = self.threshold_of_rank(low), self.threshold_of_rank(high)
            norm_SF = self.norm_SF
            places = (at_least(norm_SF, smaller) & ~at_least(norm_SF, larger)).nonzero(as_tuple=True)
            base = self._base = _Base(low, high, self._tail(smaller), places, norm_SF[places])
        removed = ~at_least(base.norm_N, self.threshold_of_rank(rank))
        tokens_N, neurons_N = (part[removed] for part in base.places)
        added_Nd = self._a_SF[tokens_N, neurons_N, None] * self._out_Fd[neurons_N]
        return self._mean(base.tail_Sd.index_add(0, tokens_N, added_Nd))

    def threshold(self, target: float) -> float:
        """The largest threshold with a CETT of at most ``target``."""
        return self.threshold_of_rank(int(self.search(target).x))


@dataclass(frozen=True)
class _Base:
    """The sum of what goes at one rank, and what else goes up to another."""

    low: int
    high: int
    tail_Sd: Tensor
    places: tuple[Tensor, ...]
    norm_N: Tensor
