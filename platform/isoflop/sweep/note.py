"""What MLflow shows as the description of a sweep's parent run: Markdown, written at the start and anew at the end.

Targets like ``artifact:report.html`` and ``runs:jobs`` become addresses inside MLflow when the run is known
(:mod:`isoflop.track.links`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isoflop.sweep.results import Findings
from isoflop.sweep.spec import SweepSpec
from isoflop.track import Artifact

if TYPE_CHECKING:
    from isoflop.frontier.result import Frontier

_MOST = 7600  # characters; MLflow keeps 8,000, and the addresses are longer than what stands for them
_DIGITS = 3


@dataclass(frozen=True)
class Conclusion:
    """What a room above this one has to say of a session that has ended.

    Attributes:
        headline: the main results, a clause each.
        artifacts: files for the parent run.
        path: where the report was written.
    """

    headline: tuple[str, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    path: str = ""


def opening(spec: SweepSpec, dashboard: str = "") -> str:
    """The description while the sweep runs.

    Args:
        dashboard: address of Ray's dashboard; empty where none runs.
    """
    parts = [_plain(spec.description)] if spec.description else []
    parts.append("The sweep is running; its laws and its frontier will stand here at its end.")
    parts.append(_links([("jobs", "runs:jobs"), ("YAML", "artifact:sweep.yaml"), ("Ray dashboard", dashboard)]))
    return "\n\n".join(parts)


def closing(spec: SweepSpec, findings: Findings, conclusion: Conclusion, dashboard: str = "") -> str:
    """The description of a sweep whose session has ended: links, results in a sentence, laws, frontiers."""
    report = [("**report**", f"artifact:{a.path}") for a in conclusion.artifacts if a.path.endswith(".html")]
    files = [("laws", "artifact:laws.json"), ("YAML", "artifact:sweep.yaml"), ("Ray dashboard", dashboard)]
    # the links first: MLflow folds what is longer than a few lines
    head = [_links([*report, ("jobs", "runs:jobs"), ("best jobs", "runs:best"), *files])]
    head += [f"- {_plain(clause)}" for clause in conclusion.headline]
    head += [_plain(spec.description)] if spec.description else []
    return _fitted("\n\n".join(head), _law_blocks(findings) + _frontier_blocks(findings))


def _law_blocks(findings: Findings) -> list[str]:
    blocks = []
    for law in findings.laws:
        blocks += [f"**law {law.block.law}**: {_plain(law.problem)}"] if law.problem else []
        blocks += [f"```\n{fit}\n```" for fit in law.fits]
    return blocks


def _frontier_blocks(findings: Findings) -> list[str]:
    blocks = []
    for found in findings.frontiers:
        blocks += [f"**frontier**: {_plain(found.problem)}"] if found.problem else []
        blocks += [_table(frontier) for frontier in found.frontiers]
    return blocks


def _table(frontier: Frontier) -> str:
    heads, rows, notes = frontier_rows(frontier)
    lines = [f"**{_plain(frontier_title(frontier))}**", "", _row(heads), _row(["---"] * len(heads))]
    lines += [_row([_plain(cell) for cell in row]) for row in rows]
    return "\n".join(lines + [f"\n{note}" for note in notes])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _links(pairs: Sequence[tuple[str, str]]) -> str:
    return " · ".join(f"[{text}]({target})" for text, target in pairs if target)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: names like ``a_b_c`` and formulas like ``2*N`` would turn into emphasis."""
    for character in "\\`*_[]<>|":
        text = text.replace(
            character, "\\" + character if character not in "<>" else {"<": "&lt;", ">": "&gt;"}[character]
        )
    return " ".join(text.split())


def _fitted(head: str, blocks: Sequence[str]) -> str:
    """The head and as many whole blocks as MLflow keeps; says how many are left out."""
    text, left = head[:_MOST], len(blocks)
    for block in blocks:
        if len(text) + len(block) > _MOST - 100:
            break
        text, left = f"{text}\n\n{block}", left - 1
    return f"{text}\n\n{left} more laws and frontiers: [laws.json](artifact:laws.json)" if left else text


def frontier_title(frontier: Frontier) -> str:
    """Group, law, cost and constants in one line."""
    group = ", ".join(f"{k} {v}" for k, v in frontier.key.items())
    constants = "".join(f", {k}={v:g}" for k, v in frontier.constants.items())
    return f"frontier{' of ' + group if group else ''}: {frontier.law}, cost {frontier.cost}{constants}"


def frontier_rows(frontier: Frontier) -> tuple[list[str], list[list[str]], list[str]]:
    """A frontier as a table for people: a line per budget with the optimum that the law supports, and its intervals, and
    the best of the models at hand.

    Returns:
        Heads, rows and footnotes.
    """
    names = list(frontier.points[0].continuous) if frontier.points else []
    heads = ["budget", *(f"{n}*" for n in names), "law's error", "at hand", "says", "seen", "agree"]
    rows, notes = [], []
    for point in frontier.points:
        best = point.discrete[0] if point.discrete else None
        far = any(d > 0 for d in point.extrapolation.values())
        rows.append(
            [
                f"{_brief(point.budget)}{' °' if far else ''}",
                *(_short(point.continuous[n].value, point.continuous[n].interval) for n in names),
                _short(point.error.value, point.error.interval),
                " ".join(f"{k}={_whole(v)}" for k, v in best.x.items()) if best else "-",
                f"{best.error.value:.{_DIGITS}g}" if best else "-",
                "-" if point.choice_measured is None else f"{point.choice_measured:.{_DIGITS}g}",
                f"{best.probability:.0%}" if best and best.probability is not None else "-",
            ]
        )
        notes += ["° beyond the sizes in the data: an extrapolation"] if far else []
    if any(point.discrete for point in frontier.points):
        notes.append(
            "at hand: of what was swept, what the law says is best; seen: what was measured there; agree: of resamples"
        )
    notes += [frontier.cost_note] if frontier.cost_note else []
    notes += [*_misses(frontier), *_contradictions(frontier)]
    return heads, rows, list(dict.fromkeys(notes))


def _misses(frontier: Frontier) -> list[str]:
    """Where the law is far from what its own choice measured, a line per configuration."""
    found: dict[str, None] = {}
    for point in frontier.points:
        if point.missed is not None:
            best = point.discrete[0]
            where = " ".join(f"{k}={_whole(v)}" for k, v in best.x.items())
            found[f"! {where}: the law says {best.error.value:.{_DIGITS}g}, measured {point.missed:.{_DIGITS}g}"] = None
    return list(found)


def _contradictions(frontier: Frontier) -> list[str]:
    """Where the rows speak against the law's choice, a line per pair of configurations."""
    found: dict[str, list[str]] = {}
    for point in frontier.points:
        m = point.measured
        if m is not None and point.contradicted:
            theirs, ours = (" ".join(f"{k}={_whole(v)}" for k, v in x.items()) for x in (point.discrete[0].x, m.x))
            text = f"{ours} costs no more than {theirs} and measured {m.error:.{_DIGITS}g}, not {m.choice_error:.{_DIGITS}g}"
            text += m.caveat
            found.setdefault(text, []).append(_brief(point.budget))
    return [f"! at {', '.join(budgets)}: {text}" for text, budgets in found.items()]


def _whole(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def _brief(value: float) -> str:
    """``8.35e4``: a table of frontiers is wide enough without the rest of the exponent."""
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{value:.{_DIGITS}g}")


def _short(value: float, interval: tuple[float, float] | None) -> str:
    """A value, with its interval when that is wider than the digits shown."""
    text = _brief(value)
    if interval is None or None in interval or f"{interval[0]:.3g}" == f"{interval[1]:.3g}":
        return text
    return f"{text} ({interval[0]:.2g}…{interval[1]:.2g})"
