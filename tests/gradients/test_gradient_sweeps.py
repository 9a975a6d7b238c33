"""Gradient methods in the family that they train: what is refused at plan time, slots, rows of both back-ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import isoflop
from isoflop.core.errors import Infeasible, UserError
from isoflop.methods.base import Method, build
from isoflop.models.family import family_of
from isoflop.models.tiny.lm_training import TextStage

REF = "tiny-lm/text-d64"


def stage(method: Method | None, ref: str = REF, **options: Any) -> Any:
    """The training of a model with a method, as planned."""
    family = family_of(ref)
    info = family.info(ref, options)
    if method is not None:
        method.check(info)
    return family.weights(info, () if method is None else (method,), 0)


def test_a_stage_fills_as_many_slots_as_it_runs_processes() -> None:
    assert stage(None).slots == 1
    assert stage(build("dgc", {"workers": 4, "backend": "simulated"})).slots == 1
    assert stage(build("dgc", {"workers": 4, "backend": "ddp"})).slots == 4
    assert stage(build("powersgd", {})).slots == 2


def test_trainings_without_a_method_are_named_as_before() -> None:
    assert type(stage(None)) is TextStage
    assert stage(None).spec().keys() == {"stage", "version", "size", "seed", "recipe", "tokens"}
    keys = {stage(build("dgc", {"density": d})).key for d in (0.01, 0.1)} | {stage(None).key}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("method", "ref", "options", "words"),
    [
        ("dgc", REF, {"batch": 9}, "method dgc: workers = 2 does not divide the batch of 9.*allowed: 3"),
        ("dgc", "tiny-lm/text-d64?at=250", {}, "at = 250 is not kept with method dgc"),
        ("dgc", "tiny-lm/recall-d64", {}, "dgc needs gradients"),
    ],
)
def test_what_cannot_work_is_refused_at_plan_time(method: str, ref: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Infeasible, match=words):
        stage(build(method, {}), ref, **options)


def test_a_density_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="density = 0"):
        build("dgc", {"density": 0})


@pytest.mark.slow
def test_rows_of_processes_are_those_of_the_simulation(tmp_path: Path) -> None:
    """From the YAML's dict to the rows: the same error, ratio and bytes; the trace is loss against bytes."""
    spec = {
        "name": "exchange",
        "models": [{REF: {"steps": 6, "batch": 4, "context": 16}}],
        "methods": [{"dgc": {"density": 0.01, "warmup": 0.5, "backend": ["ddp", "simulated"]}}],
        "tasks": [{"bits-per-byte": {"prefix": 0.0, "examples": 4, "tokens": 16}}],
    }
    opened = isoflop.run(
        spec, executor="local", tracking_uri="none", store=str(tmp_path / "store"), cache_dir=tmp_path / "cache"
    )
    assert opened.summary.ok == 2
    rows = opened.results().to_pylist()
    for column in ("error", "ratio", "scores"):
        assert rows[0][column] == rows[1][column], column
    assert rows[0]["ratio"] > 10
    assert not list((tmp_path / "cache").rglob("workers"))
