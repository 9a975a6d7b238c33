"""Rows of a user's own data: what is read, in which form, and what names an example.

An example is named by its content, so that its number stays when files are renamed, split into other shards or put in
another order; the data as a whole are named by all of their examples, and enter the ids of jobs by that name.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from isoflop.core.errors import UserError, unknown
from isoflop.core.public import local_path

HUB = "hub:"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Examples of a data set, ascending by their numbers.

    Attributes:
        name: where they come from, for messages.
        rows: fields by name.
        ids_N: the examples' numbers, from their content.
        content: names all of them together, whatever their order.
        origins: file and number of each row, from 1, where they are known.
    """

    name: str
    rows: tuple[Row, ...]
    ids_N: np.ndarray
    content: str
    origins: tuple[tuple[str, int], ...] = ()

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        if not self.origins:
            return ""
        file, number = self.origins[index]
        return f"row {number} of {file}"

    def __len__(self) -> int:
        return len(self.rows)

    def fields(self) -> list[str]:
        """Names of fields that some row has, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def require(self, field: str, option: str, task: str) -> None:
        """Raise UserError where no row has a field that an option of a task names."""
        if field not in self.fields():
            raise unknown(f"field of {self.name}", field, self.fields(), f"task {task}: {option}")


def read(data: str, split: str = "") -> Rows:
    """The rows of a file, a folder of such files, what ``isoflop fetch`` got (``public:NAME/FILE``), or a data set of the Hugging
    Face hub (``hub:OWNER/NAME``).

    Files are JSON Lines, JSON (a list of rows), CSV, TSV, Parquet and Arrow, the text forms also with ``.gz``.

    Args:
        split: of a hub's data set; of a folder, the files whose name, or whose folder, begins with it.

    Raises:
        UserError: nothing there, a file that cannot be read, no rows.
    """
    if data.startswith(HUB):
        return _of_hub(data.removeprefix(HUB), split or "test")
    files = table_files(data, split)
    return _of_files(tuple((path, *_state(path)) for path in files), data)


def table_files(data: str, split: str = "") -> list[Path]:
    """The files that hold the rows of ``data``; see ``read``."""
    return _files(data, split, READERS, "table")


def text_files(data: str, split: str = "") -> list[Path]:
    """The text files of ``data``: itself, or what lies below the folder."""
    return _files(data, split, dict.fromkeys(TEXT), "text")


TEXT = (".txt", ".md", ".rst", ".text")


def suffix_of(path: Path) -> str:
    """``.jsonl`` of ``a.jsonl`` and of ``a.jsonl.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def named(
    rows: Sequence[Row], name: str, keys: Sequence[str] | None = None, origins: Sequence[tuple[str, int]] = ()
) -> Rows:
    """Rows with their numbers.

    Args:
        origins: file and number of each row.
        keys: what names each row; by default the canonical JSON of its fields.
    """
    keys = [canonical_json(row) for row in rows] if keys is None else keys
    seen: Counter[str] = Counter()
    numbers = []
    for key in keys:
        numbers.append(example_number(key, seen[key]))
        seen[key] += 1
    order = sorted(range(len(rows)), key=numbers.__getitem__)
    ids_N = np.array([numbers[place] for place in order], dtype=np.int64)
    content = hashlib.sha256(ids_N.astype("<i8").tobytes()).hexdigest()[:20]
    return Rows(
        name, tuple(rows[place] for place in order), ids_N, content, tuple(origins[place] for place in order if origins)
    )


def example_number(key: str, copy: int = 0) -> int:
    """A number of 53 bits (so that it survives a float) for what names an example; copies of one row get their own."""
    digest = hashlib.sha256(f"{copy}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def canonical_json(row: Any) -> str:
    """One spelling per content, whatever the order of the fields."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=_plain, separators=(",", ":"))


def chosen(count: int, limit: int | None, seed: int, ids_N: np.ndarray) -> np.ndarray:
    """Places of at most ``limit`` examples, drawn by their numbers and a seed; fewer are a subset of more."""
    keys = [hashlib.sha256(f"{seed}:{number}".encode()).digest() for number in ids_N.tolist()]
    order = np.array(sorted(range(count), key=keys.__getitem__), dtype=np.int64)
    return order if limit is None else order[:limit]


def _files(data: str, split: str, kinds: Mapping[str, Any], what: str) -> list[Path]:
    path = local_path(data, f"data {data}")
    allowed = ", ".join(kinds)
    if path.is_file():
        if suffix_of(path) not in kinds:
            raise UserError(f"data {data}: {path.name} is no {what} file; allowed: {allowed}, a folder of such files")
        return [path]
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise (_missing(data, path, beside) if beside else UserError(f"data {data}: no such file or folder"))
    found = data_files(path, kinds)
    if not found:
        raise UserError(f"data {data}: the folder holds no {what} file; allowed: {allowed}")
    of_split = data_files(path, kinds, split)
    if not of_split:
        raise UserError(
            f"data {data}: no file, or folder, begins with split = {split!r}; there are: "
            f"{', '.join(str(p.relative_to(path)) for p in found[:10])}"
        )
    return of_split


def _missing(data: str, path: Path, beside: Sequence[str]) -> UserError:
    """The error for a file that is not there: names the nearest ones, however many there are."""
    near = get_close_matches(path.name, beside, n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else f"; it holds {len(beside)} others"
    return UserError(f"data {data}: no file or folder {path.name!r} in {path.parent}{hint}")


def data_files(folder: Path, kinds: Mapping[str, Any], split: str = "") -> list[Path]:
    """Files of some kinds below a folder, without what is hidden or about the data (README, LICENSE).

    Args:
        split: how the file's name, or that of a folder on the way to it, begins.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        about = path.stem.upper() in ("README", "LICENSE", "LICENCE", "CHANGELOG")
        hidden = any(part.startswith((".", "_")) for part in parts)
        if path.is_file() and suffix_of(path) in kinds and not about and not hidden:
            found += [path] if any(part.startswith(split) for part in parts) else []
    return found


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=32)  # by size and time of change, so that a file that was written anew is read anew
def _of_files(files: tuple[tuple[Path, int, int], ...], name: str) -> Rows:
    rows: list[Row] = []
    origins: list[tuple[str, int]] = []
    for path, _, _ in files:
        own = _read_file(path)
        rows += own
        file = str(path)
        origins += [(file, number) for number in range(1, len(own) + 1)]
    if not rows:
        raise UserError(f"data {name}: holds no rows")
    return named(rows, name, origins=origins)


def _read_file(path: Path) -> list[Row]:
    try:
        if suffix_of(path) in SEPARATORS and other_form(path):  # read as such it would be cells without sense
            raise UserError(f"data {path}: holds no cells")
        return list(READERS[suffix_of(path)](path))
    except UserError as error:
        raise UserError(f"{error}{other_form(path)}") from None
    except (
        OSError,
        ValueError,
        EOFError,
        RecursionError,
        csv.Error,
    ) as error:  # Arrow's own errors are ValueErrors and OSErrors, too
        raise UserError(
            f"data {path}: cannot be read: {str(error).splitlines()[0] if str(error) else error!r}{other_form(path)}"
        ) from None


def other_form(path: Path) -> str:
    """Words on what a file seems to hold, where its name says something else; empty where it does not."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4096)
    except (OSError, EOFError, zlib.error):
        return ""
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None) or _form_of(head)
    if kind is None or READERS[kind] is READERS[suffix_of(path)] or {kind, suffix_of(path)} <= set(SEPARATORS):
        return ""
    own = path.name.removesuffix(".gz")
    return f"; it looks like {kind[1:]}: name it {own.removesuffix(Path(own).suffix)}{kind}{path.name[len(own) :]}"


def _form_of(head: bytes) -> str | None:
    """The ending for a text that begins so."""
    first = head.decode("utf-8-sig", "replace").lstrip().partition("\n")[0].strip()
    if first.startswith("{"):
        with suppress(ValueError, RecursionError):
            return ".jsonl" if isinstance(json.loads(first), dict) else None
        return None
    if first.startswith("["):
        return ".json" if first[1:].lstrip()[:1] in ("", "{", "]") else None
    return next((kind for kind, mark in SEPARATORS.items() if mark in first), None)


def text_of(path: Path) -> str:
    """A text file's content. Raises UserError where it is not UTF-8."""
    try:
        stored = path.read_bytes()
        return (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data {path}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if line.strip():
            yield _object(_parsed(line, path, number), path, f"line {number}")


def _json(path: Path) -> Iterator[Row]:
    found = _parsed(text_of(path), path, None)
    if not isinstance(found, list):
        raise UserError(f"data {path}: holds {type(found).__name__}, not a list of rows; allowed: [{{…}}, {{…}}]")
    for number, row in enumerate(found, start=1):
        yield _object(row, path, f"row {number}")


def _parsed(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{path}:{line}" if line is not None else str(path)
        raise UserError(f"data {where}: is no JSON ({error})") from None


def _object(row: Any, path: Path, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"data {path}: {where} is {row!r:.60}; allowed: an object with named fields")
    return row


def _separated(separator: str) -> Callable[[Path], Iterator[Row]]:
    def read_separated(path: Path) -> Iterator[Row]:
        reader = csv.DictReader(io.StringIO(text_of(path), newline=""), delimiter=separator, strict=True)
        names = [name.strip() for name in reader.fieldnames or []]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(f"data {path}: its header names {twice[0]!r} twice")
        reader.fieldnames = names
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"data {path}:{reader.line_num}: has another number of cells than the {len(names)} of its header"
                )
            yield row

    return read_separated


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    yield from pq.read_table(path).to_pylist()


def _arrow(path: Path) -> Iterator[Row]:
    import pyarrow as pa

    with pa.memory_map(os.fspath(path)) as source:
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
    yield from table.to_pylist()


SEPARATORS = {".tsv": "\t", ".csv": ","}
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    **{kind: _separated(mark) for kind, mark in SEPARATORS.items()},
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}


@lru_cache(maxsize=8)
def _of_hub(name: str, split: str) -> Rows:
    """A data set of the hub; ``OWNER/NAME:CONFIG`` names one of its configurations."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data {HUB}{name}: data sets of the hub need the package datasets: pip install 'isoflop[hub]'"
        ) from None
    repository, _, config = name.partition(":")
    try:
        table = datasets.load_dataset(repository, config or None, split=split)
        rows = [dict(row) for row in table]
    except Exception as error:  # the library raises its own kinds, and those of every library below it
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"data {HUB}{name}: split {split!r} cannot be loaded ({reason})") from None
    return named(rows, f"{HUB}{name}")


def _plain(value: Any) -> Any:
    """What JSON does not know: bytes and images by their content, dates and decimals by their text."""
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if hasattr(value, "tobytes"):
        return {"sha256": hashlib.sha256(value.tobytes()).hexdigest()}
    return str(value)
