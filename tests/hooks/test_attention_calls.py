"""A layer's attention runs once per pass where methods act on the cache; other decoders are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from isoflop.core.errors import Infeasible
from isoflop.methods.kv_cache.base import CompressedCache
from isoflop.methods.kv_cache.full_cache import FullCache
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.tiny.vision import save_preprocessing

SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}  # fmt: skip


@pytest.mark.parametrize("inside", ["language model", "vision-language model"])
def test_a_decoder_that_calls_attention_twice_per_layer_is_refused_when_planned(inside: str, tmp_path: Path) -> None:
    config: Any = transformers.DiffLlamaConfig(**SHAPE, architectures=["DiffLlamaForCausalLM"])
    if inside != "language model":
        config = transformers.LlavaConfig(
            text_config=config,
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_id=5,
            vision_feature_layer=-1,
            architectures=["LlavaForConditionalGeneration"],
        )
    config.save_pretrained(tmp_path)
    save_preprocessing(tmp_path, VISION["image_size"])
    with pytest.raises(
        Infeasible, match=r"DiffLlama\w+ calls its attention 2 times per pass in layer 0.*allowed"
    ) as error:
        family_of("hf:x").info(f"hf:{tmp_path}", {})
    assert "\n" not in str(error.value)


def test_experts_that_cannot_run_without_weights_are_still_seen_through(tmp_path: Path) -> None:
    """What comes behind the attention of a layer may look at values, which a pass without weights does not have."""
    config = transformers.MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    geometry = family_of("hf:x").info(f"hf:{tmp_path}", {}).geometry
    assert (geometry["layers"], geometry["heads"], geometry["kv_heads"]) == (3, 4, 2)


@torch.no_grad()
def test_a_layer_that_runs_twice_in_a_pass_is_refused_by_its_number() -> None:
    """Not counted as later tokens; and the next pass, of a decoder that is whole again, works as ever."""
    probe = KvCacheProbe()
    model, batch = probe.model, probe.batch([0])
    layers = model.decoder_layers
    second = layers[1]
    cache = CompressedCache(FullCache(), None, 16)
    with model.occupy(ATTENTION, cache):
        expected = model.logits(batch)
        layers[1] = layers[0]  # a decoder that loops over its first layer
        with pytest.raises(Infeasible, match="layer 0 of LlamaModel calls its attention twice in one pass"):
            model.logits(batch)
        with pytest.raises(Infeasible, match="layer 0"):
            model.stepwise_logits(batch)
        layers[1] = second
        assert torch.equal(model.logits(batch), expected)
    assert not model.decoder._forward_pre_hooks
    assert not model.decoder._forward_hooks
