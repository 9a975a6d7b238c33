"""A GGUF file as a checkpoint: values, tied embeddings, order of rows, tokenizer; on a tiny Llama that the test writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isoflop.core.errors import UserError
from isoflop.fetch.gguf import check_rows, convert, unpaired

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

WIDTH, HEADS, KV_HEADS, LAYERS, MLP = 64, 4, 2, 2, 96
WORDS = [*map(chr, range(33, 127)), "Ġ", "th", "<|end|>"]


def paired(rows_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter writes them."""
    out, inside = rows_OI.shape
    return rows_OI.reshape(heads, 2, out // heads // 2, inside).swapaxes(1, 2).reshape(out, inside)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GGUF file with Q4_1 matrices, and the weights that it stands for."""
    from gguf.quants import dequantize, quantize
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    state = LlamaForCausalLM(config).state_dict()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 1) + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(len(WORDS) - 1)
    writer.add_bos_token_id(len(WORDS) - 1)

    def add(theirs: str, ours: str, heads: int = 0) -> None:
        values = state[ours].float().numpy()
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
            return
        packed = quantize(paired(values, heads) if heads else values, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(theirs, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        dense = dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        state[ours] = torch.from_numpy(unpaired(dense, heads) if heads else dense)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    for n in range(LAYERS):
        layer = f"model.layers.{n}."
        add(f"blk.{n}.attn_norm.weight", f"{layer}input_layernorm.weight")
        add(f"blk.{n}.ffn_norm.weight", f"{layer}post_attention_layernorm.weight")
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", 0)):
            add(f"blk.{n}.attn_{part}.weight", f"{layer}self_attn.{part}_proj.weight", heads)
        add(f"blk.{n}.attn_output.weight", f"{layer}self_attn.o_proj.weight")
        for part in ("gate", "up", "down"):
            add(f"blk.{n}.ffn_{part}.weight", f"{layer}mlp.{part}_proj.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, state


@pytest.fixture(scope="module")
def converted(written: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("converted")
    return folder, convert(written[0], folder)


def test_weights_are_those_of_the_file_with_rows_in_order(
    written: tuple[Path, Any], converted: tuple[Path, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(converted[0], local_files_only=True)
    for name, tensor in written[1].items():
        if name != "lm_head.weight":
            torch.testing.assert_close(module.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    assert not hasattr(module.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(converted[0], local_files_only=True)("ab")["input_ids"] == [64, 65]
    check_rows(written[0], converted[1])


@pytest.mark.parametrize("part", ["q", "k"])
def test_rows_in_the_files_own_order_are_noticed(
    written: tuple[Path, Any], converted: tuple[Path, Any], part: str
) -> None:
    weight = getattr(converted[1].model.layers[-1].self_attn, f"{part}_proj").weight
    right = weight.data.clone()
    heads = HEADS if part == "q" else KV_HEADS
    weight.data = torch.from_numpy(paired(right.numpy(), heads))
    try:
        with pytest.raises(UserError, match=f"rows of model.layers.1.self_attn.{part}_proj.weight"):
            check_rows(written[0], converted[1])
    finally:
        weight.data = right


def test_the_order_is_undone() -> None:
    rows_OI = np.arange(24.0).reshape(8, 3)
    assert not np.array_equal(paired(rows_OI, 2), rows_OI)
    np.testing.assert_array_equal(unpaired(paired(rows_OI, 2), 2), rows_OI)


def test_what_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x\.gguf: transformers cannot read it \(.+\)"):
        convert(tmp_path / "x.gguf", tmp_path)


@torch.no_grad()
def test_a_file_is_a_model_by_itself(written: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Config, weights and tokenizer come from the file; whatever else lies in the folder is not looked at."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from isoflop.core.folder_context import FolderContext
    from isoflop.methods.base import build
    from isoflop.models.family import family_of
    from isoflop.models.lm import LmBatch, LmModel

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(written[0].read_bytes())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("not looked at")
    ref = f"hf:{folder}?gguf=tiny.gguf"
    family = family_of(ref)
    info = family.info(ref, {})
    model = family.load(info, None, FolderContext(tmp_path / "cache"))
    assert isinstance(model, LmModel)
    assert info == family.info(ref, {"dtype": "float32"})
    assert (info.dense_bits, info.geometry["positions"], info.geometry["kv_heads"]) == (32, 128, KV_HEADS)
    assert model.tokenizer("ab")["input_ids"] == [64, 65]
    assert "tokenizer" in info.offers
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    stock = LlamaForCausalLM(config).eval()
    stock.load_state_dict({**written[1], "lm_head.weight": written[1]["model.embed_tokens.weight"]})
    ids = torch.randint(0, len(WORDS), (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = stock(input_ids=ids).logits
    batch = LmBatch(ids, torch.zeros_like(ids), 7)
    torch.testing.assert_close(model.logits(LmBatch(ids, torch.zeros_like(ids))), wanted, atol=1e-5, rtol=1e-4)
    with build("full-cache", {}).apply(model, None):
        torch.testing.assert_close(model.stepwise_logits(batch), wanted, atol=1e-5, rtol=1e-4)
    half = family.load(family.info(ref, {"dtype": "bfloat16"}), None, FolderContext(tmp_path / "cache"))
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}  # type: ignore[attr-defined]


def test_a_changed_file_is_another_version(written: tuple[Path, Any], tmp_path: Path) -> None:
    from isoflop.models.family import family_of

    ref = f"hf:{tmp_path}?gguf=a.gguf"
    (tmp_path / "a.gguf").write_bytes(written[0].read_bytes())
    before = family_of(ref).info(ref, {})
    data = bytearray(written[0].read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.gguf").write_bytes(bytes(data))
    assert family_of(ref).info(ref, {}).version != before.version


def test_a_broken_file_is_refused_when_a_sweep_is_planned(tmp_path: Path) -> None:
    from isoflop.models.family import family_of

    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x\.gguf: transformers cannot read it \(.+\)") as error:
        family_of("hf:").info(f"hf:{tmp_path}", {"gguf": "x.gguf"})
    assert "\n" not in str(error.value)
