"""What the matrices' shapes rule out is refused before any weights exist."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weight_cases import gpt2, llama, mixtral

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.visual_tokens.probe import untrained_model
from isoflop.methods.vit_tokens.probe import untrained_model as untrained_vit
from isoflop.methods.weights.views import linear_views
from isoflop.models.base import Model
from isoflop.models.family import family_of
from isoflop.models.hooks.matrices import matrix_shapes
from isoflop.models.tiny.lm_config import TEXT_SIZES, lm_config

REFS = (
    "tiny-llava/d24",
    "tiny-llava/d48-qwen",
    "tiny-lm/text-d64",
    "tiny-lm/recall-d192",
    "tiny-vit/c48",
    "tiny-bert/d32",
)


def counted(model: Model) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for view in linear_views(model):
        found[view.rows, view.cols] = found.get((view.rows, view.cols), 0) + 1
    return found


def summed(shapes: tuple[tuple[int, int, int], ...]) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for rows, cols, count in shapes:
        found[rows, cols] = found.get((rows, cols), 0) + count
    return found


@pytest.mark.parametrize("model", [untrained_model("d24"), untrained_model("d48-qwen"), untrained_vit("c48")])
def test_described_matrices_are_those_of_the_model(model: Model) -> None:
    assert summed(model.info.geometry["matrices"]) == counted(model)


@pytest.mark.parametrize("size", TEXT_SIZES)
def test_described_matrices_of_language_models(size: str) -> None:
    from transformers import LlamaForCausalLM

    described = TEXT_SIZES[size].geometry(64)["matrices"]
    assert summed(described) == summed(matrix_shapes(LlamaForCausalLM(lm_config(TEXT_SIZES[size], 64)).model))


@pytest.mark.parametrize("build_model", [llama, gpt2, mixtral])
def test_matrices_of_checkpoints_of_any_architecture(build_model: object) -> None:
    model = build_model()  # type: ignore[operator]
    assert summed(matrix_shapes(model.module)) == counted(model)


@pytest.mark.parametrize("ref", REFS)
@pytest.mark.parametrize("knobs", [{"k": 1}, {"k": 2}, {"k": 4, "scaling": "divide"}, {"k": 4, "avd": False}])
def test_bitstack_names_a_budget_that_is_accepted(ref: str, knobs: dict[str, int]) -> None:
    info = family_of(ref).info(ref, {})
    with pytest.raises(Infeasible, match="bits = 1") as refused:
        build("bitstack", {**knobs, "bits": 1.0}).check(info)
    least = float(re.search(r"bits from ([\d.]+),", str(refused.value))[1])  # type: ignore[index]
    build("bitstack", {**knobs, "bits": least}).check(info)
    with pytest.raises(Infeasible):
        build("bitstack", {**knobs, "bits": least - 0.01}).check(info)


def test_patterns_and_ranks_that_do_not_fit_are_refused_before_the_model_exists() -> None:
    info = family_of("tiny-llava/d24").info("tiny-llava/d24", {})
    build("wanda", {"pattern": "4:8"}).check(info)
    odd = replace(info, geometry={**info.geometry, "matrices": ((6, 24, 1), (24, 6, 1))})
    with pytest.raises(Infeasible, match=r"pattern = 4:8 needs inputs in multiples of 8.*has 6; allowed: .*1:2"):
        build("wanda", {"pattern": "4:8"}).check(odd)
    with pytest.raises(Infeasible, match=r"k = 8 exceeds the rank of a 6x24 matrix; allowed: up to 6"):
        build("bitstack", {"k": 8, "bits": 16.0}).check(odd)


def test_a_checkpoint_is_described_with_its_matrices(tmp_path: Path) -> None:
    """Heads that together are wider than the model, fused or not: the skeleton knows."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=36, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    info = family_of("hf:x").info(f"hf:{tmp_path}", {})
    assert summed(info.geometry["matrices"]) == {(64, 36): 2, (32, 36): 4, (36, 64): 2, (80, 36): 4, (36, 80): 2}
    with pytest.raises(Infeasible, match="multiples of 8, and a matrix of the model has 36"):
        build("magnitude", {"pattern": "4:8"}).check(info)


@pytest.mark.parametrize(("name", "knobs", "idle"), [
    ("bitstack", {"sort": "random", "k": 1}, {"n_sort": 7}),
    ("bitstack", {"sort": "weight-error", "k": 1}, {"n_sort": 7}),
    ("gptq", {"bits": 16}, {"group": 64, "damp": 0.1, "n_calib": 3}),
    ("sparsegpt", {"pattern": "2:4"}, {"mask_block": 64}),
    ("sparsegpt", {"sparsity": 0.0}, {"mask_block": 64, "damp": 0.1, "n_calib": 3}),
    ("wanda", {"sparsity": 0.0}, {"compare": "matrix", "n_calib": 3}),
    ("wanda", {"pattern": "2:4"}, {"compare": "matrix"}),
])  # fmt: skip
def test_knobs_without_effect_change_no_stage(name: str, knobs: dict[str, Any], idle: dict[str, Any]) -> None:
    family = family_of("tiny-llava/d24")
    info = family.info("tiny-llava/d24", {})
    weights = family.weights(info, (), 0)
    keys = {build(name, chosen).prepare(info, weights, 0).key for chosen in (knobs, {**knobs, **idle})}  # type: ignore[union-attr]
    assert len(keys) == 1
