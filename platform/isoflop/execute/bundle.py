"""What a cluster must be sent to run a sweep: isoflop itself and the sweep's YAML with the modules and data that it names."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import isoflop
from isoflop.core.errors import UserError

MOST_BYTES = 90 * 2**20
"""Ray takes working folders of 100 MiB, packed; code and YAML want some of it."""
_LONGEST_PATH = 1024
_FOR_READERS = {"sweep.schema.json", "outcomes.json", "outcomes.md"}
"""Generated for editors and people; they grow with every method, and no worker opens them."""
_DATA = {".py", ".typed", ".yaml", ".json", ".jsonl", ".csv", ".txt", ".md", ".ipynb"}


def copy_package(target: Path) -> Path:
    """Copy the running isoflop, as real files, to ``target/isoflop``: what its wheel holds and a worker may read; that folder.

    A folder rather than the wheel: Ray installs a wheel with ``pip install --target``, which ignores what the cluster
    has and would fetch torch and all the rest from a package index again.
    """
    root = Path(isoflop.__file__).parent
    for path in _files(root):
        if path.suffix in _DATA and path.name not in _FOR_READERS:
            _copy(path, target / "isoflop" / path.relative_to(root))
    return target / "isoflop"


def copy_sweep(spec: Path, imports: tuple[str, ...], target: Path, data: Iterable[str] = ()) -> list[str]:
    """Copy a sweep's YAML into ``target``, with the modules and the data beside it that it needs.

    Args:
        spec: the YAML.
        imports: its ``import:``; followed through the import statements of the modules beside the YAML.
        data: paths that its tasks name, relative to the YAML; tables bring the files that their cells name.

    Returns:
        The ``imports`` that do not lie beside the YAML: the cluster must have them installed.
    """
    _copy(spec, target / spec.name)
    found, elsewhere = modules_beside(spec.resolve().parent, imports)
    for place in found:
        for path in _files(place) if place.is_dir() else [place]:
            _copy(path, target / path.relative_to(place.parent))
    for path in data_beside(spec.resolve().parent, data):
        _copy(path, target / path.relative_to(spec.resolve().parent))
    return elsewhere


def data_beside(folder: Path, data: Iterable[str]) -> list[Path]:
    """Files in ``folder`` that relative paths name: files, all of folders, and what the cells of tables name.

    Raises:
        UserError: nothing lies there, it lies outside of ``folder``, or it is more than a cluster takes.
    """
    found: dict[Path, None] = {}
    for name in data:
        place = Path(os.path.normpath(folder / name))
        if not place.is_relative_to(folder):
            raise UserError(
                f"{name} lies outside of the sweep's folder, and a cluster is sent what is in it; allowed: data beside the "
                "YAML, or an absolute path that every node of the cluster can read"
            )
        if not place.exists():
            raise UserError(f"{name}: no such file or folder beside the sweep")
        files = list(_files(place)) if place.is_dir() else [place]
        found.update(dict.fromkeys(files))
        for table in files:
            found.update(dict.fromkeys(p for p in _named_in(table) if p.is_relative_to(folder)))
    size = sum(path.stat().st_size for path in found)
    if size > MOST_BYTES:
        raise UserError(
            f"the data beside the sweep are {size / 2**20:.0f} MiB, and a cluster takes {MOST_BYTES / 2**20:.0f}; allowed: an "
            "absolute path that every node of the cluster can read, or hub:OWNER/NAME"
        )
    return list(found)


def _named_in(table: Path) -> Iterator[Path]:
    """Files, relative to a table, that its cells name (pictures)."""
    from isoflop.core.rows import READERS, read, suffix_of

    if suffix_of(table) not in READERS:
        return
    try:
        rows = read(str(table)).rows
    except UserError:  # a task that reads it will say so; another file with such an ending is none of ours
        return
    for cell in {
        value for row in rows for value in row.values() if isinstance(value, str) and len(value) < _LONGEST_PATH
    }:
        place = Path(os.path.normpath(table.parent / cell)) if cell.isprintable() else table
        if place != table and os.path.isfile(place):
            yield place


def modules_beside(folder: Path, imports: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """Files and packages in ``folder`` that ``imports`` need, directly or through each other; and those not there."""
    found: dict[str, Path] = {}
    elsewhere = []
    todo = list(imports)
    while todo:
        name = todo.pop()
        top = name.split(".")[0]
        # The job finds this folder before the standard library, a local run after it.
        if top in found or top in sys.stdlib_module_names:
            continue
        place = next((p for p in (folder / top, folder / f"{top}.py") if _is_module(p)), None)
        if place is None:
            elsewhere += [name] if name in imports else []
            continue
        found[top] = place
        for path in _files(place) if place.is_dir() else [place]:
            todo += _imported(path) if path.suffix == ".py" else []
    return sorted(found.values()), sorted(elsewhere)


def _is_module(path: Path) -> bool:
    return path.is_file() if path.suffix == ".py" else path.is_dir() and any(path.glob("*.py"))


def _imported(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # whoever imports it will say so better
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
    return names


def _files(root: Path) -> Iterator[Path]:
    """Files below ``root``, through links to folders; no caches and nothing hidden."""
    for folder, names, files in os.walk(root, followlinks=True):
        names[:] = sorted(n for n in names if n != "__pycache__" and not n.startswith("."))
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
