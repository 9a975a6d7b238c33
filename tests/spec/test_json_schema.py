"""The committed JSON Schema is the current one, and every shipped sweep validates against it and resolves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from isoflop.core.yaml_source import load_yaml
from isoflop.sweep.resolve import resolve

SWEEPS = Path(__file__).parents[2] / "sweeps"
FILES = sorted(SWEEPS.glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((SWEEPS / "sweep.schema.json").read_text())


def test_the_committed_schema_is_current() -> None:
    """In a process of its own: other tests register parts of their own."""
    made = subprocess.run(
        [sys.executable, "-m", "isoflop.sweep.schema"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert (SWEEPS / "sweep.schema.json").read_text() == made, "write it anew: make schema"


def test_the_schema_is_a_schema(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_shipped_sweep_validates_and_resolves(path: Path, schema: dict[str, Any]) -> None:
    data = load_yaml(path).data
    jsonschema.Draft202012Validator(schema).validate(data)
    if any("hf:" in str(model) for model in data["models"]):
        return  # wants a checkpoint: tests/data_tasks runs it with a small one
    if "public:" in str(data):
        return  # wants data that were fetched: the tests of those resolve it with small ones
    sweep = resolve(path)
    assert sweep.spec.name == path.stem


@pytest.mark.parametrize(
    "change, where",
    [
        ({"modles": []}, "modles"),
        ({"methods": [{"avgpool": {"tokns": 4}}]}, "tokns"),
        ({"methods": [{"avgpool": {"tokens": 0}}]}, "0 is less than the minimum"),
        ({"search": {"sampler": "tpee"}}, "tpee"),
        ({"budget": {"trials": 0}}, "0"),
        ({"limits": {"timeout": "soon"}}, "soon"),
    ],
)
def test_the_schema_finds_what_an_editor_should_underline(
    change: dict[str, Any], where: str, schema: dict[str, Any]
) -> None:
    good = {
        "name": "s",
        "models": ["tiny-llava/d24"],
        "methods": [{"avgpool": {"tokens": [1, 4]}}],
        "tasks": ["reading"],
    }
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError) as caught:
        jsonschema.validate({**good, **change}, schema)
    assert where in str(caught.value)
