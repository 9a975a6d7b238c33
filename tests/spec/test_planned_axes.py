"""The axes of a law come from what methods plan. On earlier versions they came from the names of knobs: QueCC's k was V."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from isoflop.cli import cli
from isoflop.core.errors import Infeasible, UserError
from isoflop.methods.base import METHODS, build
from isoflop.models.family import family_of
from isoflop.search.law.axes import AxisSpec
from isoflop.sweep.law_axes import axes_of, planned_axes
from isoflop.sweep.plan import make_plan
from isoflop.sweep.resolve import resolve
from isoflop.sweep.searching import problem_of

LLAVA = "tiny-llava/d24"


def axes(
    methods: list[Any], models: tuple[str, ...] = (LLAVA,), task: str = "reading", **search: Any
) -> dict[str, AxisSpec]:
    """The readers that a law search on these methods gets."""
    target = {"kind": "allocation", "budget": 2e7}
    spec = {
        "name": "axes", "models": list(models), "methods": methods, "tasks": [task], "budget": {"trials": 8},
        "search": {"sampler": "law", "target": target, **search},
    }  # fmt: skip
    return dict(problem_of(resolve(spec)).axes)


def read(spec: AxisSpec, method: str, **knobs: Any) -> float:
    assert callable(spec)
    return spec({"model": LLAVA, "method": method, **{f"{method}.{name}": v for name, v in knobs.items()}})


def test_the_side_of_a_window_is_not_the_number_of_tokens() -> None:
    found = axes([{"quecc": {"k": [1, 2, 3, 6]}}])
    assert [read(found["V"], "quecc", k=k) for k in (1, 2, 3, 6)] == [36, 9, 4, 1]


def test_tokens_by_any_other_name() -> None:
    assert [read(axes([{"mqt": {"m": [1, 4, 16]}}])["V"], "mqt", m=m) for m in (1, 4, 16)] == [1, 4, 16]
    assert read(axes([{"vtc-cls": {"keep": [3, 9]}}])["V"], "vtc-cls", keep=9) == 9


def test_a_knob_that_counts_something_else_is_no_axis() -> None:
    sweep = resolve(
        {"name": "axes", "models": [LLAVA], "methods": [{"bitstack": {"bits": [4, 8]}}], "tasks": ["reading"]}
    )
    found = planned_axes(sweep, {LLAVA: 1.0})
    assert "V" not in found
    assert read(found["bits"], "bitstack", bits=4.0) == 4.0


@pytest.mark.parametrize(("options", "bits"), [({}, 32), ({"served": "bfloat16"}, 16), ({"dtype": "float16"}, 16)])
def test_a_plan_says_what_its_ratios_are_against(options: dict[str, Any], bits: int, tmp_path: Path) -> None:
    """As they are measured: against what the model's elements count, which is 32 bits of a checkpoint in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "llm")
    sweep = {
        "name": "s", "models": [{"hf:llm": options}], "methods": [{"rtn": {"bits": [4, 8]}}], "tasks": ["generation-latency"],
    }  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    plan = make_plan(resolve(path), str(tmp_path / "store"))
    assert plan.dense_bits == {"hf:llm": bits}
    assert plan.axes["rtn"]["ratio"] == (bits / 8, bits / 4)
    said = CliRunner().invoke(cli, ["plan", str(path), "--store", str(tmp_path / "store")]).output
    assert f"these ratios are against {bits} bits per element" in said
    assert ("{served: bfloat16}" in said) == (bits == 32)
    assert family_of("hf:llm").info("hf:llm", options).dense_bits == bits


def test_several_methods_share_an_axis_and_a_composition_plans_through() -> None:
    found = axes([{"quecc": {"k": [2, 6]}}, {"avgpool": {"tokens": [4, 9]}}, "none"])
    assert read(found["V"], "quecc", k=2) == 9
    assert read(found["V"], "avgpool", tokens=9) == 9
    assert read(found["V"], "none") == 36
    info = family_of("tiny-llava/d128").info("tiny-llava/d128", {})
    both = axes_of(info, [build("fastv", {"drop": 0.5, "layer": 1}), build("avgpool", {"tokens": 4})])
    assert both == {"V": 4.0, "layer_visual_tokens": (4 + 2 + 2) / 3}
    alone = axes_of(info, [build("fastv", {"drop": 0.5, "layer": 2})])
    assert alone == {"V": 36.0, "layer_visual_tokens": 30.0, "ratio": 36 / 30}


def test_a_configuration_that_cannot_work_has_no_place() -> None:
    found = axes([{"quecc": {"k": [1, 2, 3, 6]}}])
    assert math.isnan(read(found["V"], "quecc", k=5))
    info = family_of(LLAVA).info(LLAVA, {})
    with pytest.raises(Infeasible, match="fastv: layer = 2 is not inside the 2 decoder layers"):
        axes_of(info, [build("fastv", {"drop": 0.5, "layer": 2})])


def test_what_works_is_found_between_the_ends_of_a_range() -> None:
    found = axes([{"avgpool": {"tokens": {"low": 5, "high": 10}}}])
    assert read(found["V"], "avgpool", tokens=9) == 9


def test_ratios_of_caches_are_those_of_the_bits_that_a_model_counts() -> None:
    info = replace(family_of(LLAVA).info(LLAVA, {}), dense_bits=32)
    assert build("kv-rtn", {"bits": 4}).axes(info).ratio == 8


def test_axes_that_the_yaml_names_may_be_planned_ones() -> None:
    named = {"N": "N", "V": "36 / ratio"}
    spec = {
        "name": "axes", "models": [LLAVA], "methods": [{"quecc": {"k": [1, 2]}}], "tasks": ["reading"], "budget": {"trials": 8},
        "search": {"sampler": "law", "target": {"kind": "allocation", "budget": 2e7}, "axes": named},
    }  # fmt: skip
    resolve(spec)
    spec["search"] = {**spec["search"], "axes": {**named, "V": "36 / rati"}}  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"search\.axes.*'rati'.*ratio"):
        resolve(spec)


@pytest.mark.parametrize("name", METHODS.own())
def test_what_a_method_plans_is_plain_and_visual_tokens_are_those_measured(name: str) -> None:
    cls = METHODS.get(name)
    probe = cls.probe()
    method = cls()
    try:
        method.check(probe.model.info)
    except Infeasible:
        pytest.skip("its defaults do not fit the probe's model")
    planned = method.axes(probe.model.info).named()
    assert all(math.isfinite(value) and value > 0 for value in planned.values())
    if "V" in planned:
        with method.apply(probe.model, probe.prepared(method, 0)):
            assert planned.get("layer_visual_tokens", planned["V"]) == pytest.approx(probe.cost())
