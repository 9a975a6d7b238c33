"""Which published orderings show at small scale: the claims, their test on real rows, and the page about them.

``claims.yaml`` says, method by method, what its paper leads one to expect and which rows of which sweep would show it.
``make outcomes`` runs those sweeps (or finds them done), tests every claim on paired examples and writes
``outcomes.json`` and ``outcomes.md`` anew, with the joint frontier of the composed sweep. A claim that does not show is
kept, with its numbers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from isoflop.core.errors import UserError
from isoflop.frontier.composition import Composed, Configuration
from isoflop.frontier.paired import Paired, paired

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Claim:
    """One expectation.

    Attributes:
        method, paper: what is judged.
        sweep: name of the sweep whose rows are compared (``sweeps/<sweep>.yaml``).
        claim: the expectation in one sentence: a has less error than b.
        a, b: SQL conditions on the rows; ``knobs->>'name'`` reads a knob.
        match: columns that must agree, with the share by which numbers may differ.
        expect: ``better``; ``worse`` for a control that must lose; ``equal`` where a must not lose more than ``margin``.
        margin: for ``equal``.
        why: the likely reason where it does not show, for people.
    """

    method: str
    paper: str
    sweep: str
    claim: str
    a: str
    b: str
    match: dict[str, float] = field(default_factory=dict)
    expect: str = "better"
    margin: float = 0.0
    why: str = ""

    def shows(self, result: Paired) -> str:
        """``shows``, ``not separated`` or ``reversed``."""
        if self.expect == "equal":
            return (
                "shows" if result.high <= self.margin else "reversed" if result.low > self.margin else "not separated"
            )
        if result.verdict == self.expect:
            return "shows"
        return "not separated" if result.verdict == "not separated" else "reversed"


def load_claims(path: Path = HERE / "claims.yaml") -> list[Claim]:
    """The claims of a file. Raises UserError naming the entry that is wrong."""
    entries = yaml.safe_load(path.read_text())
    claims = []
    for number, entry in enumerate(entries, 1):
        try:
            claim = Claim(**entry)
        except TypeError as error:
            raise UserError(f"{path}: entry {number} ({entry.get('claim', '?')}): {error}") from None
        if claim.expect not in ("better", "worse", "equal"):
            raise UserError(f"{path}: entry {number}: expect = {claim.expect!r}; allowed: better, worse, equal")
        claims.append(claim)
    return claims


def judge(claims: Sequence[Claim], rows_of: Callable[[str], pa.Table]) -> list[dict[str, Any]]:
    """Every claim with its numbers.

    Args:
        rows_of: the finished rows of a sweep by its name.
    """
    found = []
    for claim in claims:
        match = {"model": 0.0, **claim.match}
        result = paired(rows_of(claim.sweep), claim.a, claim.b, match)
        found.append({**asdict(claim), "outcome": claim.shows(result), **asdict(result)})
    return found


def page(judged: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown."""
    lines = [
        "# Outcomes at small scale",
        "",
        "Written by `make outcomes`; do not edit. Errors are means over matched runs; the difference is that of the same",
        "examples, with a 95 % interval over repeats and examples. Tiny models trained on the spot, on a laptop's CPU: an",
        "ordering that shows here says that the method does what its paper says, not that it would win at scale, and one",
        "that does not show says as much about the scale as about the method.",
    ]
    for method in dict.fromkeys(entry["method"] for entry in judged):
        own = [entry for entry in judged if entry["method"] == method]
        lines += ["", f"## {method} ({own[0]['paper']})", ""]
        lines += [
            "| claim | outcome | error a | error b | difference [95 %] | pairs | sweep |",
            "|---|---|---|---|---|---|---|",
        ]
        for e in own:
            lines.append(
                f"| {e['claim']} | **{e['outcome']}** | {e['a']:.4f} | {e['b']:.4f} | "
                f"{e['difference']:+.4f} [{e['low']:+.4f}, {e['high']:+.4f}] | {e['pairs']} in {e['repeats']} repeats | {e['sweep']} |"
            )
        lines += [f"\n{e['claim']}: {e['why']}" for e in own if e["why"] and e["outcome"] != "shows"]
    return "\n".join(lines) + "\n"


def composition_page(composed: Sequence[Composed], joint: Sequence[Mapping[str, Any]] = ()) -> str:
    """The composed sweep in Markdown: joint frontiers, and what each combination gains over its parts."""
    lines = [
        "## Combining methods",
        "",
        "Visual tokens (mqt), KV cache (zipcache) and weights (bitstack), alone and together, in the sweep `composed`. Means over",
        "repeats. The gain at an accepted error is the cost of the cheapest configuration of the combination's parts (each",
        "alone, every smaller combination, the uncompressed model) over that of the combination: above 1, combining is cheaper.",
    ]
    for part in composed:
        for model, task in dict.fromkeys((c.model, c.task) for c in part.configurations):
            lines += _joint_frontier(part, model, task)
        lines += [f"\nLeft out, because a repeat is missing: {name}." for name in part.left_out]
    for model, task in dict.fromkeys((entry["model"], entry["task"]) for entry in joint):
        count = Counter(entry["method"] for entry in joint if (entry["model"], entry["task"]) == (model, task))
        lines += [
            f"\n### {model}, {task}: error, bytes and FLOPs at once",
            "",
            f"{count.total()} configurations are beaten by no other in all three: "
            + ", ".join(f"{number} of {method}" for method, number in count.most_common())
            + ".",
        ]
    return "\n".join(lines) + "\n"


def _joint_frontier(part: Composed, model: str, task: str) -> list[str]:
    """Frontier and gains of one model and task in one cost."""
    gains = [g for g in part.gains if (g.model, g.task) == (model, task)]
    lines = [
        f"\n### {model}, {task}: error against {part.cost}",
        "",
        f"| frontier | knobs | {part.cost} | error |",
        "|---|---|---|---|",
    ]
    for c in part.frontier:
        if (c.model, c.task) == (model, task):
            lines.append(f"| {c.method} | {_swept(c, part)} | {c.cost:,.0f} | {c.error:.4f} |")
    lines += [
        "",
        f"| combination | accepted error | its {part.cost} | its parts' | gain [95 %] |",
        "|---|---|---|---|---|",
    ]
    for g in gains:
        if math.isfinite(g.factor):
            interval = f" [{g.low:.3f}, {g.high:.3f}]" if math.isfinite(g.low) else " (no interval)"
            lines.append(
                f"| {g.method} | {g.accepted:.3f} | {g.cost:,.0f} | {g.alone:,.0f} | {g.factor:.3f}{interval} |"
            )
    for method in dict.fromkeys(g.method for g in gains):
        missed = [f"{g.accepted:.3f}" for g in gains if g.method == method and not math.isfinite(g.factor)]
        if missed:
            lines.append(f"\n{method}: no configuration within an error of {', '.join(missed)}.")
    return lines


def _swept(configuration: Configuration, composed: Composed) -> str:
    """The knobs that differ between the configurations of the same methods."""
    mine = json.loads(configuration.knobs)
    others = [json.loads(c.knobs) for c in composed.configurations if c.method == configuration.method]
    return ", ".join(f"{name} {value}" for name, value in mine.items() if len({str(o.get(name)) for o in others}) > 1)


def write(
    judged: Sequence[dict[str, Any]],
    composed: Sequence[Composed],
    joint: Sequence[Mapping[str, Any]],
    folder: Path = HERE,
) -> None:
    """``outcomes.json`` and ``outcomes.md``."""
    data = {"claims": list(judged), "composition": [asdict(part) for part in composed], "joint": list(joint)}
    (folder / "outcomes.json").write_text(json.dumps(_plain(data), indent=1) + "\n")
    (folder / "outcomes.md").write_text(page(judged) + "\n" + composition_page(composed, joint))


def _plain(value: Any) -> Any:
    """JSON types: sets as sorted lists, and null for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
