"""The type that a checkpoint computes in: its own unless the sweep says otherwise, in the id of the job either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from isoflop.core.errors import UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.lm import LmBatch, LmModel
from isoflop.sweep.resolve import resolve

WORDS, LENGTH, PADS, PROMPT = 60, 24, 5, 14
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
    "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "windows": lambda: transformers.Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
}
ALLOWED = {"bfloat16": 2**-6, "float16": 2**-9}
"""Of the largest logit: a few roundings to 2^-9 and 2^-12. Measured: .012 and .0013, and as much of transformers' own passes."""


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param) / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    module.to(torch.float16).to(torch.float32).save_pretrained(place)
    return place


def loaded(ref: str, folder: Path, **options: Any) -> LmModel:
    family = family_of(ref)
    model = family.load(family.info(ref, options), None, FolderContext(folder))
    assert isinstance(model, LmModel)
    return model


def batch() -> LmBatch:
    ids = torch.randint(3, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(LENGTH)[None] >= torch.tensor([[0], [PADS]])
    return LmBatch(ids * valid, torch.zeros_like(ids), PROMPT, valid)


@pytest.mark.parametrize("dtype", ALLOWED)
@torch.no_grad()
def test_sixteen_bits_are_as_near_as_they_can_be(dtype: str, folder: Path, tmp_path: Path) -> None:
    """In one pass and step by step, with and without a method on the cache."""
    asked, real = batch(), batch().valid_BT
    exact, model = loaded(f"hf:{folder}", tmp_path), loaded(f"hf:{folder}?dtype={dtype}", tmp_path)
    assert {p.dtype for p in model.module.parameters()} == {getattr(torch, dtype)}
    for name in ("none", "full-cache", "streaming-llm"):
        found, wanted = [], []
        for lm, into in ((model, found), (exact, wanted)):
            if name == "none":
                into.append(lm.logits(asked)[real].float())
                continue
            with build(name, {}).apply(lm, None):
                into += [lm.logits(asked)[real].float(), lm.stepwise_logits(asked)[real].float()]
        for ours, theirs in zip(found, wanted, strict=True):
            off = float((ours - theirs).abs().max() / theirs.abs().max())
            assert 0 < off <= ALLOWED[dtype], name


def job_id(model: Any) -> str:
    sweep = resolve(
        {"name": "x", "models": [model], "methods": [{"knorm": {"keep": [0.5]}}], "tasks": ["generation-latency"]}
    )
    return sweep.jobs_of(next(iter(sweep.space.grid())))[0].id


def stored_as(dtype: str | None, folder: Path, tmp_path: Path) -> str:
    """A checkpoint in another type, as its config says; None for one that does not say."""
    target = tmp_path / str(dtype)
    named = dtype or "float32"
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, named)).save_pretrained(target)
    if dtype is None:
        stored = json.loads((target / "config.json").read_text())
        del stored["dtype"]
        (target / "config.json").write_text(json.dumps(stored))
    return f"hf:{target}"


@pytest.mark.parametrize("own", ["bfloat16", "float16", "float32", None])
def test_the_default_is_the_type_that_the_config_names(own: str | None, folder: Path, tmp_path: Path) -> None:
    ref, named = stored_as(own, folder, tmp_path), own or "float32"
    for options in ({}, {"dtype": "auto"}):
        model = loaded(ref, tmp_path, **options)
        assert {p.dtype for p in model.module.parameters()} == {getattr(torch, named)}
        assert model.info.dense_bits == 8 * getattr(torch, named).itemsize


@pytest.mark.parametrize("own", ["bfloat16", "float32"])
def test_a_job_is_named_by_the_type_that_it_computes_in(own: str, folder: Path, tmp_path: Path) -> None:
    """The default is the job of the type that it stands for; in float32 that is the job of older stores, where no type was named."""
    ref = stored_as(own, folder, tmp_path)
    other = {"bfloat16": "float32", "float32": "bfloat16"}[own]
    assert len({job_id(ref), job_id({ref: {"dtype": "auto"}}), job_id({ref: {"dtype": own}})}) == 1
    assert job_id({ref: {"dtype": other}}) != job_id(ref)
    family = family_of(ref)
    assert family.canonical_options(ref, {}) == ({} if own == "float32" else {"dtype": own})
    for options in ({}, {"dtype": own}, {"dtype": other}, {"served": "bfloat16"}):
        canonical = family.canonical_options(ref, options)
        assert family.info(ref, canonical) == family.info(ref, options)  # what a worker makes of the job


def test_counting_as_served_is_for_what_computes_in_float32(folder: Path, tmp_path: Path) -> None:
    ref = stored_as("bfloat16", folder, tmp_path)
    info = family_of(ref).info
    assert info(ref, {"dtype": "float32"}).dense_bits == 32
    assert info(ref, {"dtype": "float32", "served": "bfloat16"}).dense_bits == 16
    assert info(ref, {"served": "float32"}).dense_bits == 16


def test_options_may_stand_in_the_reference(folder: Path, tmp_path: Path) -> None:
    ref = f"hf:{folder}"
    info, written = family_of(ref).info(ref, {"dtype": "bfloat16"}), family_of(ref).info(f"{ref}?dtype=bfloat16", {})
    assert (written.version, written.options, written.dense_bits) == (info.version, info.options, 16)
    assert written.ref == f"{ref}?dtype=bfloat16"
    with pytest.raises(UserError, match="dtype = 'float16' is given beside the reference"):
        family_of(ref).info(f"{ref}?dtype=bfloat16", {"dtype": "float16"})
    with pytest.raises(UserError, match="dtype = 'bf16' is not allowed"):
        family_of(ref).info(f"{ref}?dtype=bf16", {})
    with pytest.raises(UserError, match="is the same model as"):
        resolve(
            {"name": "x", "models": [ref, f"{ref}?dtype=float32"], "methods": ["none"], "tasks": ["generation-latency"]}
        )
    both = [ref, f"{ref}?served=bfloat16"]
    resolve({"name": "x", "models": both, "methods": ["none"], "tasks": ["generation-latency"]})
