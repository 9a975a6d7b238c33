"""Memory grows with tokens and not with their square: the largest tensor of reading and scoring, at T and 2 T tokens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from allocations import Allocations
from kv_cases import a_call, probabilities, small

from isoflop.kernels import blocks
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.base import CompressedCache, KvCacheMethod
from isoflop.methods.kv_cache.eviction import Rolling
from isoflop.methods.kv_cache.probe import VOCABULARY, KvCacheProbe
from isoflop.models.contexts import read_contexts
from isoflop.models.hooks.attention import ATTENTION, causal_attention
from isoflop.models.whole_cache import WholeCache

NAMES = [name for name in METHODS.names() if issubclass(METHODS.get(name), KvCacheMethod)]
QUADRATIC: dict[str, str] = {}
"""Methods whose definition asks for every pair of tokens at once, and why. None does: scores are sums over queries, in blocks."""
ONE_BY_ONE = {"mikv", "minicache", "lococo"}
"""Take each token behind the prompt in a step of its own, as rolling caches do."""
TOKENS = 400


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    made = KvCacheProbe(layers=3)
    made.model.info.geometry["positions"] = 10 * TOKENS  # its rotations know no end
    return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At these lengths one block of the usual size would hold everything."""
    monkeypatch.setattr(blocks, "BLOCK_VALUES", dict.fromkeys(("cpu", "cuda"), 1 << 15))


def largest(probe: KvCacheProbe, method: KvCacheMethod | None, tokens: int, padding: int) -> int:
    """Numbers of the largest tensor of scoring what is behind a context and one with so much padding (none: the same again)."""
    rng = torch.Generator().manual_seed(0)
    one_by_one = isinstance(method, Rolling) or (method is not None and method.name in ONE_BY_ONE)
    tail = tokens // (16 if one_by_one else 4)
    contexts, tails = (
        [torch.randint(VOCABULARY, (n,), generator=rng).tolist() for n in lengths]
        for lengths in ((tokens, tokens - padding), (tail, tail))
    )
    applied = nullcontext() if method is None else method.apply(probe.model, probe.prepared(method, 0))
    with applied, Allocations() as seen, read_contexts(probe.model, contexts) as read:
        read.score(tails, [1, 1])
    return seen.largest


@pytest.mark.parametrize("padding", [pytest.param(0, marks=pytest.mark.slow), 100])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUADRATIC])
def test_no_tensor_grows_with_the_square_of_the_tokens(name: str, padding: int, probe: KvCacheProbe) -> None:
    method = small(name)
    assert isinstance(method, KvCacheMethod)
    short, long = (largest(probe, method, n * TOKENS, n * padding) for n in (1, 2))
    assert long <= 2.2 * short


def test_nor_does_one_where_nothing_acts(probe: KvCacheProbe) -> None:
    """Contexts of one length, as long ones come in batches: see ``test_long_contexts_that_would_need_a_mask_stand_apart``."""
    short, long = (largest(probe, None, n * TOKENS, 0) for n in (1, 2))
    assert long <= 2.2 * short


@torch.no_grad()
def test_nor_in_steps_behind_a_whole_cache(probe: KvCacheProbe) -> None:
    ids = torch.randint(VOCABULARY, (1, 4 * TOKENS), generator=torch.Generator().manual_seed(0))
    whole = WholeCache(16)
    found = []
    for tokens in (TOKENS, 2 * TOKENS):
        with probe.model.occupy(ATTENTION, whole), whole.session():
            probe.model.module(ids[:, :tokens], use_cache=False)
            positions = torch.arange(tokens, 2 * tokens)[None]
            with Allocations() as seen:
                probe.model.module(ids[:, tokens : 2 * tokens], position_ids=positions, use_cache=False)
            found.append(seen.largest)
    assert found[1] <= 2.2 * found[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_blocks_of_queries_change_nothing(name: str, probe: KvCacheProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one query each, and of all: also where choices and tiers depend on how many tokens there are."""
    monkeypatch.setattr(blocks, "LEAST_ROWS", 1)
    method, batch = small(name), probe.batch([0, 1, 2])
    found = []
    for values in (1, 1 << 22):
        monkeypatch.setattr(blocks, "BLOCK_VALUES", dict.fromkeys(("cpu", "cuda"), values))
        with method.apply(probe.model, probe.prepared(method, 0)):
            assert isinstance(probe.model.occupant(ATTENTION), CompressedCache)
            found.append(probe.model.logits(batch))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "valid",
    [
        [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],  # on the left, neighbours alike
        [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0]],  # on either side, others between
        [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]],  # with gaps, and nothing at all
    ],
)
def test_padding_is_left_out_without_a_mask(valid: list[list[int]]) -> None:
    call = a_call(5, rows=3, pads=(0, 0, 0))
    call.valid_BT.copy_(torch.tensor(valid))  # type: ignore[union-attr]
    v_BHTD = call.v_BGTD.repeat_interleave(2, dim=1).double()
    expected = (probabilities(call) @ v_BHTD).transpose(1, 2)  # zeros at padding
    torch.testing.assert_close(causal_attention(call).double(), expected, rtol=1e-5, atol=1e-5)
