"""The training-time forward pass against the Hugging Face forward, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, LlamaConfig, Qwen2Config

from isoflop.models.training.last_position import LastPosition

SHAPE = {"vocab_size": 11, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 1000.0}


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 3, 38])
def test_equals_the_hugging_face_forward(config_class: type, kv_heads: int, length: int) -> None:
    torch.manual_seed(0)
    config = config_class(**SHAPE, num_key_value_heads=kv_heads, rope_parameters=ROPE, pad_token_id=None)
    decoder = AutoModel.from_config(config)
    for parameter in decoder.parameters():  # also biases and norms, which start at 0 and 1
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    x = torch.randn(5, length, 24, requires_grad=True)
    probe = torch.randn(5, 24)

    def run(hidden: torch.Tensor) -> list[torch.Tensor]:
        decoder.zero_grad()
        x.grad = None
        (hidden * probe).sum().backward()
        return [hidden.detach(), x.grad.clone(), *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)]

    expected = run(decoder(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1])
    found = run(LastPosition(decoder)(x))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)
