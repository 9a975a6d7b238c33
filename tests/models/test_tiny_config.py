"""Sizes, references and options of the tiny family."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.stage import walk
from isoflop.methods.base import build
from isoflop.models.family import FAMILIES, family_of
from isoflop.models.tiny.llava_config import SIZES, initialise, llava_config
from isoflop.models.vlm_info import VlmInfo

N = {"d24": 13_920, "d32": 25_216, "d48": 55_488, "d96": 221_568, "d128": 593_664}


@pytest.mark.parametrize("size", sorted(SIZES))
def test_n_is_the_number_of_parameters_of_the_built_layers(size: str) -> None:
    module = LlavaForConditionalGeneration(llava_config(SIZES[size]))
    built = sum(p.numel() for p in module.model.language_model.layers.parameters())
    assert family_of("tiny-llava/d24").info(f"tiny-llava/{size}", {}).n_params == built
    if size in N:
        assert built == N[size]


def test_members_are_listed_and_the_families_registered() -> None:
    assert {"tiny-llava", "hf"} <= set(FAMILIES)
    assert set(FAMILIES.get("tiny-llava").members()) >= {f"tiny-llava/{size}" for size in N}


def test_unknown_members_and_options_name_the_nearest() -> None:
    family = family_of("tiny-llava/d24")
    with pytest.raises(UserError, match=r"tiny-llava/d94.*did you mean 'tiny-llava/d"):
        family.info("tiny-llava/d94", {})
    with pytest.raises(UserError, match=r"unknown knob of model tiny-llava/d24 'step'.*did you mean 'steps'"):
        family.info("tiny-llava/d24", {"step": 3})
    with pytest.raises(UserError, match="steps = 0 is out of range"):
        family.info("tiny-llava/d24", {"steps": 0})


def test_what_changes_the_weights_changes_version_and_stage() -> None:
    family = family_of("tiny-llava/d24")

    def key(ref: str = "tiny-llava/d24", tokens: int = 4, seed: int = 0, **options: float) -> str:
        stage = family.weights(family.info(ref, options), (build("avgpool", {"tokens": tokens}),), seed)
        assert stage is not None
        return stage.key

    keys = {
        key(),
        key("tiny-llava/d32"),
        key(tokens=9),
        key(seed=1),
        key(steps=10),
        key(vector_lr=0.1),
        key(tower_steps=3),
    }
    assert len(keys) == 7
    assert key() == key(steps=900)
    assert family.info("tiny-llava/d24", {}).version != family.info("tiny-llava/d24", {"steps": 10}).version


def test_cells_of_a_seed_share_tower_and_features() -> None:
    family = family_of("tiny-llava/d24")
    below = []
    for size, tokens in (("d24", 1), ("d96", 36)):
        stage = family.weights(family.info(f"tiny-llava/{size}", {}), (build("avgpool", {"tokens": tokens}),), 0)
        assert stage is not None
        below.append({s.key for s in walk((stage,))} - {stage.key})
    assert below[0] == below[1]
    assert {key.split("-")[0] for key in below[0]} == {"tower", "features"}


def test_two_visual_token_methods_are_infeasible() -> None:
    family = family_of("tiny-llava/d24")
    info = family.info("tiny-llava/d24", {})
    with pytest.raises(Infeasible, match="avgpool and random both take visual_tokens"):
        family.weights(info, (build("avgpool", {}), build("random", {})), 0)
    with pytest.raises(Infeasible, match=r"tokens = 5 .* allowed: 1, 4, 9, 36"):
        family.weights(info, (build("avgpool", {"tokens": 5}),), 0)


def test_initial_weights_depend_on_the_seed_only() -> None:
    def drawn(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        module = LlavaForConditionalGeneration(llava_config(SIZES["d24"]))
        initialise(module, seed)
        return {n: p for n, p in module.named_parameters() if "vision_tower" not in n}

    first, again, other = drawn(1, 10), drawn(1, 20), drawn(2, 10)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_info_is_that_of_a_vision_language_model() -> None:
    info = family_of("tiny-llava/d24").info("tiny-llava/d24", {})
    assert isinstance(info, VlmInfo)
    assert info.geometry["grid"] == 6
    assert info.geometry["visual_tokens"] == 36
