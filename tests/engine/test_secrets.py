"""Passwords and keys in addresses: whoever connects gets them, nobody else ever sees them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers import toy

from isoflop.cli import cli, main
from isoflop.core.errors import UserError
from isoflop.core.secrets import has_secret, redacted
from isoflop.core.text import safe_text
from isoflop.ledger import Store
from isoflop.sweep.api import RunOptions

pytestmark = pytest.mark.usefixtures("toy_parts")
PLANTED = "hunter2-pLaNtEd"

ADDRESSES = {
    f"http://user:{PLANTED}@host:80/x": "http://user:***@host:80/x",
    f"http://user:{PLANTED}@host/a@b": "http://user:***@host/a@b",
    f"http://user:a@{PLANTED}@host/x": "http://user:***@host/x",
    f"https://{PLANTED}@host/x": "https://***@host/x",
    f"postgresql+psycopg://me:{PLANTED}@host/db?sslmode=require": "postgresql+psycopg://me:***@host/db?sslmode=require",
    f"s3://{PLANTED}:{PLANTED}@bucket/x": "s3://***:***@bucket/x",
    f"s3://AK:a/{PLANTED}@bucket/x": "s3://***:***@bucket/x",
    f"s3://bucket/x?region=eu&session_token={PLANTED}&scheme=http": "s3://bucket/x?region=eu&session_token=***&scheme=http",
    f"s3://b?endpoint_override=http%3A%2F%2Fu%3A{PLANTED}%40h": "s3://b?endpoint_override=***",
    f"abfs://c@account/x?sas={PLANTED}": "abfs://c@account/x?sas=***",
    f"tried ftp://u:{PLANTED}@h/x, then 'http://u:{PLANTED}@h'.": "tried ftp://u:***@h/x, then 'http://u:***@h'.",
}
HARMLESS = [
    "postgresql://me@host/db", "sqlite:////a/b@c.db", "file:///a:b@c", "s3://bucket/a:b@c", "http://host:80/a@b", "hf:a/b",
    "http://host/x?page=2", "abfs://container@account.dfs.core.windows.net/x", "a@b", "",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_shown_without_its_secrets(address: str) -> None:
    assert redacted(address) == ADDRESSES[address] == redacted(redacted(address))
    assert has_secret(address)
    assert PLANTED not in safe_text(ValueError(f"cannot reach {address}"))


@pytest.mark.parametrize("address", HARMLESS)
def test_an_address_without_secrets_is_shown_as_it_is(address: str) -> None:
    assert redacted(address) == address
    assert not has_secret(address)


class PlantedFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A store far away that wants a password: ``planted://user:PASSWORD@host/path``."""

    protocol = "planted"
    store: dict[str, Any] = {}  # noqa: RUF012 - the files
    pseudo_dirs = [""]  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def __init__(self, password: str = "", **more: Any) -> None:
        super().__init__(**more)
        self.asked.append(password)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        bare = path.removeprefix("planted://").rpartition("@")[2]
        return "/" + bare.strip("/") if bare.strip("/") else ""

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"password": path.partition("@")[0].rpartition(":")[2]} if "@" in path else {}


@pytest.fixture
def planted() -> str:
    fsspec.register_implementation("planted", PlantedFileSystem, clobber=True)
    PlantedFileSystem.store.clear()
    return f"planted://user:{PLANTED}@far/store"


def every_text(folder: Path) -> dict[str, str]:
    """All that lies in a folder, and far away."""
    near = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    far = {name: file.getvalue() for name, file in PlantedFileSystem.store.items()}
    return {name: data.decode("utf-8", "replace") for name, data in (near | far).items()}


def test_no_output_of_a_sweep_holds_a_secret(
    tmp_path: Path, planted: str, empty_mlflow: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store and its MLflow ask for passwords, once given on the command line, once in the YAML."""
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(empty_mlflow, work / "mlflow.db")
    spec = tmp_path / "given.yaml"
    spec.write_text(json.dumps(toy(laws=[{"law": "product", "bootstrap": 0}])))
    spec2 = tmp_path / "given2.yaml"
    spec2.write_text(json.dumps(toy(name="kept", store=planted)))
    spec3 = tmp_path / "given3.yaml"
    spec3.write_text(json.dumps(toy(name="away", description=f"see {planted}")))
    local = ["--executor", "local", "--cache-dir", str(tmp_path / "cache")]
    database = f"sqlite:///{work / 'mlflow.db'}"
    away = f"http://user:{PLANTED}@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    codes = [
        cli.main(["run", str(spec), "--store", planted, "--tracking-uri", database, *local], standalone_mode=False),
        cli.main(["run", str(spec2), "--tracking-uri", database, *local, "--json"], standalone_mode=False),
        cli.main(["resume", "kept", "--store", planted, "--tracking-uri", database, *local], standalone_mode=False),
    ]
    assert codes == [0, 0, 0]
    monkeypatch.setattr("isoflop.cli.run.RunOptions", partial(RunOptions, track_wait=0.5))
    run = ["run", str(spec3), "--store", str(work / "store"), "--tracking-uri", away, *local]
    assert cli.main(run, standalone_mode=False) == 1
    assert PLANTED in PlantedFileSystem.asked  # it was needed
    for command in (
        ["show", "toy"],
        ["show", "toy", "--json"],
        ["ls"],
        ["ls", "--json"],
        ["watch", "toy", "--once"],
        ["report", "toy"],
    ):
        more = ["--tracking-uri", away] if command[0] == "report" else []
        cli.main([*command, "--store", planted, *more], standalone_mode=False)
    import isoflop

    assert PLANTED not in repr(isoflop.open("toy", store=planted))
    for wrong in (
        ["show", "nosuch", "--store", planted],
        ["plan", str(spec), "--store", planted.replace("planted", "plantet", 1)],
    ):
        monkeypatch.setattr("sys.argv", ["isoflop", *wrong])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
    cli.main(["plan", str(spec), "--store", planted], standalone_mode=False)
    out, err = capfd.readouterr()
    assert "user:***@far/store" in out
    assert PLANTED not in out
    assert PLANTED not in err
    for given in (spec, spec2, spec3):
        given.unlink()
    texts = every_text(tmp_path)
    assert len(texts) > 10
    assert not [name for name, text in texts.items() if PLANTED in text]
    assert any("user:***@far" in text for name, text in texts.items() if name.endswith("sweep.yaml"))


def test_errors_of_stores_hide_it(planted: str) -> None:
    with pytest.raises(UserError) as caught:
        Store.open(planted.replace("planted", "nosuch", 1))
    assert PLANTED not in str(caught.value)
    assert PLANTED not in repr(Store.open(planted))


def test_a_submitted_sweep_does_not_carry_it_to_where_everybody_can_read_it() -> None:
    from isoflop.cli.submit import _entrypoint

    options = {"python": "python", "store": None, "workers": None, "retry_failed": False}
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        _entrypoint("x.yaml", {**options, "tracking_uri": f"http://u:{PLANTED}@h"})
    assert PLANTED not in str(caught.value)
    assert "--tracking-uri http://h" in _entrypoint("x.yaml", {**options, "tracking_uri": "http://h"})
