"""Methods against each other: error along the ratio, and differences on the same examples at equal compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from isoflop.core.errors import UserError
from isoflop.core.numbers import between, short
from isoflop.dashboards.report import charts
from isoflop.dashboards.report.charts import Json
from isoflop.frontier.paired import Paired, paired
from isoflop.sweep.compression import definitions
from isoflop.sweep.configs import Config, by_scene

TOLERANCE = 0.1  # of the ratio, within which two rows count as equally compressed
MOST_ROWS = 3000  # of a task; scores are compared in Python


def curves(configs: Sequence[Config], palette: Mapping[str, int]) -> list[Json]:
    """Error against compression, a panel per task and model."""
    panels = []
    for task, everything in by_scene(configs).items():
        for model in dict.fromkeys(c.model for c in everything):
            own = [c for c in everything if c.model == model and c.times is not None]
            if len({c.times for c in own}) > 1:
                panels.append(_curve_panel(task, model, own, palette))
    return panels


def _curve_panel(task: str, model: str, configs: Sequence[Config], palette: Mapping[str, int]) -> Json:
    content = []
    for variant in dict.fromkeys(c.variant for c in configs):
        own = sorted((c for c in configs if c.variant == variant), key=lambda c: c.times or 0)
        points = [charts.point(c.times, c.error, c.title, c.low, c.high) for c in own]
        single = len({c.times for c in own}) == len(own)  # several errors at one ratio would draw a zigzag
        content.append(charts.series(variant, palette[variant], points, line=single))
    chart = charts.xy(
        f"{task} on {model}: error against compression ratio",
        charts.axis(f"uncompressed over compressed: {_meaning(configs)}", "×", log=True),
        charts.axis("error", log=charts.spread([c.error for c in configs])),
        content,
    )
    return charts.panel(f"{task} on {model}", chart, f"Compared: {_meaning(configs)}.")


def _meaning(configs: Sequence[Config]) -> str:
    return definitions((c.method, c.compression) for c in configs)


def comparisons(table: pa.Table, configs: Sequence[Config]) -> tuple[list[Json], list[str]]:
    """Per task: every variant against the best one, pair by pair on the same model, repeat and examples.

    Returns:
        The panels, and a reason for every task without one.
    """
    labelled = _label(table, configs)
    panels, missing = [], []
    for task, own in by_scene(configs).items():
        jobs = pa.array([job for c in own for job in c.jobs], pa.string())
        rows = labelled.filter(pc.is_in(labelled["job_id"], jobs))
        variants = list(dict.fromkeys(c.variant for c in own))
        if len(variants) < 2:
            missing.append(f"{task}: all rows are of one method, {variants[0]}")
        elif rows.num_rows > MOST_ROWS:
            missing.append(f"{task}: {rows.num_rows} rows, scores are compared for up to {MOST_ROWS}")
        elif (panel := _comparison_panel(task, rows, variants, reference(own), _meaning(own))) is not None:
            panels.append(panel)
        else:
            missing.append(f"{task}: nothing agrees with the rows of {reference(own)} in model, repeat and ratio")
    return panels, missing


def reference(configs: Sequence[Config]) -> str:
    """What others are compared with: the variant that wins most of the comparisons that can be made.

    A ranking by means over different ratios would reward the variants that were tried at small ratios only, so that each is
    judged where it can be: against all others, on the ratios (within 10 %) that they share.
    """
    compressed = [c for c in configs if not c.uncompressed] or list(configs)
    score: dict[str, float] = {}
    for variant in dict.fromkeys(c.variant for c in compressed):
        wins = 0.0
        for mine in (c for c in compressed if c.variant == variant):
            others = [c for c in compressed if c.variant != variant and c.model == mine.model and _alike(c, mine)]
            wins += sum((c.error > mine.error) - (c.error < mine.error) for c in others)
        score[variant] = wins
    return max(score, key=lambda v: score[v])


def _alike(a: Config, b: Config) -> bool:
    if a.times is None or b.times is None:
        return a.times is b.times
    return abs(a.times - b.times) <= TOLERANCE * max(a.times, b.times)


def _label(table: pa.Table, configs: Sequence[Config]) -> pa.Table:
    """The rows with their variant as a column, and with the ratio that is shown of them."""
    of_job = {job: c for c in configs for job in c.jobs}
    own = [of_job.get(j) for j in table["job_id"].to_pylist()]
    times = pa.array([c.times if c else None for c in own], pa.float64())
    labelled = table.set_column(table.schema.get_field_index("ratio"), "ratio", times)
    return labelled.append_column("variant", pa.array([c.variant if c else None for c in own], pa.string()))


def _comparison_panel(task: str, rows: pa.Table, variants: Sequence[str], best: str, meaning: str) -> Json | None:
    found: list[tuple[str, Paired]] = []
    alone = []
    known = pc.any(pc.is_finite(rows["ratio"])).as_py()
    match = {"model": 0.0, **({"ratio": TOLERANCE} if known else {})}
    for variant in variants:
        if variant == best:
            continue
        try:
            found.append((variant, paired(rows, _is(variant), _is(best), match)))
        except UserError:
            alone.append(variant)
    if not found:
        return None
    found.sort(key=lambda pair: pair[1].difference)
    chart = charts.forest(
        f"{task}: difference of error to {best}, same examples",
        charts.axis(f"error minus that of {best}"),
        [
            {"label": v, "value": p.difference, "low": p.low, "high": p.high, "text": f"{p.verdict}, {p.pairs} pairs"}
            for v, p in found
        ],
    )
    head = ["variant", "error", "reference's", "difference", "95 % interval", "pairs", "repeats", "verdict"]
    body = [
        [v, short(p.a), short(p.b), short(p.difference), between(p.low, p.high), p.pairs, p.repeats, p.verdict]
        for v, p in found
    ]
    text = (
        f"Against {best}, which wins most comparisons with others at like ratios: on the same model, repeat and examples, "
        f"{f'at ratios ({meaning}) within {TOLERANCE:.0%} of each other' if known else 'at ratios that are not known'}. "
        "Filled marks: the interval does not hold zero."
    )
    if alone:
        text += f" Not comparable with it at any ratio: {', '.join(alone)}."
    return charts.panel(task, chart, text, table=charts.table(head, body))


def _is(variant: str) -> str:
    quoted = variant.replace("'", "''")
    return f"variant = '{quoted}'"
