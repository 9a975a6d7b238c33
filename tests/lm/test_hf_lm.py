"""Language-model checkpoints of the family ``hf``: the attention hook gives stock logits; what it cannot serve is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_cases import RECALL, TEXT

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.lm import LmBatch, LmInfo, LmModel
from isoflop.tasks.base import TASKS

LENGTH, PADS, PROMPT, WORDS = 24, 5, 14, 60
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GQA = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
CONFIGS: dict[str, Any] = {
    "Llama": lambda: transformers.LlamaConfig(**GQA),
    "Qwen2": lambda: transformers.Qwen2Config(**GQA),
    "Qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=8),
    "Mistral": lambda: transformers.MistralConfig(**GQA, sliding_window=None),
    "GPTNeoX": lambda: transformers.GPTNeoXConfig(**SHAPE, intermediate_size=48, initializer_range=0.2),
    "OPT": lambda: transformers.OPTConfig(
        **{**SHAPE, "pad_token_id": 1}, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2
    ),
    "GPT2": lambda: transformers.GPT2Config(
        **{**SHAPE, "n_positions": SHAPE["max_position_embeddings"]}, initializer_range=0.2
    ),
}


def saved(config: Any, folder: Path) -> str:
    """An untrained model of a config in a folder; its reference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return f"hf:{folder}"


def loaded(ref: str, folder: Path) -> LmModel:
    family = family_of(ref)
    info = family.info(ref, {})
    assert isinstance(info, LmInfo)
    model = family.load(info, None, FolderContext(folder))
    assert isinstance(model, LmModel)
    return model


def padded() -> LmBatch:
    """Two sequences with padding of different length on the left."""
    ids = torch.randint(3, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(LENGTH)[None] >= torch.tensor([[0], [PADS]])
    return LmBatch(ids * valid, torch.zeros_like(ids), PROMPT, valid)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LmModel:
    folder = tmp_path_factory.mktemp(request.param)
    return loaded(saved(CONFIGS[request.param](), folder / "model"), folder)


@torch.no_grad()
def test_the_attention_hook_gives_stock_logits(model: LmModel) -> None:
    """To a few times what float32 leaves of the stock pass itself, which is taken anew in float64: 1.7 times at most over six
    seeds and three instruction sets, where attention weights rounded to float16 are off by 400 times and more."""
    batch = padded()
    stock = model.logits(batch)
    exact = LmModel(model.info, copy.deepcopy(model.module).double()).logits(batch)
    assert stock.dtype == torch.float32
    rounding = (stock - exact)[batch.valid_BT].abs().max()
    assert rounding <= 5e-6 * stock.abs().max()
    with build("full-cache", {}).apply(model, None):
        plain = model.logits(LmBatch(batch.ids_BT, batch.targets_BT, 0, batch.valid_BT))
        together, alone = model.logits(batch), model.stepwise_logits(batch)
    real = batch.valid_BT
    for ours in (plain, together, alone):
        assert ((ours - stock)[real]).abs().max() <= 5 * rounding


MIXED = ["sliding_attention", "full_attention"]
WINDOWED: dict[str, Any] = {
    "Qwen2": lambda: transformers.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=6, layer_types=MIXED),
    "Gemma3": lambda: transformers.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=6, layer_types=MIXED),
}


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_windows_in_some_layers_are_described_and_counted(name: str, tmp_path: Path) -> None:
    model = loaded(saved(WINDOWED[name](), tmp_path / "model"), tmp_path)
    assert model.info.geometry["windows"] == (6, None)
    token = 2 * 2 * 8 * 4
    assert [model.dense_cache_bytes(tokens) for tokens in (5, 20)] == [10 * token, 26 * token]
    batch = padded()
    stock = model.logits(LmBatch(batch.ids_BT, batch.targets_BT, 0, batch.valid_BT))
    with build("full-cache", {}).apply(model, None):
        for found in (model.logits(batch), model.stepwise_logits(batch)):
            torch.testing.assert_close(found[batch.valid_BT], stock[batch.valid_BT], atol=1e-5, rtol=1e-4)


def test_a_window_that_no_text_leaves_is_none(tmp_path: Path) -> None:
    """Phi-3 with long contexts: a window of 262,144 tokens, and room for 131,072."""
    wide = transformers.MistralConfig(**GQA, sliding_window=SHAPE["max_position_embeddings"])
    model = loaded(saved(wide, tmp_path / "model"), tmp_path)
    assert "windows" not in model.info.geometry
    assert model.dense_cache_bytes(64) == 2 * 64 * 2 * 2 * 8 * 4


def test_an_attention_that_is_not_told_of_its_window_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isoflop.models.hooks import attention

    monkeypatch.setattr(attention, "_window", lambda module, given: None)
    with pytest.raises(Infeasible, match="hands none to its attention in layer 0"):
        loaded(saved(WINDOWED["Gemma3"](), tmp_path / "model"), tmp_path)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model: LmModel) -> None:
    batch = padded()
    bare = LmBatch(batch.ids_BT[1:, PADS:], batch.targets_BT[1:, PADS:], PROMPT - PADS)
    with build("full-cache", {}).apply(model, None):
        assert torch.allclose(model.logits(batch)[1:, PADS:], model.logits(bare), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_described_from_its_config(model: LmModel) -> None:
    info = model.info
    assert info.n_params == sum(p.numel() for n, p in model.module.named_parameters() if _in_a_layer(n))
    assert info.dense_bits == 32
    assert info.geometry["heads"] * info.geometry["head_width"] == 32
    assert info.geometry["positions"] == 64
    assert "tokenizer" not in info.offers
    with pytest.raises(Infeasible, match="neither a tokenizer nor a known vocabulary"):
        next(model.calibration(FolderContext("unused"), 1, 0))


def _in_a_layer(name: str) -> bool:
    return any(part in name for part in (".layers.", ".h."))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.FalconConfig(**SHAPE), r"FalconForCausalLM does not call its attention through"),
        (transformers.MistralConfig(**GQA, sliding_window=16), r"attends within windows .*16"),
        (
            transformers.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=16, layer_types=["sliding_attention"] * 2),
            r"within windows \(sliding_attention, sliding_window = 16\) in every layer",
        ),
        (transformers.Llama4TextConfig(**GQA, head_dim=8), r"attends within windows \(chunked_attention\)"),
    ],
    ids=["falcon", "mistral with windows", "windows everywhere", "chunks"],
)  # fmt: skip
def test_other_attention_is_refused_when_a_sweep_is_planned(config: Any, message: str, tmp_path: Path) -> None:
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    with pytest.raises(Infeasible, match=message) as error:
        family_of("hf:x").info(f"hf:{tmp_path}", {})
    assert "\n" not in str(error.value)


def test_texts_end_where_they_would_be_rotated_in_another_way(tmp_path: Path) -> None:
    """LongRoPE has other frequencies for long texts: the first step behind that length would not be what one pass gives."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    config = transformers.Phi3Config(
        **GQA, original_max_position_embeddings=16, rope_parameters=rope, architectures=["Phi3ForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    assert config.max_position_embeddings == 64
    assert family_of("hf:x").info(f"hf:{tmp_path}", {}).geometry["positions"] == 16


def test_a_config_that_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**GQA, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for change in ({"hidden_size": "wide"}, {"num_attention_heads": 0}, {"model_type": "llamma"}):
        (tmp_path / "config.json").write_text(json.dumps({**stored, **change}))
        with pytest.raises(UserError) as error:
            family_of("hf:x").info(f"hf:{tmp_path}", {})
        assert "\n" not in str(error.value)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}')
    with pytest.raises(Infeasible, match=r"T5ForConditionalGeneration is not supported; allowed: .*ForCausalLM"):
        family_of("hf:x").info(f"hf:{tmp_path}", {})


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    ref = saved(CONFIGS["Llama"](), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    info = family_of(ref).info(ref, {})
    with pytest.raises(UserError, match=r"no \*\.safetensors file"):
        family_of(ref).load(info, None, FolderContext(tmp_path))


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path: Path) -> None:
    """Transformers fills in what a folder lacks, and says so in a table that nobody reads."""
    from safetensors.torch import load_file, save_file

    ref = saved(CONFIGS["Llama"](), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if "layers.1.mlp" not in name}, path, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"needs model\.layers\.1\.mlp\.down_proj\.weight and 2 more, which its safetensors"
    ):
        family_of(ref).load(family_of(ref).info(ref, {}), None, FolderContext(tmp_path / "stages"))


def test_bfloat16_counts_sixteen_bits(tmp_path: Path) -> None:
    ref = saved(CONFIGS["Llama"](), tmp_path)
    family = family_of(ref)
    model = family.load(family.info(ref, {"dtype": "bfloat16"}), None, FolderContext(tmp_path / "cache"))
    assert model.info.dense_bits == 16
    for options, bits in (
        ({"served": "bfloat16"}, 16),  # runs in float32 and counts as it would be served
        ({"served": "float32"}, 32),
        ({"dtype": "bfloat16", "served": "float32"}, 16),
    ):
        assert family.info(ref, options).dense_bits == bits
    assert family.canonical_options(ref, {"served": ""}) == {}  # ids of jobs that do not name it stay
    assert model.dense_weight_bytes() >= 2 * sum(p.numel() for p in model.module.parameters())


def test_a_checkpoint_with_a_tokenizer_does_what_the_tiny_model_in_it_does(
    text_lm: LmModel, lm_ctx: FolderContext
) -> None:
    weights = family_of(TEXT).weights(text_lm.info, (), 0)
    assert weights is not None
    ref = f"hf:{lm_ctx.get(weights).folder}"
    info = family_of(ref).info(ref, {})
    assert "tokenizer" in info.offers
    assert info.n_params == text_lm.info.n_params
    checkpoint = family_of(ref).load(info, None, lm_ctx)
    task = TASKS.get("bits-per-byte")(examples=4, tokens=48)  # type: ignore[call-arg]
    errors = [next(iter(task.evaluate(model, lm_ctx, 0))).errors for model in (text_lm, checkpoint)]
    assert (errors[0] == errors[1]).all()
    assert task.measure(checkpoint, lm_ctx)["weight_bytes"] == 2 * task.measure(text_lm, lm_ctx)["weight_bytes"]
    rows = [b.ids_BT for b in checkpoint.calibration(lm_ctx, 3, 0)]
    assert sum(map(len, rows)) == 3


def test_a_checkpoint_declares_the_world_of_symbols(recall_lm: LmModel, lm_ctx: FolderContext) -> None:
    weights = family_of(RECALL).weights(recall_lm.info, (), 0)
    assert weights is not None
    ref = f"hf:{lm_ctx.get(weights).folder}"
    info = family_of(ref).info(ref, {})
    TASKS.get("kv-recall")().check(info)
    checkpoint = family_of(ref).load(info, None, lm_ctx)
    assert sum(len(b.ids_BT) for b in checkpoint.calibration(lm_ctx, 20, 0)) == 20


def test_a_gguf_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"")
    for name in ("model-q5.gguf", "../model-q4.gguf"):
        with pytest.raises(UserError, match=r"holds no GGUF file .*allowed: model-q4\.gguf$"):
            family_of("hf:").info(f"hf:{tmp_path}?gguf={name}", {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'isoflop\[gguf\]'"):
        family_of("hf:").info(f"hf:{tmp_path}?gguf=model-q4.gguf", {})
