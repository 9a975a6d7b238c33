"""The errors of a task as a table: a line or a column per setting of each method, never a mean that is not called one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isoflop.cli.common import grid, show
from isoflop.core.hook import names_of
from isoflop.core.knobs import shown
from isoflop.methods.base import METHODS
from isoflop.sweep.compression import definitions

if TYPE_CHECKING:
    from isoflop.sweep.configs import Config

_MAX_COLUMNS, _MAX_ROWS = 8, 60


@dataclass(frozen=True)
class Setting:
    """A method at one of its settings.

    Attributes:
        amount: how much that leaves, the number to sort by; ``at`` says it with its unit: V where that is what varies, else the
            ratio, else the bits.
        knobs: those that vary among the method's settings.
        alike: other settings of the method leave the same amount, so that only ``knobs`` tell them apart.
    """

    method: str
    amount: float
    at: str
    knobs: str = ""
    alike: bool = False

    @property
    def label(self) -> str:
        """The amount; with the knobs where these are needed."""
        return " ".join(part for part in (self.at, self.knobs if self.alike else "") if part)


def print_errors(out: Console, table: pa.Table, task: str) -> None:
    """Error per model and setting of a method, mean over repeats.

    A row per model where the settings fit beside each other, else a row per setting. Where even these are too many, settings that
    leave equal amounts share a line, which says of how many its numbers are means.
    """
    from isoflop.sweep.configs import read_configs

    configs = [c for c in read_configs(table) if c.task == task]
    if not configs:
        return
    settings = _settings(configs)
    if len(set(settings)) > _MAX_ROWS:
        settings = [Setting(s.method, s.amount, s.at) for s in settings]
    cells: dict[tuple[str, Setting], list[float]] = {}
    for c, setting in zip(configs, settings, strict=True):
        cells.setdefault((_name(c), setting), []).append(c.error)
    models = list(dict.fromkeys(_name(c) for c in sorted(configs, key=lambda c: (c.N or 0, c.model))))
    rows = sorted(set(settings), key=lambda s: (s.method, s.amount, s.knobs))
    shown_table, left = _fitted(out, models, rows, cells, configs)
    out.print(Text(f"{task}: error{_whose(rows)}{_repeats(configs)}", style="bold"))
    out.print(shown_table)
    for note in _notes(configs, rows, cells):
        out.print(Text(note, style="dim"))
    if left:
        out.print(Text(f"… and {left} more settings: isoflop show {table['sweep'][0].as_py()} --rows", style="dim"))
    out.print()


def _settings(configs: Sequence[Config]) -> list[Setting]:
    """The setting of each configuration; knobs are named where the amount does not tell all of a method's settings apart."""
    by_method: dict[str, list[int]] = {}
    for i, c in enumerate(configs):
        by_method.setdefault(c.method, []).append(i)
    found: dict[int, Setting] = {}
    for method, mine in by_method.items():
        own = [configs[i] for i in mine]
        keys = [_key(c) for c in own]
        for i, setting in zip(mine, _of_method(method, own, keys), strict=True):
            found[i] = setting
    return [found[i] for i in range(len(configs))]


def _of_method(method: str, own: Sequence[Config], keys: Sequence[str]) -> list[Setting]:
    amounts = _amounts(own, keys)
    at_of: dict[str, tuple[float, str]] = {}
    for key in dict.fromkeys(keys):
        values = sorted({a for a, k in zip(amounts[0], keys, strict=True) if k == key and a is not None})
        at_of[key] = (values[0], _span(values, amounts[1])) if values else (0.0, "")
    told_apart = len({at for _, at in at_of.values()}) == len(at_of)
    knobs = {key: _knobs(c) for c, key in zip(own, keys, strict=True)}
    return [Setting(method, *at_of[key], knobs[key], not told_apart) for key in keys]


def _amounts(own: Sequence[Config], keys: Sequence[str]) -> tuple[list[float | None], str]:
    """What tells most of a method's settings apart, of V, ratio and bits, in this order; and how it is written.

    V comes last for a method that does not set it: it would be the model's, whatever the method does.
    """
    choices: list[tuple[list[float | None], str]] = [
        ([_rounded(c.V) or None for c in own], "V={}"),
        ([_rounded(c.times) for c in own], "{} ×"),
        ([_rounded(c.bits) for c in own], "{} bits"),
    ]
    if not _sets_tokens(own[0].method):
        choices = [*choices[1:], choices[0]]
    known = [choice for choice in choices if all(v is not None for v in choice[0])]
    return max(known, key=lambda choice: _levels(choice[0], keys)) if known else ([None] * len(own), "")


def _sets_tokens(method: str) -> bool:
    """Whether some method of a composition decides how many tokens of a picture there are, as far as is known here."""
    names = method.split("+")
    return any(
        name not in METHODS or {"visual_tokens", "vision_blocks"} & set(names_of(METHODS.get(name).hooks))
        for name in names
    )


def _levels(values: Sequence[float | None], keys: Sequence[str]) -> int:
    """How many values there are among settings, those that differ between models only not counted."""
    first: dict[str, float | None] = {}
    for key, value in zip(keys, values, strict=True):
        first.setdefault(key, value)
    return len(set(first.values()))


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _span(values: Sequence[float], text: str) -> str:
    ends = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}…{values[-1]:g}"
    return text.format(ends)


def _key(c: Config) -> str:
    """Names a setting of a method, whatever the model; options of models tell these apart."""
    return json.dumps({k: v for k, v in c.settings.items() if not k.startswith("model.")}, sort_keys=True, default=str)


def _knobs(c: Config) -> str:
    return " ".join(f"{k}={shown(v)}" for k, v in c.settings.items() if not k.startswith("model."))


def _name(c: Config) -> str:
    return f"{c.model} (N {show(int(c.N))})" if c.N else c.model


def _fitted(
    out: Console,
    models: Sequence[str],
    settings: Sequence[Setting],
    cells: dict[tuple[str, Setting], list[float]],
    configs: Sequence[Config],
) -> tuple[Table, int]:
    """The table in the form that fits, and how many settings it leaves out."""
    one = len({s.method for s in settings}) == 1
    heads = [s.label if one else f"{s.method} {s.label}".strip() for s in settings]
    sizes = {_name(c): (c.model, int(c.N) if c.N else None) for c in configs}
    body = [(*sizes[m], *(_cell(cells.get((m, s))) for s in settings)) for m in models]
    wide = grid(("model", "N", *heads), body, right=("N", *heads))
    endless = out.options.update(width=10_000)  # else what does not fit is measured as if it did
    if len(settings) <= _MAX_COLUMNS and out.measure(wide, options=endless).maximum <= out.width:
        return wide, 0
    chosen = settings[:_MAX_ROWS]
    knobs = any(s.knobs and (s.alike or not s.at.startswith("V=")) for s in chosen)
    lines = [
        (s.method, s.at, *((s.knobs,) if knobs else ()), *(_cell(cells.get((m, s))) for m in models)) for s in chosen
    ]
    heads = ["method", "at", *(("knobs",) if knobs else ())]
    return grid((*heads, *models), lines, right=models), len(settings) - len(chosen)


def _cell(errors: Sequence[float] | None) -> str:
    if not errors:
        return "-"
    mean = f"{sum(errors) / len(errors):.3f}"
    return mean if len(errors) == 1 else f"{mean} (mean of {len(errors)})"


def _whose(settings: Sequence[Setting]) -> str:
    methods = {s.method for s in settings}
    return f" of {next(iter(methods))}" if len(methods) == 1 else ""


def _repeats(configs: Sequence[Config]) -> str:
    counts = sorted({c.repeats for c in configs})
    if counts == [1]:
        return ""
    return (
        f", mean over {counts[0]} repeats" if len(counts) == 1 else f", mean over {counts[0]} to {counts[-1]} repeats"
    )


def _notes(
    configs: Sequence[Config], settings: Iterable[Setting], cells: dict[tuple[str, Setting], list[float]]
) -> list[str]:
    notes = []
    ratios = {s.method for s in settings if s.at.endswith("×")}
    if ratios:
        meaning = definitions((c.method, c.compression) for c in configs if c.method in ratios)
        notes.append(f"×: uncompressed over compressed, {meaning}")
    if any(len(errors) > 1 for errors in cells.values()):
        notes.append("mean of n: over n settings of other knobs")
    return notes
