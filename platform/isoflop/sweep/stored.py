"""What a store keeps of a sweep beside its ledger: the YAML, where that lay, and which rows it no longer contains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from isoflop.core.errors import UserError
from isoflop.core.secrets import redacted
from isoflop.core.yaml_source import Source, parse_yaml
from isoflop.ledger import Ledger, Store
from isoflop.sweep.resolve import resolve
from isoflop.sweep.resolved import Sweep

_JOBS = TypeAdapter(set[str])


def spec_text(sweep: Sweep) -> str:
    """The YAML as written, without the passwords of addresses in it; a dict as JSON, which is YAML too."""
    return redacted(sweep.source.text or json.dumps(sweep.source.data, indent=1))


def save_spec(store: Store, sweep: Sweep, ledger: Ledger) -> None:
    """Keep the YAML beside the results, and which old rows it no longer contains.

    Whoever reads the store later needs neither the modules that the sweep imports nor the same versions of anything.
    """
    table = ledger.read(["job_id", "spec"])
    stale = set(table["job_id"].to_pylist()) - set(sweep.current(table)["job_id"].to_pylist())
    store.write(store.path("sweeps", sweep.spec.name, "stale.json"), json.dumps(sorted(stale)).encode())
    store.write(store.path("sweeps", sweep.spec.name, "sweep.yaml"), spec_text(sweep).encode())
    if sweep.source.folder is not None:  # whence modules are imported, and paths of data lead
        store.write(store.path("sweeps", sweep.spec.name, "folder.txt"), str(sweep.source.folder.resolve()).encode())


def stored_source(store: Store, name: str) -> Source:
    """The YAML that lies beside a sweep's results.

    Modules that it imports, and data of the user's own, are looked for where the YAML lay when it was run, or else in the
    current folder.
    """
    path = store.path("sweeps", name, "sweep.yaml")
    data = store.read(path)
    if data is None:
        raise UserError(f"{path}: no such file; the sweep has no spec")
    origin = _text(
        store.read(store.path("sweeps", name, "folder.txt")) or b"", store.path("sweeps", name, "folder.txt")
    )
    folder = Path(origin) if origin and "\0" not in origin else Path.cwd()
    return replace(parse_yaml(_text(data, path), path), folder=folder if folder.is_dir() else Path.cwd())


def _text(data: bytes, path: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def resolve_stored(store: Store, name: str) -> Sweep:
    """The sweep that lies in a store, to be resumed."""
    return resolve(stored_source(store, name))


def read_stale(store: Store, name: str) -> set[str]:
    """Ids of jobs whose rows the ledger keeps but the sweep, as last run, no longer contains."""
    path = store.path("sweeps", name, "stale.json")
    data = store.read(path)
    try:
        return _JOBS.validate_json(data) if data else set()
    except ValueError:
        raise UserError(f"{path}: is damaged, no list of job ids; run the sweep again, which writes it anew") from None
