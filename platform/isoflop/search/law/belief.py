r"""What the rows say: a mixture over competing forms and over the basins of each fit.

For hypothesis k (a form, a basin), in search coordinates u (logarithms of amplitudes, exponents as they are):

    Sigma_k = (J_k^T V^-1 J_k + Lambda)^-1,    V = diag(sigma^2 q_i) + tau^2 K,    Lambda = diag(1/sd^2)   (weak prior)

* sigma^2 has an inverse-gamma posterior; q_i, the relative variance of a row, comes from standard errors where rows have
  them, and from a shrunken regression of ln r^2 on ln cost (small, cheap runs are noisier).
* tau^2 is the variance of what the form misses, zero unless a test of lack of fit rejects. The misfit is then a smooth
  surface over ln x (:mod:`isoflop.search.law.misfit`; K: squared-exponential, a length of .35 of each axis' range):
  neighbouring places share it, repeats of a place do not average it away, predictions add what it is expected to be near the
  rows, and what is not known of it joins the parameters. A form that fits is left alone.
* weights are proportional to exp(-BIC/2), BIC = n ln(SSE/n) + p ln n, over the same rows.

Shapes: n rows, C cells, M places, P parameters of all blocks, R parameter draws, K axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from isoflop.core.expressions import Array
from isoflop.search.law.contenders import Block, Contender, make_blocks
from isoflop.search.law.hypotheses import REJECT, REJECT_BEND, Hypothesis, LackOfFit, Noise
from isoflop.search.law.mapfit import distinct, map_fit, search_starts
from isoflop.search.law.misfit import Surface, Waves, kernel
from isoflop.search.law.rows import Cells, RowTable, pool, thin

_GUESS = 0.01  # prior noise as a share of a typical y
_STRENGTH = 0.5  # of that guess, in degrees of freedom / 2 (a0)
_BASIN_MSE = 1.5  # basins up to this multiple of the best mean squared error are kept
_MATTERS = 0.002  # misfit, as a share of a typical y, below which a form is good enough
_MAX_HYPOTHESES = 6
_LENGTH = 0.35  # of the misfit's waves, as a share of each axis' range
_MOST_PLACES = 120  # in fits with a misfit surface
_GROWTH = 1.5  # a new global search when the rows have grown by this factor


class Belief:
    """Fits that follow a growing table of rows.

    Args:
        contenders: forms on common axes.
        axes, scales: axes and what they are divided by (fixed, so that the prior does not move).
        groups: number of laws; shared: names of parameters that the groups have in common, per contender.
        noise: ``auto`` learns how noise depends on cost; ``constant`` does not.
        box: lowest and highest value of every axis, over which a misfit is looked for; default: that of the rows.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        axes: Sequence[str],
        scales: Sequence[float],
        groups: int = 1,
        shared: Sequence[Sequence[str]] = (),
        noise: str = "auto",
        box: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.contenders = list(contenders)
        self.axes, self.scales = tuple(axes), tuple(scales)
        self.groups = groups
        self.shared = [tuple(s) for s in shared] or [() for _ in contenders]
        self.box = box
        self._learn_noise = noise == "auto"
        self._searched_at = 0
        self._y_scale = math.nan
        self.hypotheses: list[Hypothesis] = []
        self.noise = Noise(math.nan, 0.0)
        self.lack_of_fit = LackOfFit()
        self.cells: Cells | None = None

    @property
    def parameters(self) -> int:
        """Free parameters of the largest contender, over all groups."""
        return max(self._count(i) for i in range(len(self.contenders)))

    def _count(self, i: int) -> int:
        names = self.contenders[i].form.names
        common = sum(n in self.shared[i] for n in names) if self.groups > 1 else 0
        return common + (len(names) - common) * self.groups

    def prior(self, y_scale: float) -> list[Hypothesis]:
        """The contenders before any row."""
        self._y_scale = y_scale
        out = []
        for contender, shared in zip(self.contenders, self.shared, strict=True):
            blocks = make_blocks(contender, self.axes, self.scales, self.groups, shared, y_scale)
            h = Hypothesis(contender.label, 0, blocks, np.concatenate([b.prior_mean for b in blocks]))
            h.cov = np.diag(h.prior_sd**2)
            h.weight = 1 / len(self.contenders)
            out.append(h)
        self.noise = Noise((_GUESS * y_scale) ** 2, _STRENGTH)
        return out

    @np.errstate(all="ignore")
    def update(self, table: RowTable) -> None:
        """Refit to all rows: from the last optima, and globally when the rows have grown much."""
        x, group, y, se, cost = table.columns()
        if math.isnan(self._y_scale):
            self._y_scale = float(np.median(np.abs(y))) or 1.0
        fresh = not self.hypotheses or len(y) >= _GROWTH * self._searched_at or len(y) < 3 * self.parameters
        self._searched_at = len(y) if fresh else self._searched_at
        log_cost = np.log(cost)
        q = self._relative_variance(x, group, y, se, log_cost)
        cells = self.cells = pool(x, group, y, q, log_cost)
        self.noise = replace(self.noise, tau2=0.0)  # the form alone is put to the test, whatever was found before
        self._fit(cells, fresh)
        self._judge(cells)
        if self.noise.tau2 > 0:
            cells = thin(cells, _MOST_PLACES)  # the misfit's covariance is dense
            self._fit(cells, fresh=False)
        self._covariances(cells)
        self._weigh(cells)

    # fits

    def _variance(self, cells: Cells) -> Array:
        """Of the cells' means (C,), misfit aside."""
        noise = self.noise
        sigma2 = noise.sigma2 if math.isfinite(noise.sigma2) else (_GUESS * self._y_scale) ** 2
        return sigma2 * cells.q

    def _white(self, cells: Cells, mine: np.ndarray) -> Array:
        """W with W^T W = V^-1 for some cells; its diagonal alone while the form fits."""
        v = self._variance(cells)[mine]
        if self.noise.tau2 == 0:
            return 1 / np.sqrt(v)
        x, g = cells.x[mine], cells.group[mine]
        return np.linalg.inv(np.linalg.cholesky(np.diag(v) + self.noise.tau2 * kernel(x, g, x, g, self._unit(cells))))

    def _unit(self, cells: Cells) -> Array:
        """Length of the misfit's waves in ln x per axis (K,)."""
        return np.maximum(_LENGTH * np.ptp(np.log(np.maximum(cells.x, 1e-300)), axis=0), 1e-6)

    def _fit(self, cells: Cells, fresh: bool) -> None:
        found: list[Hypothesis] = []
        for i, contender in enumerate(self.contenders):
            old = [h for h in self.hypotheses if h.label == contender.label]
            blocks = (
                old[0].blocks
                if old
                else make_blocks(contender, self.axes, self.scales, self.groups, self.shared[i], self._y_scale)
            )
            found += self._fit_form(contender.label, blocks, old, cells, fresh or not old)
        self.hypotheses = found

    def _fit_form(
        self, label: str, blocks: tuple[Block, ...], old: list[Hypothesis], cells: Cells, fresh: bool
    ) -> list[Hypothesis]:
        """Optima of every block; the first hypothesis has each block's best, the others change one block's basin."""
        per_block: list[list[Array]] = []
        for b, block in enumerate(blocks):
            mine = np.isin(cells.group, block.groups)
            starts = [h.u[h.slices[b]] for h in old] or [block.prior_mean]
            if not mine.any():
                per_block.append([starts[0]])
                continue
            x, g, y, vb = cells.x[mine], cells.group[mine], cells.y[mine], self._variance(cells)[mine]
            start = np.stack(starts)
            if fresh:
                start = np.concatenate([start, search_starts(block, x, g, y, 1 / vb, 6)])
            u, loss = map_fit(block, x, g, y, self._white(cells, mine), start)
            predictions = block.predict(u, x, g)
            noise = 0.25 * math.sqrt(float(np.median(vb)))
            spread = max(float(loss.min()), float(len(y)))
            keep = distinct(u, loss, predictions, noise, float(loss.min()) + (_BASIN_MSE - 1) * spread, 3)
            per_block.append([u[i] for i in keep] or [starts[0]])
        best = np.concatenate([basins[0] for basins in per_block])
        out = [Hypothesis(label, 0, blocks, best)]
        for b, basins in enumerate(per_block):
            for u in basins[1:]:
                other = Hypothesis(label, len(out), blocks, best.copy())
                other.u[other.slices[b]] = u
                out.append(other)
        return out[:_MAX_HYPOTHESES]

    # noise

    def _relative_variance(self, x: Array, group: np.ndarray, y: Array, se: Array, log_cost: Array) -> Array:
        """q per row, mean about 1, from standard errors and from how residuals shrink with cost."""
        known = np.isfinite(se) & (se > 0)
        base = np.ones_like(y)
        if known.sum() >= 3:
            fill = float(np.median(se[known]))
            base = np.where(known, se, fill) ** 2
            base /= np.exp(np.mean(np.log(base)))
        centre = float(np.mean(log_cost))
        z = log_cost - centre
        slope = 0.0
        if self._learn_noise and self.hypotheses and len(y) >= 3 * self.parameters:
            best = self.hypotheses[0]
            r2 = (y - best.predict(best.u[None], x, group)[0]) ** 2 / base
            ok = r2 > 0
            if ok.sum() > 5 and float(np.var(z)) > 0:
                log_r2 = np.log(r2[ok])
                zz = z[ok] - z[ok].mean()
                # ln chi^2_1 has variance pi^2/2: a prior of slope sd .3 on top
                slope = float(zz @ (log_r2 - log_r2.mean()) / (zz @ zz + (math.pi**2 / 2) / 0.3**2))
                slope = float(np.clip(slope, -1.0, 1.0))
        q = base * np.exp(slope * z)
        zz = float(z @ z)
        total = float(z @ (np.log(q) - np.log(q).mean()) / zz) if zz > 0 else 0.0
        self._shape = (float(np.log(q).mean()), total, centre)
        return q

    def _judge(self, cells: Cells) -> None:
        """sigma^2 from the best hypothesis, lack of fit from repeats, tau^2 when it is significant."""
        best = min(self.hypotheses, key=lambda h: self._sse(h, cells))
        between = self._sse(best, cells)
        k = self._count(next(i for i, c in enumerate(self.contenders) if c.label == best.label))
        dof_model = len(cells.y) - k
        self.lack_of_fit, clean = self._tests(best, cells, between, dof_model)
        guess = (_GUESS * self._y_scale) ** 2
        misfit = self.lack_of_fit.rejected
        scatter, dof = (cells.pure + between, max(0, cells.n - k)) if not misfit else clean
        sigma2 = (_STRENGTH * guess + 0.5 * scatter) / (_STRENGTH + 0.5 * dof)
        tau2 = 0.0
        if misfit:
            residual2 = (cells.y - best.law(cells.x, cells.group)) ** 2
            tau2 = max(0.0, float(np.sum(residual2 - sigma2 * cells.q)) / max(1, dof_model))
        level, slope, centre = self._shape
        self.noise = Noise(sigma2, 2 * _STRENGTH + dof, level, slope, centre, tau2)

    def _tests(
        self, best: Hypothesis, cells: Cells, between: float, dof_model: int
    ) -> tuple[LackOfFit, tuple[float, float]]:
        """Lack of fit, and (sum of squares, degrees of freedom) of a noise estimate that does not trust the form."""
        f = p = math.nan
        guess, guess_dof = 2 * _STRENGTH * (_GUESS * self._y_scale) ** 2, 2 * _STRENGTH
        if cells.pure_dof >= 2 and dof_model >= 1:
            f = (between / dof_model) / ((cells.pure + guess) / (cells.pure_dof + guess_dof))
            p = float(stats.f.sf(f, dof_model, cells.pure_dof + guess_dof))
        bend_f, bend_p, rest, rest_dof = self._bend(best, cells, between, dof_model)
        missed = math.sqrt(float(np.mean((cells.y - best.law(cells.x, cells.group)) ** 2)))
        if missed < _MATTERS * self._y_scale:  # significant perhaps, but of no consequence
            p, bend_p = max(p, REJECT), max(bend_p, REJECT_BEND)
        test = LackOfFit(f, p, max(0, dof_model), cells.pure_dof, bend_f, bend_p)
        return test, (cells.pure, cells.pure_dof) if cells.pure_dof >= 2 else (
            cells.pure + rest,
            cells.pure_dof + rest_dof,
        )

    def _bend(self, best: Hypothesis, cells: Cells, between: float, dof: int) -> tuple[float, float, float, float]:
        """F test of extra terms (squares and products of ln axes) in the linearised law."""
        z = np.log(np.maximum(cells.x, 1e-300))
        z = z[:, np.ptp(z, axis=0) > 0]
        if not z.shape[1]:
            return math.nan, math.nan, between, dof
        z = (z - z.mean(axis=0)) / z.std(axis=0)
        pairs = [(a, b) for a in range(z.shape[1]) for b in range(a, z.shape[1])]
        extra = np.stack([z[:, a] * z[:, b] for a, b in pairs], axis=1)
        root = 1 / np.sqrt(cells.q)
        r = (cells.y - best.law(cells.x, cells.group)) * root
        base = best.jacobian(cells.x, cells.group) * root[:, None]
        scale = np.maximum(np.linalg.norm(base, axis=0), 1e-300)
        plain = np.linalg.lstsq(base / scale, r, rcond=1e-8)
        bent = np.linalg.lstsq(np.column_stack([base / scale, extra * root[:, None]]), r, rcond=1e-8)
        gained = int(bent[2] - plain[2])
        before = float(np.sum((r - (base / scale) @ plain[0]) ** 2))
        after = float(np.sum((r - np.column_stack([base / scale, extra * root[:, None]]) @ bent[0]) ** 2))
        # repeats, and the prior, know the noise too: pool them into the denominator
        pool_dof = len(r) - int(bent[2]) + cells.pure_dof
        if gained < 1 or pool_dof < 4:
            return math.nan, math.nan, between, dof
        scatter = after + cells.pure + 2 * _STRENGTH * (_GUESS * self._y_scale) ** 2
        f = max(0.0, before - after) / gained / (scatter / (pool_dof + 2 * _STRENGTH))
        return f, float(stats.f.sf(f, gained, pool_dof)), after, len(r) - int(bent[2])

    def _sse(self, h: Hypothesis, cells: Cells) -> float:
        r = cells.y - h.law(cells.x, cells.group)
        value = float(np.sum(r**2 / cells.q))
        return value if math.isfinite(value) else math.inf

    # posterior

    def _covariances(self, cells: Cells) -> None:
        v = self._variance(cells)
        if self.noise.tau2 > 0:
            v = v + self._add_surfaces(cells)
        for h in self.hypotheses:
            j = h.jacobian(cells.x, cells.group) / np.sqrt(v)[:, None]
            h.cov = inverse(j.T @ j + np.diag(h.prior_sd**-2.0))

    def _add_surfaces(self, cells: Cells) -> Array:
        """Give every hypothesis the misfit's surface; what its waves cannot express of the cells' variance (C,)."""
        white = self._white(cells, np.ones(len(cells.y), dtype=bool))
        unit = self._unit(cells)
        low, high = self.box or (cells.x.min(axis=0), cells.x.max(axis=0))
        waves = Waves.over(np.asarray(low), np.asarray(high), range(self.groups), unit, self.noise.tau2)
        phi, rest = waves.at(cells.x, cells.group), waves.rest(cells.x, cells.group)
        information = phi.T / (self._variance(cells) + rest)
        for h in self.hypotheses:
            missed = cells.y - h.law(cells.x, cells.group)
            weight = self.noise.tau2 * (white.T @ (white @ missed))
            centre = np.asarray(
                np.linalg.solve(information @ phi + np.eye(len(waves)), information @ missed), dtype=np.float64
            )
            h.surface = Surface(cells.x, cells.group, unit, weight, waves, centre)
            h.u = np.concatenate([h.u, np.zeros(len(waves))])
        return rest

    def log_posterior(self, h: Hypothesis, u_RP: Array) -> Array:
        """ln of the posterior density at parameter draws (R,), up to a constant; what the Gaussian (u, cov) approximates."""
        assert self.cells is not None
        cells = thin(self.cells, _MOST_PLACES)
        v = self._variance(cells)
        away = ((u_RP - h.prior_mean) / h.prior_sd)[:, : h.own]
        expected = replace(h, surface=None).predict(u_RP, cells.x, cells.group)
        penalty = np.sum(away**2, axis=1)
        if h.surface is not None:
            waves = h.surface.centre + u_RP[:, h.own :]
            expected = expected + waves @ h.surface.waves.at(cells.x, cells.group).T
            v = v + h.surface.waves.rest(cells.x, cells.group)
            penalty = penalty + np.sum(waves**2, axis=1)
        return np.asarray(-0.5 * (np.sum((cells.y - expected) ** 2 / v, axis=1) + penalty))

    def _weigh(self, cells: Cells) -> None:
        """BIC over rows; over places, with the misfit in their covariance, once a form is known to miss."""
        white = self._white(cells, np.ones(len(cells.y), dtype=bool))
        for h in self.hypotheses:
            k = self._count(next(i for i, c in enumerate(self.contenders) if c.label == h.label))
            if white.ndim == 1:
                n, h.sse = cells.n, self._sse(h, cells) + cells.pure
            else:
                n, h.sse = len(cells.y), float(np.sum((white @ (cells.y - h.law(cells.x, cells.group))) ** 2))
            h.bic = n * math.log(max(h.sse, 1e-300) / n) + k * math.log(max(n, 2))
        least = min(h.bic for h in self.hypotheses)
        raw = np.array([math.exp(-0.5 * min(h.bic - least, 700.0)) for h in self.hypotheses])
        for h, weight in zip(self.hypotheses, raw / raw.sum(), strict=True):
            h.weight = float(weight)
        self.hypotheses.sort(key=lambda h: -h.weight)


def inverse(precision_PP: Array) -> Array:
    """Inverse of a positive definite matrix by Cholesky on a unit diagonal."""
    d = np.sqrt(np.diag(precision_PP))
    root = np.linalg.inv(np.linalg.cholesky(precision_PP / np.outer(d, d)))
    return (root.T @ root) / np.outer(d, d)
