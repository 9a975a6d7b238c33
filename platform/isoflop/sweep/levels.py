"""Which rows of a table from elsewhere are one setting: levels of a ratio or a cost, as against noise in measuring it.

A table may say of a method no more than ``ratio``: 2, 4 and 8 are three settings of it. Where ratios are measured per example,
3.9, 4.0 and 4.1 are one. Rows that bear one name (repeat and example) cannot be of one setting; values that are apart by more
than a tenth are levels, unless they are of different examples: then it is the examples that differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

COLUMNS = ("ratio", "bits", "V", "N", "weight_bytes", "kv_bytes", "bytes", "flops")
"""What a setting shows in, in the order in which it is looked for."""
LAST = "seconds"
"""What is looked at where a table has nothing else: time is noisy."""
_GAP, _NOISY_GAP = 1.1, 1.5


def split(
    members: Sequence[int], numbers: Mapping[str, Any], repeats: Sequence[str | None] | None, examples: Sequence[str | None] | None
) -> list[tuple[dict[str, float], list[int]]]:  # fmt: skip
    """Rows of one method without other settings, as (its levels by column, its rows) per setting.

    Args:
        members: rows of the table.
        numbers: columns by name, NaN where nothing is known.
        repeats, examples: names by row; None where the table has none.
    """
    found: list[tuple[dict[str, float], list[int]]] = [({}, list(members))]
    for name in [n for n in COLUMNS if n in numbers] or [n for n in (LAST,) if n in numbers]:
        found = [
            (level | more, rows)
            for level, own in found
            for more, rows in _by_column(own, name, numbers[name], repeats, examples)
        ]
    return found


def clash(members: Sequence[int], repeats: Sequence[str | None] | None, examples: Sequence[str | None] | None) -> bool:
    """Whether rows bear no name, or one name twice: they are not known to be of one setting."""
    if repeats is None and examples is None:
        return True
    return len({_name(i, repeats, examples) for i in members}) < len(members)


def _name(i: int, *columns: Sequence[str | None] | None) -> Hashable:
    return tuple(None if c is None else c[i] for c in columns)


def _by_column(
    members: list[int], name: str, values: Any, repeats: Sequence[str | None] | None, examples: Sequence[str | None] | None
) -> list[tuple[dict[str, float], list[int]]]:  # fmt: skip
    known = [i for i in members if np.isfinite(values[i])]
    levels: list[list[int]] = []
    if known:
        levels = _levels(known, values, _NOISY_GAP if name == LAST else _GAP, repeats, examples)
    if len(levels) < 2:
        return [({}, members)]
    out = [({name: float(f"{np.mean(values[rows]):.6g}")}, rows) for rows in levels]
    unknown = [i for i in members if not np.isfinite(values[i])]
    return out + [({}, unknown)] * bool(unknown)


def _levels(
    known: list[int], values: Any, gap: float, repeats: Sequence[str | None] | None, examples: Sequence[str | None] | None
) -> list[list[int]]:  # fmt: skip
    exact: dict[float, list[int]] = {}
    for i in sorted(known, key=lambda i: (values[i], i)):
        exact.setdefault(float(values[i]), []).append(i)
    named = repeats is not None or examples is not None
    if named and clash(known, repeats, examples) and _alike(list(exact.values()), repeats, examples):
        return list(exact.values())
    apart: list[list[int]] = []
    last = -np.inf
    for value, rows in exact.items():
        if not apart or value > max(last * gap, last):
            apart.append([])
        apart[-1] += rows
        last = value
    if not named:  # a chain of near values is no noise: it leads from one setting to another
        return [part for rows in apart for part in _unchained(rows, values, gap)]
    constant = all(len(rows) > 1 and len({float(values[i]) for i in rows}) == 1 for rows in apart)
    if examples is not None and not constant and not _alike(apart, examples):
        return [known]
    return apart


def _unchained(rows: list[int], values: Any, gap: float) -> list[list[int]]:
    own = values[rows]
    if own.max() <= own.min() * gap**2:
        return [rows]
    return [[i for i in rows if values[i] == value] for value in dict.fromkeys(own.tolist())]


def _alike(levels: Sequence[Sequence[int]], *columns: Sequence[str | None] | None) -> bool:
    """Whether each level has more than half of all names: so have settings, and not noise."""
    names = [{_name(i, *columns) for i in rows} for rows in levels]
    return all(2 * len(own) > len(set.union(*names)) for own in names)
