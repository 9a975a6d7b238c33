"""What has been judged so far, in ``outcomes.json``: some methods can be judged anew while the others keep their numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from isoflop.dashboards.outcomes.claims import Claim
from isoflop.frontier.composition import Composed, Configuration, Gain
from isoflop.frontier.paired import Paired

RECORD = Path(__file__).parent / "outcomes.json"
PERCENTILE = "percentile"
"""An interval of numbers that were judged by a bootstrap over repeats, and not since."""


@dataclass(frozen=True)
class Record:
    """Everything that the page shows.

    Attributes:
        numbers: of claims, by ``Claim.test``.
        composition: of the sweep ``composed``, per cost; ``joint`` its efficient configurations in all costs at once.
    """

    numbers: Mapping[str, Paired] = field(default_factory=dict)
    composition: Sequence[Composed] = ()
    joint: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def load(cls, path: Path = RECORD) -> Record:
        """The inverse of :meth:`save`; empty where there is no file."""
        if not path.is_file():
            return cls()
        data = json.loads(path.read_text())
        return cls(
            {entry["test"]: _read(Paired, entry) for entry in data["claims"]},
            [_composed(part) for part in data["composition"]],
            data["joint"],
        )

    def with_numbers(self, numbers: Mapping[str, Paired]) -> Record:
        """The same with some claims judged anew."""
        return replace(self, numbers={**self.numbers, **numbers})

    def save(self, claims: Sequence[Claim], path: Path = RECORD) -> None:
        """Write the numbers of these claims, each with its sentence, and the composition. Others are forgotten."""
        judged = [
            {
                "method": claim.method,
                "paper": claim.paper,
                "sweep": claim.sweep,
                "claim": claim.claim,
                "test": claim.test,
                "outcome": claim.shows(self.numbers[claim.test]),
                **asdict(self.numbers[claim.test]),
            }
            for claim in claims
            if claim.test in self.numbers
        ]
        data = {"claims": judged, "composition": [asdict(c) for c in self.composition], "joint": list(self.joint)}
        path.write_text(json.dumps(_plain(data), indent=1) + "\n")


def _composed(part: Mapping[str, Any]) -> Composed:
    configurations = [
        replace(c, parts=frozenset(c.parts)) for c in (_read(Configuration, entry) for entry in part["configurations"])
    ]
    gains = [_read(Gain, entry) for entry in part["gains"]]
    return Composed(part["cost"], configurations, gains, part["left_out"])


def _read(kind: Any, entry: Mapping[str, Any]) -> Any:
    """A dataclass from JSON; the inverse of :func:`_plain`."""
    return kind(**{f.name: _number(entry[f.name]) for f in fields(kind) if f.name in entry})


def _number(value: Any) -> Any:
    """null is NaN, and the ends of an unbounded interval are words."""
    return math.nan if value is None else float(value) if value in ("inf", "-inf") else value


def _plain(value: Any) -> Any:
    """JSON types: sets as sorted lists, null for NaN, and words for infinities."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
