"""Ratios and means where people read them: one definition at each place, named there, and no mean that is not called one."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_sweeps import store_of
from rich.console import Console

from isoflop.cli import cli
from isoflop.cli.error_table import print_errors
from isoflop.dashboards.report import report_data
from isoflop.jobs import Job, Outcome
from isoflop.methods.base import METHODS
from isoflop.sweep.api import SweepResults
from isoflop.sweep.compression import COLUMNS, compression
from isoflop.sweep.configs import read_configs
from isoflop.sweep.results import usable

DENSE = 6400.0
KV = {"models": ["tiny-llava/d24"], "tasks": ["reading"]}


def outcome(error: float, ratio: float, tokens: float = 36.0, **footprint: float) -> Outcome:
    axes = {"N": 13_920.0, "V": tokens, "Q": 2.0, "ratio": ratio}
    return Outcome(
        "ok", errors=[error] * 4, shard_sizes=[4], axes=axes, footprint=footprint, started=time.time(), seconds=1.0
    )


def cached(job: Job) -> Outcome:
    """A method on the cache: its ratio is of the prompt, the answer holds 100 bytes more."""
    keep = float(job.knobs().get("keep", 1.0))
    return outcome(0.6 * (1 - keep), 1 / keep, kv_bytes=keep * (DENSE - 100) + 100, kv_bytes_dense=DENSE)


def table_of(sweep: SweepResults, width: int = 80) -> list[str]:
    out = io.StringIO()
    print_errors(Console(file=out, width=width), usable(sweep.results()), "reading")
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


def test_a_column_per_ratio_where_the_tokens_do_not_vary(tmp_path: Path) -> None:
    sweep = store_of(tmp_path, {"name": "keep", "methods": [{"knorm": {"keep": [0.05, 0.5, 1.0]}}], **KV}, cached)
    title, head, row, note = table_of(sweep)
    assert title == "reading: error of knorm"
    assert re.split(r" {2,}", head) == ["model", "N", "1 ×", "1.97 ×", "15.4 ×"]
    assert re.split(r" {2,}", row) == ["tiny-llava/d24", "13,920", "0.000", "0.300", "0.570"]
    assert note == "×: uncompressed over compressed, bytes of the KV cache"


@pytest.mark.parametrize("width", [80, 60])
def test_knobs_that_leave_equal_amounts_stand_in_lines_of_their_own(tmp_path: Path, width: int) -> None:
    """No mean over learning rates that looks like an error."""

    def trained(job: Job) -> Outcome:
        knobs: dict[str, Any] = job.knobs()
        return outcome(100 * knobs["lr"] / knobs["k"], float(knobs["k"] ** 2), 36 / knobs["k"] ** 2)

    methods = [{"quecc": {"k": [2, 3], "lr": [0.001, 0.002, 0.003]}}]
    lines = table_of(store_of(tmp_path, {"name": "lr", "methods": methods, **KV}, trained), width)
    cells = {tuple(re.split(r" {2,}", line)) for line in lines[2:]}
    assert len(cells) == 6
    assert ("quecc", "V=9", "k=2 lr=0.002", "0.100") in cells
    assert not any("mean" in line for line in lines)


def test_a_mean_over_knobs_is_called_one(tmp_path: Path) -> None:
    def trained(job: Job) -> Outcome:
        knobs: dict[str, Any] = job.knobs()
        return outcome(100 * knobs["lr"], float(knobs["k"] ** 2), 36 / knobs["k"] ** 2)

    rates = [round(0.001 + 1e-5 * i, 5) for i in range(80)]
    methods = [{"quecc": {"k": 2, "lr": rates}}]
    lines = table_of(store_of(tmp_path, {"name": "many", "methods": methods, **KV}, trained))
    assert lines[2].endswith("(mean of 80)")
    assert lines[-1] == "mean of n: over n settings of other knobs"


def test_a_mean_over_repeats_is_called_one(tmp_path: Path) -> None:
    spec = {"name": "two", "methods": [{"knorm": {"keep": [0.5, 1.0]}}], "repeats": 2, **KV}
    assert table_of(store_of(tmp_path, spec, cached))[0] == "reading: error of knorm, mean over 2 repeats"


def test_models_whose_ratios_differ_a_little_share_a_setting(tmp_path: Path) -> None:
    """1.88 × beside 1.94 × is one setting of two models, not two settings with a hole each."""

    def sized(job: Job) -> Outcome:
        more = 400.0 if job.model.endswith("d48") else 200.0
        return outcome(0.1, 1.0, kv_bytes=0.5 * DENSE + more, kv_bytes_dense=DENSE)

    spec = {"name": "sized", "methods": [{"knorm": {"keep": 0.5}}], **KV}
    lines = table_of(store_of(tmp_path, spec | {"models": ["tiny-llava/d24", "tiny-llava/d48"]}, sized))
    assert re.split(r" {2,}", lines[1]) == ["model", "N", "1.78…1.88 ×"]
    two = {"name": "both", "methods": [{"knorm": {"keep": [0.5, 0.6]}}], **KV}
    both = store_of(tmp_path, two | {"models": ["tiny-llava/d24", "tiny-llava/d48"]}, cached_by_model)
    assert re.split(r" {2,}", table_of(both)[1]) == ["model", "N", "1.58…1.65 ×", "1.88…1.97 ×"]


def cached_by_model(job: Job) -> Outcome:
    more = 200.0 if job.model.endswith("d48") else 50.0
    keep = float(job.knobs()["keep"])
    return outcome(0.1, 1 / keep, kv_bytes=keep * DENSE + more, kv_bytes_dense=DENSE)


def test_half_the_bytes_is_one_number_everywhere(tmp_path: Path) -> None:
    """What show, its rows and the report call two times less is what the rows' bytes say."""
    methods = [{"knorm": {"keep": [0.25, 0.5]}}, {"h2o": {"keep": [0.25, 0.5]}}]
    sweep = store_of(tmp_path, {"name": "bytes", "methods": methods, **KV}, cached)
    rows = sweep.results(["job_id", "kv_bytes", *COLUMNS]).to_pylist()
    wanted = {r["job_id"]: DENSE / r["kv_bytes"] for r in rows}
    assert all(compression(r).times == pytest.approx(wanted[r["job_id"]]) for r in rows)  # type: ignore[union-attr]
    assert {c.jobs[0]: c.times for c in read_configs(sweep.results())} == pytest.approx(wanted)
    for times in wanted.values():
        assert any(f"{times:.3g} ×" in line for line in table_of(sweep))
    told = json.loads(CliRunner().invoke(cli, ["show", "bytes", "--rows", "--json", "--store", str(tmp_path)]).output)[
        "rows"
    ]
    assert {r["job_id"]: r["compression"]["times"] for r in told} == pytest.approx(wanted)
    assert {r["compression"]["of"] for r in told} == {"bytes of the KV cache"}
    (section,) = [s for s in report_data(sweep)["sections"] if s["id"] == "methods"]
    (curve,) = [p for g in section["groups"] if g["name"] == "error along the ratio" for p in g["panels"]]
    drawn = sorted({p["x"] for series in curve["chart"]["series"] for p in series["points"]})
    assert drawn == pytest.approx(sorted(set(wanted.values())))
    assert curve["text"] == "Compared: bytes of the KV cache."


@pytest.mark.parametrize("width", [80, 100, 220])
def test_rows_break_no_word(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    methods = [{"zipcache": {"salient_ratio": [0.2, 0.6]}}]
    sweep = store_of(tmp_path, {"name": "rows", "methods": methods, **KV}, cached)
    text = CliRunner().invoke(cli, ["show", "rows", "--rows", "--store", str(tmp_path)]).output
    assert max(map(len, text.splitlines())) <= width
    for row in sweep.results(["model", "knobs"]).to_pylist():
        knobs = [f"{k}={v}" for k, v in json.loads(row["knobs"]).items()]
        for word in ("tiny-llava/d24", "zipcache", "reading", *knobs):
            assert text.split().count(word) >= 1, word
    assert ("×" in text) == ("bytes of the KV cache" in " ".join(text.split()))


def test_no_failure_is_said(tmp_path: Path) -> None:
    store_of(tmp_path, {"name": "fine", "methods": ["full-cache"], **KV}, cached)
    assert CliRunner().invoke(cli, ["show", "fine", "--failed", "--store", str(tmp_path)]).output == (
        "no job of fine failed; 1 ok\n"
    )


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_says_what_its_ratio_compares(name: str) -> None:
    cls = METHODS.get(name)
    one = compression({"method": name, "family": cls.family, "ratio": 2.0, "footprint": []})
    assert one is not None
    assert "cuts" not in one.of or cls.family in ("tokenization", "repair")  # which have no ratio
    if cls.ratio_bytes is not None:
        dense, compressed = cls.ratio_bytes
        measured = {"method": name, "family": cls.family, "ratio": 2.0, "footprint": [(dense, 9.0), (compressed, 3.0)]}
        found = compression(measured)
        assert found is not None
        assert (found.times, one.of) == (3.0, f"{found.of}, as the method counts them")


def test_a_combination_compares_weights_and_cache_and_what_is_unknown_says_so() -> None:
    both = compression({"method": "mqt+zipcache", "ratio": 9.0, "footprint": [("bytes_dense", 8.0), ("bytes", 4.0)]})
    assert both is not None
    assert (both.of, both.times) == ("bytes of weights and cache", 2.0)
    foreign = compression({"method": "somebodys", "family": "their-family", "ratio": 3.0, "footprint": None})
    assert foreign is not None
    assert (foreign.of, foreign.times) == ("what their-family cuts", 3.0)
    assert compression({"method": "none", "family": "visual-tokens", "ratio": None, "footprint": []}) is None
