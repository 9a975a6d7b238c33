"""Where rows come from: a table at hand, a file (CSV, Parquet, Arrow, JSON) or a sweep by its name.

Laws and frontiers are functions of tables and know neither files nor stores. What people call (``isoflop.fit``, the commands)
takes any of the three.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.frontier import pareto as _pareto
from isoflop.laws import compare as _compare
from isoflop.laws import fit as _fit
from isoflop.laws.table import as_table
from isoflop.sweep.asking import answers as _answers
from isoflop.sweep.results import usable

if TYPE_CHECKING:
    from isoflop.sweep.api import SweepResults  # slow to load, and a table needs none of it

READERS = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".json", ".jsonl")
_SEPARATORS = (";", "\t", "|", ",")
_HEADER = 65_536  # bytes in which a header ends

P = ParamSpec("P")
R = TypeVar("R")


def open_source(source: str | Path, store: str | None = None, separator: str | None = None) -> pa.Table | SweepResults:
    """The table of a file, or the sweep of that name.

    Args:
        store: of the sweep.
        separator: of a CSV file's columns.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:  # longer than a name can be, or with a zero byte in it
        if suffix in READERS:
            raise UserError(f"{source}: {getattr(error, 'strerror', None) or error}".lower()) from None
        there = False
    if there:
        return read_file(path, separator)
    if suffix in READERS:
        raise UserError(f"{source}: {'is a folder' if path.is_dir() else 'no such file'}")
    from isoflop.sweep.api import open_sweep

    return open_sweep(str(source), store)


def read_source(
    source: str | Path, store: str | None = None, where: str | None = None, separator: str | None = None
) -> pa.Table:
    """The rows behind a path or a sweep's name. UserError when these would mix the tasks of a sweep."""
    opened = open_source(source, store, separator)
    return opened if isinstance(opened, pa.Table) else sweep_rows(opened, where)


def sweep_rows(opened: SweepResults, where: str | None = None) -> pa.Table:
    """The finished jobs of a sweep; UserError when it has several tasks and nothing chooses among them."""
    table = as_table(usable(opened.results()))
    tasks = sorted(set(table["task"].to_pylist()))
    if len(tasks) > 1 and where is None:
        raise UserError(
            f"sweep {opened.name!r} has the tasks {', '.join(tasks)}, which one law does not describe; "
            f"choose with --where \"task = '{tasks[0]}'\""
        )
    return table


def read_file(path: Path, separator: str | None = None) -> pa.Table:
    """A file as a table; anything without a known ending is taken for CSV.

    Raises:
        UserError: naming the file, in one line.
    """
    import pyarrow.feather
    import pyarrow.json
    import pyarrow.parquet

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return as_table(pyarrow.parquet.read_table(path))
        if suffix in (".arrow", ".feather"):
            return as_table(pyarrow.feather.read_table(path))
        if suffix in (".json", ".jsonl"):
            return as_table(pyarrow.json.read_json(path))
        return as_table(_read_csv(path, separator if separator is not None else "\t" if suffix == ".tsv" else ","))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: cannot be read ({reason})") from None


def _read_csv(path: Path, separator: str) -> pa.Table:
    """A CSV file; blanks around the header's names are no part of them."""
    import pyarrow.csv

    if len(separator) != 1 or not separator.isascii() or separator in "\"'\r\n\0":
        raise UserError(f"separator {separator!r}: allowed: one character, such as ';'")
    with path.open("rb") as file:
        header = file.readline(_HEADER)
    if separator.encode() not in header:
        found = [s for s in _SEPARATORS if s.encode() in header and s != separator]
        if found and path.suffix.lower() not in (".gz", ".bz2", ".zst", ".lz4", ".br"):
            raise UserError(
                f"one column, {header.decode(errors='replace').strip()[:60]!r}: the columns seem to be separated by "
                f"{found[0]!r}; give --separator {found[0]!r}"
            )
    table = pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(delimiter=separator))
    return table.rename_columns([name.strip() for name in table.column_names])


def _of_any_source(function: Callable[P, R], method: str = "") -> Callable[P, R]:
    """A function of a table as one of a table, a file's path, an opened sweep, or a sweep's name.

    Args:
        method: what a sweep has of its own that does the same, with the YAML's block for what is not given.
    """

    names = list(inspect.signature(function).parameters)

    @wraps(function)
    def call(*given: P.args, **options: P.kwargs) -> R:
        asked: dict[str, Any] = {**dict(zip(names, given, strict=False)), **options}
        source = asked.pop(names[0], None)
        if isinstance(source, (str, Path)):
            source = open_source(source)
        if _is_sweep(source):
            if method:
                return cast(R, getattr(source, method)(**asked))
            source = sweep_rows(source, asked.get("where"))
        return cast(Callable[..., R], function)(source, **asked)

    call.__doc__ = (function.__doc__ or "").replace(
        "table: Arrow table, pandas DataFrame or dict of columns.",
        "table: Arrow table, pandas DataFrame, dict of columns, path of a CSV, Parquet, Arrow or JSON file, or a sweep "
        "(its name, or what ``isoflop.open`` gives).",
    )
    return call


def _is_sweep(source: Any) -> bool:
    api = sys.modules.get("isoflop.sweep.api")  # whoever opened a sweep has loaded it
    return api is not None and isinstance(source, api.SweepResults)


fit = _of_any_source(_fit, "fit")
compare = _of_any_source(_compare)
pareto = _of_any_source(_pareto, "pareto")
answers = _of_any_source(_answers, "answers")
