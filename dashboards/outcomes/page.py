"""The outcomes page in Markdown."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from isoflop.dashboards.outcomes.claims import Claim
from isoflop.dashboards.outcomes.record import PERCENTILE, Record
from isoflop.frontier.composition import Composed, Configuration
from isoflop.frontier.paired import ERROR, EXAMPLES, Paired

_DAGGER = (
    "† Judged by an older percentile bootstrap over repeats and examples. With three repeats such an interval covers about 80 %\n"
    "instead of 95 %; take an outcome for certain only where 0 is far outside."
)
OUTCOMES = ("shows", "not separated", "reversed")


def page(claims: Sequence[Claim], record: Record) -> str:
    """Claims with their numbers, method by method, and what combining methods gains."""
    lines = [
        "# Outcomes at small scale",
        "",
        "Written by `make outcomes`; do not edit. Errors are means over matched runs; the difference is that of the same",
        "examples, with a 95 % interval, Student's over repeats; *over examples* where a sweep has one repeat because nothing",
        "in it is random. Most models are tiny and trained on the spot, on a laptop's CPU: an ordering that shows here says that",
        "the method does what its paper says, not that it would win at scale, and one that does not show says as much about the",
        "scale as about the method.",
        "",
        *_summary(claims, record),
    ]
    if any(c.test in record.numbers and record.numbers[c.test].interval == PERCENTILE for c in claims):
        lines += ["", _DAGGER]
    for heading in dict.fromkeys(claim.heading for claim in claims):
        own = [claim for claim in claims if claim.heading == heading]
        lines += ["", *_head(own[0]), ""]
        lines += [
            "| claim | outcome | error a | error b | difference [95 %] | pairs | sweep |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_row(claim, record.numbers.get(claim.test)) for claim in own]
        for claim in own:
            numbers = record.numbers.get(claim.test)
            if claim.why and numbers is not None and claim.shows(numbers) != "shows":
                lines.append(f"\n{claim.claim}: {claim.why}")
    return "\n".join(lines) + "\n\n" + composition_page(record.composition, record.joint)


def _head(claim: Claim) -> list[str]:
    """The heading under which a claim stands, and what is to be known of all beneath it."""
    if claim.section is None:
        return [f"## {claim.method} ({claim.paper})"]
    return [f"## {claim.section.title}", *(["", claim.section.about] if claim.section.about else [])]


def _summary(claims: Sequence[Claim], record: Record) -> list[str]:
    """How many claims of each method or section show, as a table."""
    lines = ["| method | shows | not separated | reversed |", "|---|---|---|---|"]
    for heading in dict.fromkeys(claim.heading for claim in claims):
        own = [(c, record.numbers[c.test]) for c in claims if c.heading == heading and c.test in record.numbers]
        count = Counter(claim.shows(numbers) for claim, numbers in own)
        lines.append(f"| {heading} | " + " | ".join(str(count[k] or "") for k in OUTCOMES) + " |")
    return lines


def _row(claim: Claim, numbers: Paired | None) -> str:
    """A claim's line of the table; a column other than the error is named."""
    sentence = claim.claim if claim.y == ERROR else f"{claim.claim} (compared: {claim.y})"
    if numbers is None:
        return f"| {sentence} | not judged | | | | | {claim.sweep} |"
    ends = f"[{numbers.low:+.4f}, {numbers.high:+.4f}]" if math.isfinite(numbers.low) else "(one repeat: no interval)"
    difference = f"{numbers.difference:+.4f} {ends}" + ("†" if numbers.interval == PERCENTILE else "")
    if numbers.interval == EXAMPLES:
        pairs = f"{numbers.pairs}, over {numbers.examples} examples"
    else:
        pairs = f"{numbers.pairs} in {numbers.repeats} repeats"
    return (
        f"| {sentence} | **{claim.shows(numbers)}** | {numbers.a:.4f} | {numbers.b:.4f} | "
        f"{difference} | {pairs} | {claim.sweep} |"
    )


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
