"""``isoflop bench engine``: peers are looked for first, and what was measured is shown whatever happens to the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from isoflop.bench import engine as bench
from isoflop.bench import engine_peers
from isoflop.bench.engine_ours import Measurement
from isoflop.core.errors import UserError


def bench_engine(*arguments: str) -> Result:
    return CliRunner().invoke(bench.engine, arguments, standalone_mode=False)


def test_missing_peers_are_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"noop": {"no_such_peer": "isoflop[bench]", "json": "json"}, "reload": {"nor_this": "nor[this]"}}
    monkeypatch.setattr(engine_peers, "_NEEDED", needed)
    for part in ("bench_noop", "bench_reload", "bench_features", "bench_growth", "bench_writer"):
        monkeypatch.setattr(bench, part, lambda *_: pytest.fail("it runs"))
    found = bench_engine().exception
    assert isinstance(found, UserError)
    assert str(found) == (
        "bench engine: no_such_peer, nor_this cannot be imported; pip install 'isoflop[bench]' 'nor[this]', or choose parts "
        "without these peers: --only features, --only growth, --only writer"
    )


def measurement(system: str, workload: str = "no-op") -> Measurement:
    return Measurement(workload, system, 10, 2.0, sampler="tpe")


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("no peer\nany more"), 1), (KeyboardInterrupt(), 130)])
def test_what_was_measured_is_kept(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def noop(*_: Any) -> Iterator[Measurement]:
        yield measurement("isoflop, tpe")
        yield measurement("peer")
        raise error

    monkeypatch.setattr(bench, "missing", lambda chosen: {})
    monkeypatch.setattr(bench, "bench_noop", noop)
    monkeypatch.setattr(bench, "bench_features", lambda *_: iter([measurement("peer", "features")]))  # ours is missing
    monkeypatch.setattr(bench, "bench_writer", lambda *_: {"bulk": 2.0})
    result = bench_engine("--only", "writer", "--only", "noop", "--only", "features", "--json")
    assert result.return_value == code
    data = json.loads(result.stdout)
    assert [m["system"] for m in data["measurements"]][:2] == ["isoflop, tpe", "peer"]
    assert data["ratios"] == {"no-op: isoflop, tpe / peer": 1.0}
    assert ("writer" in data) == (code == 1)  # the other parts are still measured, unless somebody stops it
    told = "stopped in noop" if code == 130 else "noop was not measured to its end: RuntimeError: no peer any more"
    assert told in result.stderr
