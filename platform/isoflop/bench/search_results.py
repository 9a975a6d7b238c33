"""What ``isoflop bench search`` reports, and what it keeps: errors per seed in a file that a later call goes on with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from isoflop.core.errors import UserError

_FOLDER = Path(__file__).parent
_LAW = _FOLDER.parent / "search" / "law"
_JUDGES = ("belief", "best_method", "contenders", "hypotheses", "mapfit", "misfit", "rows", "targets")
_BENCH = ("search", "search_strategies", "search_worlds")


@dataclass(frozen=True)
class Score:
    """One strategy's error in one simulated study."""

    case: str
    strategy: str
    share: float
    seed: int
    error: float
    runs: int
    fits: bool | None = None

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What it is about."""
        return (self.case, self.strategy, self.share, self.seed)


class Saved:
    """Scores in a file of JSON lines, each with a digest of the code that made it; other code's scores are left out.

    A digest covers the bench and what judges rows; for the strategies that plan (``law``, ``d-optimal``) also the planner;
    and ``data``, where outcomes come from a reference.
    """

    def __init__(self, path: Path | None, data: bytes = b"") -> None:
        self._path, self._data = path, data
        self._scores: dict[tuple[str, str, float, int], Score] = {}
        if path is None or not path.exists():
            return
        lines = path.read_bytes()
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole != lines:  # a call was killed while it wrote its last score
            path.write_bytes(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
                code = values.pop("code")
                score = Score(**values)
            except (ValueError, TypeError, KeyError):
                raise UserError(f"--save: {path}: line {number} is no score of this bench") from None
            if code == digest(score.strategy, self._data):
                self._scores[score.key] = score

    def get(self, case: str, strategy: str, share: float, seed: int) -> Score | None:
        """A score that is there."""
        return self._scores.get((case, strategy, share, seed))

    def add(self, score: Score) -> None:
        """Keep a score, on disk at once."""
        self._scores[score.key] = score
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({**asdict(score), "code": digest(score.strategy, self._data)}) + "\n")


@cache
def digest(strategy: str, data: bytes = b"") -> str:
    """Of the code, and of the data, that a strategy's scores depend on."""
    paths = [_FOLDER / f"{n}.py" for n in _BENCH]
    if strategy in ("law", "d-optimal"):
        paths += sorted(_LAW.glob("*.py"))
    else:
        paths += [_LAW / f"{n}.py" for n in _JUDGES]
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths) + data).hexdigest()[:12]


def summarise(share: float, scores: Sequence[Score]) -> dict[str, Any]:
    """Median with a 95 % bootstrap interval, root mean square and mean of the errors at one share."""
    values = np.array([s.error for s in scores])
    rng = np.random.default_rng(0)
    draws = np.median(values[rng.integers(len(values), size=(400, len(values)))], axis=1)
    said = [s.fits for s in scores if s.fits is not None]
    return {
        "share": share,
        "seeds": len(values),
        "median": float(np.median(values)),
        "low": float(np.quantile(draws, 0.025)),
        "high": float(np.quantile(draws, 0.975)),
        "rms": float(np.sqrt(np.mean(values**2))),
        "mean": float(np.mean(values)),
        "runs": float(np.mean([s.runs for s in scores])),
        "says_misfit": 1 - float(np.mean(said)) if said else None,
        "errors": [float(v) for v in values],
    }


def share_for(points: Sequence[Mapping[str, Any]], level: float, key: str = "rms") -> float:
    """The least share at which the error is at most ``level``, interpolated in logarithms; inf when never.

    Below the smallest share nothing is extrapolated: the smallest share counts.
    """
    before: Mapping[str, Any] | None = None
    for p in points:
        if p[key] <= level:
            if before is None or not math.isfinite(before[key]) or before[key] <= 0 or p[key] <= 0:
                return float(p["share"])
            gap = math.log(before[key] / p[key])
            part = math.log(before[key] / level) / gap if gap > 0 else 1.0
            return float(before["share"] * (p["share"] / before["share"]) ** part)
        before = p
    return math.inf


def finite(value: Any) -> Any:
    """The same for JSON, which has no infinities: null where a number is none."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of at most 80 columns."""
    choice = result["case"] == "best-of-four"
    lines = [f"{result['case']}: {result['goal']}"]
    bounded = any(p.get("best") is not None for f in result["strategies"].values() for p in f["points"])
    what = "wrong" if choice else "median error [95 %]      rms" + ("     best*" if bounded else "")
    lines.append(f"  {'strategy':<11}{'share':>6}{'seeds':>6}{'runs':>6}  {what}")
    for name, found in result["strategies"].items():
        for p in found["points"]:
            if choice:
                values = f"{p['mean']:.2f}"
            else:
                values = f"{p['median']:.4f} [{p['low']:.4f}, {p['high']:.4f}] {p['rms']:.4f}"
            if p.get("best") is not None:
                values += f" {p['best']:.3g}"
            said = "" if p["says_misfit"] is None else f" misfit {p['says_misfit']:.0%}"
            lines.append(f"  {name:<11}{p['share']:>6g}{p['seeds']:>6}{p['runs']:>6.0f}  {values}{said}"[:80])
    lines.append("  share of the grid's FLOPs; relative error; misfit: seeds that say so")
    if bounded:
        lines.append("  * FLOPs of the best possible design for the row's rms, over the row's own")
    lines += [f"  {name}: {value:.3g}"[:80] for name, value in result["ratios"].items()]
    return lines
