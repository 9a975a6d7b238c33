"""Documents of a user's own: text files, each one document, or rows with a field that holds the text."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from isoflop.core.errors import UserError
from isoflop.core.public import local_path
from isoflop.core.rows import HUB, READERS, TEXT, Rows, data_files, named, read, suffix_of, text_files, text_of


def documents(data: str, split: str = "") -> Rows:
    """What a file, a folder, or a data set of the hub holds: whole text files under ``text``, or rows as they are.

    Args:
        data, split: as in ``isoflop.core.rows.read``.

    Raises:
        UserError: nothing there, a folder that holds both kinds, a file that cannot be read.
    """
    if data.startswith(HUB) or _is_table(data, split):
        return read(data, split)
    files = text_files(data, split)
    return _text_files(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files), data)


def _is_table(data: str, split: str) -> bool:
    path = local_path(data, f"data {data}")
    if not path.is_dir():
        return suffix_of(path) in READERS
    kinds = {suffix_of(file) in READERS for file in data_files(path, {**READERS, **dict.fromkeys(TEXT)}, split)}
    if len(kinds) > 1:
        raise UserError(
            f"data {data}: the folder holds text files and tables; name one of them, or a folder of one kind"
        )
    return kinds == {True}


@lru_cache(maxsize=8)  # by size and time of change
def _text_files(files: tuple[tuple[Path, int, int], ...], name: str) -> Rows:
    return named([{"text": text_of(path)} for path, _, _ in files], name)
