r"""Search that sharpens a law: runs are chosen by what they teach about a question, per unit of cost.

The belief after some runs is a mixture of Gaussians over hypotheses k (a competing form in one basin of its fit), in
coordinates u where amplitudes are logarithms:

    Sigma_k = (J_k^T V^-1 J_k + Lambda)^-1        V = diag(sigma^2 q_i) + tau^2 K        p_k ~ exp(-BIC_k/2)

with a weak prior Lambda, the noise's variance sigma^2 (inverse-gamma posterior), the rows' relative variances q_i (standard
errors; a regression of squared residuals on cost) and the misfit's variance tau^2 (zero unless lack of fit is significant; a
smooth surface over ln x, what is not known of which joins u: :mod:`isoflop.search.law.misfit`). The question t(u), for instance ln V*, the errors along a frontier or the exponents, has covariance
C_k = J_t Sigma_k with the parameters. A run at x with sensitivities h and noise r scores

    [ sum_k p_k ||C_k h||^2/(r + h^T Sigma_k h) + sum_{k<l} p_k p_l |t_k - t_l|^2 (1 - BC_kl(x)) ] / cost(x)^gamma

(variance taken off the answer, V-optimal, plus disagreement between hypotheses that its outcome would settle; BC is the
Bhattacharyya coefficient of their predictions), after arXiv 2604.22753. Since the first part does not depend on outcomes,
batches and runs under way are fantasised. Where money or a number of runs is given, the score only orders what the best design
for all that is left wants at least half a run of (:mod:`isoflop.search.law.design`).

:class:`LawSampler` is the Optuna sampler; the parts below it (``belief``, ``gains``, ``planner``) know no Optuna.
"""

from isoflop.search.law.best_method import BestMethod
from isoflop.search.law.policy import Policy
from isoflop.search.law.replay import Replay, replay
from isoflop.search.law.report import Report
from isoflop.search.law.sampler import LawSampler
from isoflop.search.law.targets import Exponents, Frontier, OptimalAllocation, PredictionAt, Target

__all__ = [
    "BestMethod",
    "Exponents",
    "Frontier",
    "LawSampler",
    "OptimalAllocation",
    "Policy",
    "PredictionAt",
    "Replay",
    "Report",
    "Target",
    "replay",
]
