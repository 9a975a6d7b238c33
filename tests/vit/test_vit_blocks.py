"""The hook inside vision blocks: nothing changes by itself, nothing is left behind, and it sees what attention sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isoflop.models.hooks.vision_blocks import (
    BlockRun,
    Signals,
    TokenReduction,
    TokenState,
    blocks_of,
    log_sizes,
    reduced_blocks,
)

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
    "attn_implementation": "sdpa",
}


@contextmanager
def reduced(module: nn.Module, prefix: int, reduction: TokenReduction) -> Iterator[BlockRun]:
    """A reduction at work inside an encoder's blocks."""
    run = BlockRun(reduction, prefix)
    with reduced_blocks(blocks_of(module), run):
        yield run


def vit() -> tuple[nn.Module, int]:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=5, **SMALL)), 1


def deit() -> tuple[nn.Module, int]:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(num_labels=5, **SMALL)), 2


def clip() -> tuple[nn.Module, int]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**SMALL)), 1


def siglip() -> tuple[nn.Module, int]:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**SMALL)), 0


ENCODERS = [vit, deit, clip, siglip]


@pytest.fixture(params=ENCODERS, ids=lambda make: make.__name__)
def encoder(request: pytest.FixtureRequest) -> tuple[Any, int]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, prefix = request.param()
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return module.eval().requires_grad_(False), prefix


def pixels(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def output(module: Any, images: Tensor) -> Tensor:
    result = module(images)
    return result.logits if "logits" in result else result.last_hidden_state


class Watching(TokenReduction):
    """Changes nothing and remembers what it was shown."""

    def __init__(self) -> None:
        self.signals: list[Signals] = []

    def after_attention(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        self.signals.append(signals)
        return state


class Breaks(TokenReduction):
    """Fails in the second block."""

    def after_block(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        if block == 1:
            raise RuntimeError("broken")
        return state


class DropsLast(TokenReduction):
    """Drops the last token in every block."""

    def after_attention(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        return replace(state, x_BNC=state.x_BNC[:, :-1])


def test_a_reduction_that_does_nothing_changes_no_bit(encoder: tuple[Any, int]) -> None:
    module, prefix = encoder
    bare = output(module, pixels())
    with reduced(module, prefix, TokenReduction()) as run:
        assert torch.equal(output(module, pixels()), bare)
    assert run.counts == [(16 + prefix, 16 + prefix)] * 3


def test_the_model_is_left_as_it_was(encoder: tuple[Any, int]) -> None:
    module, prefix = encoder
    bare = output(module, pixels())
    hooks = {name: tuple(part._forward_hooks) for name, part in module.named_modules()}
    with pytest.raises(RuntimeError, match="broken"), reduced(module, prefix, Breaks()):
        output(module, pixels())
    assert {name: tuple(part._forward_hooks) for name, part in module.named_modules()} == hooks
    assert not any("forward" in vars(part) for part in module.modules())
    assert torch.equal(output(module, pixels()), bare)


def test_two_reductions_at_once_are_refused(encoder: tuple[Any, int]) -> None:
    module, prefix = encoder
    second = reduced(module, prefix, TokenReduction())
    with (
        reduced(module, prefix, TokenReduction()),
        pytest.raises(RuntimeError, match="another method"),
        second,
    ):
        pass


def test_tokens_dropped_between_attention_and_mlp_stay_dropped(encoder: tuple[Any, int]) -> None:
    module, prefix = encoder
    with reduced(module, prefix, DropsLast()) as run:
        module(pixels())
    tokens = 16 + prefix
    assert run.counts == [(tokens - b, tokens - b - 1) for b in range(3)]
    assert run.state is not None
    assert run.state.x_BNC.shape == (2, tokens - 3, 24)


def test_signals_are_those_of_the_blocks_own_attention(encoder: tuple[Any, int]) -> None:
    """Attention weights computed from captured queries and keys equal those that eager attention returns."""
    module, prefix = encoder
    watching = Watching()
    with reduced(module, prefix, watching):
        module(pixels())
    module.set_attn_implementation("eager")
    expected = module(pixels(), output_attentions=True).attentions
    for signals, attention_BHNN in zip(watching.signals, expected, strict=True):
        torch.testing.assert_close(signals.attention(), attention_BHNN, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(signals.attention(rows=1), attention_BHNN[:, :, :1], atol=1e-6, rtol=1e-5)
        keys_BHND = signals.k_BNC.unflatten(-1, (2, 12)).transpose(1, 2)
        torch.testing.assert_close(signals.mean_key(), keys_BHND.mean(1))


def repeated(count: int) -> Callable[[], TokenReduction]:
    """The last token stands for ``count``: as so many copies, or as one token of that size."""

    class Copies(TokenReduction):
        def start(self, state: TokenState) -> TokenState:
            return replace(state, x_BNC=torch.cat((state.x_BNC, state.x_BNC[:, -1:].expand(-1, count - 1, -1)), 1))

    return Copies


class OneLargeToken(TokenReduction):
    """The last token has the given size, and attention counts it."""

    def __init__(self, size: float) -> None:
        self.size = size

    def start(self, state: TokenState) -> TokenState:
        sizes = state.sizes().clone()
        sizes[:, -1] = self.size
        return replace(state, size_BN1=sizes)

    def attention_bias(self, state: TokenState, block: int) -> Tensor | None:
        return log_sizes(state)


def test_proportional_attention_counts_a_token_as_often_as_its_size(encoder: tuple[Any, int]) -> None:
    """A token of size 4 acts on the others exactly as four copies of it do."""
    module, prefix = encoder
    with reduced(module, prefix, repeated(4)()) as copies:
        module(pixels())
    with reduced(module, prefix, OneLargeToken(4.0)) as large:
        module(pixels())
    assert copies.state is not None
    assert large.state is not None
    torch.testing.assert_close(copies.state.x_BNC[:, : 16 + prefix], large.state.x_BNC, atol=1e-5, rtol=1e-4)


def test_sources_start_as_every_token_itself() -> None:
    state = TokenState(torch.randn(2, 5, 3), 1, torch.arange(2)).tracked()
    assert state.source_BNM is not None
    assert torch.equal(state.source_BNM, torch.eye(5).expand(2, 5, 5))
    assert state.patches == 4


def test_an_encoder_without_known_blocks_has_none() -> None:
    assert blocks_of(nn.TransformerEncoderLayer(8, 2)) == ()
