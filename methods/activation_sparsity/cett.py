"""CETT, the cumulative error of tail truncation: how much of a block's output its smallest contributions make up.

Neuron i contributes n_i = a_i W_out[:, i] to the output of its block, whose norm is |a_i| ||W_out[:, i]||. CETT(eps) is
the mean over tokens of || sum of the n_i shorter than eps || / || sum of all n_i ||, a bias of the block left aside
(arXiv 2411.02335, section 3; ReLU² wins, arXiv 2402.03804, equation 4).

Shape suffixes: S tokens, F neurons, d width.
"""

from __future__ import annotations

from torch import Tensor

from isoflop.methods.activation_sparsity.rules import at_least, just_above
from isoflop.methods.bisection import Crossing, largest_allowed


class Contributions:
    """The contributions of one block's neurons on some text, the model dense.

    Thresholds are searched for among the norms that occur, by rank, so that a search ends with the exact threshold: no
    grid whose ends a target could fall outside of, and a CETT of 0 removes what is exactly zero and nothing else.

    Args:
        a_SF: values of the neurons; tokens at which all contributions cancel are left out.
        out_Fd: what each adds per unit of its value.
    """

    def __init__(self, a_SF: Tensor, out_Fd: Tensor) -> None:
        whole_S = (a_SF @ out_Fd).norm(dim=-1)
        self._a_SF = a_SF[whole_S > 0]
        self._whole_S = whole_S[whole_S > 0]
        self._out_Fd = out_Fd
        self.norm_SF = self._a_SF.abs() * out_Fd.norm(dim=-1)
        self._ranked = self.norm_SF.flatten().sort().values
        self._known: dict[int, float] = {}

    def cett(self, threshold: float) -> float:
        """CETT of leaving out every contribution whose norm is below a threshold."""
        if not len(self._a_SF):
            return 0.0
        tail_SF = self._a_SF.masked_fill(at_least(self.norm_SF, threshold), 0.0)
        return float(((tail_SF @ self._out_Fd).norm(dim=-1) / self._whole_S).double().mean())

    def threshold_of_rank(self, rank: int) -> float:
        """The threshold that leaves out the ``rank`` smallest contributions, and those equal to the last of them."""
        return just_above(float(self._ranked[rank - 1])) if rank else 0.0

    def search(self, target: float) -> Crossing:
        """The most contributions, by rank, whose removal has a CETT of at most ``target``.

        CETT falls by about 1e-4 here and there while the threshold rises; larger dips end at the first crossing. Every
        search halves the whole bracket: what earlier ones tried saves its evaluation and decides nothing, since a
        narrower bracket would end at another one of several crossings.
        """

        def of(rank: float) -> float:
            if int(rank) not in self._known:
                self._known[int(rank)] = self.cett(self.threshold_of_rank(int(rank)))
            return self._known[int(rank)]

        return largest_allowed(of, target, 0, self._ranked.numel(), 1, slack=1e-3)

    def threshold(self, target: float) -> float:
        """The largest threshold with a CETT of at most ``target``."""
        return self.threshold_of_rank(int(self.search(target).x))
