"""ToMe and the two baselines against loops, and what every token method of the family must keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isoflop.methods.base import METHODS
from isoflop.methods.vit_tokens.base import InPlace, VitTokenMethod
from isoflop.methods.vit_tokens.cls_topk import VitClsTopK
from isoflop.methods.vit_tokens.probe import VitProbe, untrained_model
from isoflop.methods.vit_tokens.random_drop import VitRandom
from isoflop.methods.vit_tokens.tome import ToMe, soft_matching
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, BlockRun, Signals, TokenState

NAMES = sorted(name for name in METHODS.names() if issubclass(METHODS.get(name), VitTokenMethod))
DROPS = ("vit-random", "vit-cls-topk")


def random_state(batch: int, tokens: int, seed: int, prefix: int = 1) -> tuple[TokenState, Signals]:
    generator = torch.Generator().manual_seed(seed)
    x, q, k = (torch.randn(batch, tokens, 8, generator=generator) for _ in range(3))
    size = torch.randint(1, 4, (batch, tokens, 1), generator=generator).float()
    return TokenState(x, prefix, torch.arange(batch) + seed, size).tracked(), Signals(q, k, None, 2, 0.5)


def matching_by_loop(metric_ND: Tensor, prefix: int, count: int) -> tuple[list[int], dict[int, int]]:
    """ToMe's rule on one image: what stays, in order, and what joins what."""
    even = [i for i in range(prefix, len(metric_ND)) if i % 2 == 0]
    odd = [i for i in range(prefix, len(metric_ND)) if i % 2 == 1]
    best = {}
    for i in even:
        scores = [float(torch.cosine_similarity(metric_ND[i], metric_ND[j], dim=0)) for j in odd]
        place = max(range(len(odd)), key=scores.__getitem__)
        best[i] = (scores[place], odd[place])
    gone = sorted(even, key=lambda i: -best[i][0])[:count]
    return [*range(prefix), *(i for i in even if i not in gone), *odd], {i: best[i][1] for i in gone}


@given(tokens=st.integers(6, 30), prefix=st.integers(0, 3), share=st.floats(0.1, 1.0), seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_soft_matching_equals_a_loop(tokens: int, prefix: int, share: float, seed: int) -> None:
    metric = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(seed))
    count = max(1, int(share * ((tokens - prefix) // 2)))
    plan = soft_matching(metric, prefix, count)
    for b in range(2):
        kept, joins = matching_by_loop(metric[b], prefix, count)
        assert plan.kept_BM[b].tolist() == kept
        assert dict(zip(plan.gone_BR[b].tolist(), plan.into_BR[b].tolist(), strict=True)) == joins


def test_tome_merges_the_most_similar_pair_and_leaves_cls_alone() -> None:
    """CLS is as similar as can be to its neighbour, and still takes no part."""
    keys = torch.nn.functional.one_hot(torch.arange(7)).float()[None]
    keys[0, 1] = keys[0, 0]
    keys[0, 5] = keys[0, 4] + 0.1
    state = TokenState(torch.arange(7.0)[None, :, None], 1, torch.zeros(1, dtype=torch.long))
    out = ToMe().reduce(state, Signals(keys, keys, None, 1, 1.0), 0, 1, 4)
    assert out.x_BNC[0, :, 0].tolist() == [0, 2, 6, 1, 3, 4.5]
    assert out.sizes()[0, :, 0].tolist() == [1, 1, 1, 1, 1, 2]


def test_random_drops_are_ordered_subsets_that_follow_the_example() -> None:
    state, signals = random_state(3, 21, 5)
    out = VitRandom().reduce(state, signals, 1, 12, 4)
    assert out.source_BNM is not None
    places_BM = out.source_BNM.argmax(-1)
    assert bool((places_BM[:, 1:] > places_BM[:, :-1]).all())
    assert bool((places_BM[:, 0] == 0).all())
    others = [VitRandom().reduce(state, signals, 2, 12, 4), VitRandom(draw=1).reduce(state, signals, 1, 12, 4)]
    assert all(not torch.equal(out.x_BNC, other.x_BNC) for other in others)


@pytest.mark.parametrize("prefix", [1, 2])
def test_cls_topk_keeps_what_eager_attention_of_cls_prefers(prefix: int) -> None:
    state, signals = random_state(3, 19, 8, prefix)
    q, k = (t.view(3, 19, 2, 4).transpose(1, 2) for t in (signals.q_BNC, signals.k_BNC))
    weights_BT = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)[:, :, 0].mean(1)[:, prefix:]
    out = VitClsTopK().reduce(state, signals, 0, 9, 4)
    assert out.source_BNM is not None
    for b in range(3):
        best = weights_BT[b].topk(19 - prefix - 9).indices.sort().values
        assert out.source_BNM[b].argmax(-1)[prefix:].tolist() == (best + prefix).tolist()


@pytest.mark.parametrize("name", NAMES)
@given(tokens=st.integers(4, 30), prefix=st.integers(1, 2), share=st.floats(0.0, 1.0), seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_what_every_method_keeps(name: str, tokens: int, prefix: int, share: float, seed: int) -> None:
    """The asked number goes; prefix tokens stay in front; merges conserve sizes and weighted sums, drops keep tokens."""
    method = METHODS.get(name)()
    assert isinstance(method, VitTokenMethod)
    state, signals = random_state(2, tokens, seed, prefix)
    count = max(1, int(share * method.most(state.patches)))
    if method.most(state.patches) < 1:
        return
    out = method.reduce(state, signals, 0, count, 4)
    assert out.x_BNC.shape == (2, tokens - count, 8)
    torch.testing.assert_close(out.x_BNC[:, :prefix], state.x_BNC[:, :prefix])
    assert out.source_BNM is not None
    if name in DROPS:
        assert torch.equal(out.x_BNC, out.source_BNM @ state.x_BNC)
    else:
        torch.testing.assert_close(out.sizes().sum(1), state.sizes().sum(1))
        before, after = ((s.x_BNC * s.sizes()).sum(1) for s in (state, out))
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_proportional_attention_acts_once_tokens_have_merged(name: str) -> None:
    """Merging methods hand log sizes to later attention when asked to, and never before the first merge."""
    probe = VitProbe(examples=2)
    method = METHODS.get(name)(macs=0.6, **({"prop_attn": True} if name not in DROPS else {}))
    assert isinstance(method, VitTokenMethod)
    reduction = InPlace(method, method.plan(probe.model.info))
    biases: list[Tensor | None] = []

    class Spy(InPlace):
        def attention_bias(self, state: TokenState, block: int) -> Tensor | None:
            biases.append(super().attention_bias(state, block))
            return biases[-1]

    run = BlockRun(Spy(reduction.method, reduction.plan), probe.model.info.geometry["prefix"])
    with probe.model.occupy(VISION_BLOCKS, run):
        probe.outputs([0, 1])
    assert biases[0] is None
    if name in DROPS:
        assert biases == [None] * 4
    else:
        assert run.state is not None
        last = biases[-1]
        assert last is not None
        assert last.shape == (2, 1, 1, run.counts[-1][0])
        torch.testing.assert_close(last.exp().sum(-1), torch.full((2, 1, 1), 65.0))


def test_a_second_token_method_in_one_trial_is_refused() -> None:
    model = untrained_model()
    with (
        ToMe().apply(model, None),
        pytest.raises(Exception, match="a trial has one method there"),
        VitRandom().apply(model, None),
    ):
        pass
