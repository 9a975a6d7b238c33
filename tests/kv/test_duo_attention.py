"""DuoAttention: numbers of the released code, what each kind of head sees, texts with passkeys, and the training of the gates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, HEADS, WIDTH, a_call, one_row, probabilities, stepped
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.methods.kv_cache import streaming
from isoflop.methods.kv_cache.base import append_recent, slice_call
from isoflop.methods.kv_cache.duo_attention import DuoAttention, Gates, mixture
from isoflop.methods.kv_cache.passkeys import FIRST_SYMBOL, passkey_texts
from isoflop.methods.kv_cache.probe import VOCABULARY, KvCacheProbe
from isoflop.methods.kv_cache.streaming import sees, streaming_attention
from isoflop.methods.own_weights import trained
from isoflop.models.base import Checkpoint
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.segments import stored_bytes
from isoflop.testing.snapshot import Snapshot

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "duo_attention.json").read_text())
"""What mit-han-lab/duo-attention (commit fe93c31) gives on ``official()`` with 3 sinks and 6 recent tokens: rows of
``generate_streaming_mask``; every 37th output of ``llama_duo_attention_forward_two_way`` with gates .3 and 1.4, whose teacher is
``official(6)`` or the same; every 23rd output of ``llama_duo_attention_forward_one_way_reordered`` for the tokens behind a prompt of 25
or 4, the first head full; and tokens that a streaming head holds in the end."""
FIRST = {0: torch.tensor([True, False])}
"""Of two heads the first keeps everything."""


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(layers=3)


def official(seed: int = 5) -> AttentionCall:
    rng = torch.Generator().manual_seed(seed)
    call = a_call(40)
    q, k, v = (
        torch.randn(2, heads, 40, WIDTH, generator=rng) * scale
        for heads, scale in ((HEADS, 2.0), (GROUPS, 1.0), (GROUPS, 1.0))
    )
    return replace(call, q_BHTD=q, k_BGTD=k, v_BGTD=v, ids_BT=None)


def duo(**knobs: Any) -> DuoAttention:
    return DuoAttention(**{"sinks": 3, "recent": 6, **knobs})


@pytest.mark.parametrize("teacher", ["own", "teacher"])
def test_mixtures_are_those_of_the_released_code(teacher: str) -> None:
    own, other = official(), official(6 if teacher == "teacher" else 5)
    gates = torch.tensor([0.3, 1.4])
    found = mixture(causal_attention(other), streaming_attention(own, 3, 6), gates)
    torch.testing.assert_close(found.flatten()[::37], torch.tensor(NUMBERS[f"two-way-{teacher}"]), atol=2e-5, rtol=2e-5)
    places = torch.arange(40)
    assert sees(places[:, None], places, 3, 6).sum(-1).tolist() == NUMBERS["mask-rows"]


@pytest.mark.parametrize(("case", "prompt"), [("decode", 25), ("decode-short", 4)])
def test_tokens_behind_a_prompt_read_what_they_read_in_the_released_code(case: str, prompt: int) -> None:
    found, store = stepped(duo(), official(), prompt, FIRST)
    torch.testing.assert_close(found.flatten()[::23], torch.tensor(NUMBERS[case]), atol=2e-5, rtol=2e-5)
    assert store.segments[1].tokens == NUMBERS[f"{case}-kept"]
    assert store.segments[0].tokens == 40


@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (2, 5), (4, 100), (30, 3)])
def test_streaming_attention_is_the_masked_softmax(sinks: int, recent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry by entry, whatever the blocks of queries, also where rows are padded."""
    monkeypatch.setattr(streaming, "LEAST_BLOCK", 7)
    call = a_call(40, pads=(0, 11))
    p_BHTT = probabilities(call)
    for row, start in enumerate((0, 11)):
        for i in range(start, 40):
            places = [j for j in range(start, i + 1) if j - start < sinks or j > i - recent]
            p_HN = p_BHTT[row, :, i, places]
            p_HN = p_HN / p_HN.sum(-1, keepdim=True)
            v_HND = call.v_BGTD[row, :, places].repeat_interleave(HEADS // GROUPS, 0).double()
            found = streaming_attention(call, sinks, recent)[row, i] if i % 13 == 0 else None
            if found is not None:
                torch.testing.assert_close(found.double(), (p_HN[:, None] @ v_HND)[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pads", [None, (0, 12), (29, 3)])
def test_each_kind_of_head_keeps_what_it_should(pads: tuple[int, int] | None) -> None:
    """Sinks and the newest tokens, behind the prompt and at every step."""
    call, method = a_call(50, pads=pads), duo()
    for end in (32, 45):
        part = slice_call(call, 0, end)
        store = method.compress(part, FIRST) if end == 32 else stepped(method, part, 32, FIRST)[1]
        full, short = store.segments
        assert full.heads_G is not None
        assert short.heads_G is not None
        assert (full.heads_G.tolist(), short.heads_G.tolist()) == ([True, False], [False, True])
        for row, start in enumerate(pads or (0, 0)):
            seen = end - start
            for segment, expected in (
                (full, list(range(seen))),
                (short, sorted({*range(min(3, seen)), *range(max(0, seen - 6), seen)})),
            ):
                live = slice(None) if segment.log_bias_BGN is None else segment.log_bias_BGN[row, 0] == 0
                assert segment.positions_BGN[row, 0, live].tolist() == expected


@pytest.mark.parametrize("pads", [(0, 12), (29, 3)])
def test_no_row_sees_another_and_tokens_may_come_together(pads: tuple[int, int]) -> None:
    call, method = a_call(50, pads=pads), duo()
    together, _ = stepped(method, call, 32, FIRST)
    for row, start in enumerate(pads):
        alone, _ = stepped(method, one_row(call, row, start), 32 - start, FIRST)
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)
    _, store = method.prefill(slice_call(call, 0, 32), FIRST)
    outs = []
    for start in (32, 43):
        piece = slice_call(call, start, {32: 43, 43: 50}[start])
        append_recent(store, piece)
        outs.append(method.step(piece, store, FIRST))
    torch.testing.assert_close(torch.cat(outs, dim=1), together, atol=1e-5, rtol=1e-5)


def test_a_prompt_may_be_read_through_the_windows() -> None:
    call = a_call(40, pads=(0, 5))
    exact, windows = (duo(prompt=prompt).prefill(call, FIRST)[0] for prompt in ("exact", "streaming"))
    real = call.valid_BT
    assert real is not None
    torch.testing.assert_close(exact[real], causal_attention(call)[real])
    torch.testing.assert_close(windows[real][:, :2], exact[real][:, :2])
    torch.testing.assert_close(windows[real][:, 2:], streaming_attention(call, 3, 6)[real][:, 2:])


@pytest.mark.parametrize("knobs", [{"full": 1.0}, {"recent": 1000}])
def test_what_keeps_everything_is_dense(knobs: dict[str, Any], probe: KvCacheProbe) -> None:
    bare = probe.outputs([0, 1])
    with duo(**knobs).apply(probe.model, Gates(3, GROUPS)):
        torch.testing.assert_close(probe.outputs([0, 1]), bare, atol=1e-5, rtol=1e-5)


def test_the_largest_gates_of_all_layers_keep_everything(probe: KvCacheProbe) -> None:
    gates = Gates(3, GROUPS)
    gates.gates_LG.data = torch.tensor([[0.1, 0.9], [-3.0, 0.2], [1.5, 0.4]])
    expected = [[False, True], [False, False], [True, True]]
    with duo().apply(probe.model, gates), torch.no_grad():
        cache = duo().cache(probe.model)
        with cache.session():
            probe.model.module(probe.batch([0]).ids_BT[:, :30], use_cache=False)
            stores = cache.stores()
    for layer, full in enumerate(expected):
        tokens = [30 if whole else 9 for whole in sorted(full, reverse=True)]
        found = [
            s.tokens
            for s in stores[layer].segments
            for _ in range(GROUPS if s.heads_G is None else int(s.heads_G.sum()))
        ]
        assert found == tokens
        if any(full) and not all(full):
            assert stores[layer].segments[0].heads_G.tolist() == full  # type: ignore[union-attr]


def test_bytes_cost_each_head_what_it_keeps() -> None:
    """40 tokens of one head and 9 of the other, 8 wide, at 2 bytes; behind 5 more tokens 45 and still 9."""
    call = a_call(45, rows=1)
    assert stored_bytes(duo().compress(slice_call(call, 0, 40), FIRST).resident(), 16) == (40 + 9) * 2 * WIDTH * 2
    assert stored_bytes(stepped(duo(), call, 40, FIRST)[1].resident(), 16) == (45 + 9) * 2 * WIDTH * 2


def test_symbols_come_back_behind_their_first_one(probe: KvCacheProbe) -> None:
    found = list(passkey_texts(probe.model, probe.ctx, 3, 42, 2, 5, 0))
    assert len(found) == 3
    for text in found:
        ids = text.ids_BT[0].tolist()
        assert len(ids) == 42
        assert min(ids[1:]) >= FIRST_SYMBOL
        asked = text.questions_BT[0].nonzero()[:, 0].tolist()
        assert text.answers_BT[0].nonzero()[:, 0].tolist() == [n for a in asked for n in range(a + 1, a + 5)]
        for place in asked:
            first = ids.index(ids[place])
            assert first < place
            assert ids[first : first + 5] == ids[place : place + 5]
    assert len({tuple(text.ids_BT[0].tolist()) for text in found}) == 3


def test_words_are_hidden_in_text_and_asked_for_at_its_end(tmp_path: Path) -> None:
    """Whatever the tokenizer makes of them."""
    ctx, family = FolderContext(tmp_path), family_of("tiny-lm/facts-d64")
    info = family.info("tiny-lm/facts-d64", {"steps": 1, "batch": 2})
    model: Any = family.load(info, family.weights(info, (), 0), ctx)
    for text in passkey_texts(model, ctx, 2, 400, 2, 3, 0):
        ids = text.ids_BT[0]
        assert abs(len(ids) - 400) <= 1
        assert text.answers_BT.any()
        assert not (text.answers_BT & text.questions_BT).any()
        first = int(text.questions_BT[0].nonzero()[0])
        assert bool((text.answers_BT | text.questions_BT)[0, first:].all())
    with pytest.raises(Infeasible, match="leaves no room around 10 passkeys of 8 words"):
        next(iter(passkey_texts(model, ctx, 1, 100, 10, 8, 0)))


def test_only_gates_learn_and_heads_that_matter_stay_open(probe: KvCacheProbe) -> None:
    """With nothing but the mean of the gates to learn from, all close alike; a window over the whole text makes both kinds the same."""
    probe.model.module.requires_grad_(True)
    before = Snapshot(probe.model)
    method = DuoAttention(steps=12, length=40, passkeys=1, words=6, sinks=1, recent=4, lr=0.1, regularisation=1.0)
    found, losses = trained(method, probe.model, probe.ctx, 0)
    before.compare(probe.model)
    assert all(p.grad is None for p in probe.model.module.parameters())
    probe.model.module.requires_grad_(False)
    assert len(losses) == 12
    blind, _ = trained(replace(method, recent=100), probe.model, probe.ctx, 0)
    gates, closed = (module.gates_LG for module in (found, blind))  # type: ignore[union-attr]
    assert isinstance(gates, Tensor)
    assert isinstance(closed, Tensor)
    torch.testing.assert_close(closed, closed[:1, :1].expand_as(closed), atol=1e-3, rtol=1e-3)
    assert float(closed.max()) < 0.7
    assert float(gates.max() - gates.min()) > 0.05


@pytest.mark.parametrize(
    ("knob", "values"), [("compared", ["passkeys", "questions"]), ("full_from", ["own", "teacher"])]
)
def test_released_forms_are_other_losses(knob: str, values: list[str], probe: KvCacheProbe) -> None:
    method = DuoAttention(length=40, passkeys=1, words=4, sinks=1, recent=4)
    text = next(iter(method.lessons(probe.model, probe.ctx, 0)))
    gates = Gates(3, GROUPS)
    gates.gates_LG.data.fill_(0.5)
    losses = [float(replace(method, **{knob: value}).loss(probe.model, gates, text).detach()) for value in values]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    gates.gates_LG.data.fill_(1.0)
    assert float(method.loss(probe.model, gates, text).detach()) == pytest.approx(method.regularisation, rel=1e-4)
    gates.gates_LG.data.copy_(torch.tensor([[1.7, -0.3]]).expand(3, GROUPS))
    method.loss(probe.model, gates, text)
    assert gates.gates_LG[0].tolist() == [1.0, 0.0], "a step too far is taken back, so that gates go on learning"


def test_what_cannot_be_asked_is_refused(probe: KvCacheProbe) -> None:
    with pytest.raises(Infeasible, match=r"fill more than half of the 256 tokens .* or 640 tokens"):
        DuoAttention(passkeys=10, words=16).check(probe.model.info)
    short = replace(probe.model.info, geometry={**probe.model.info.geometry, "positions": 100})
    with pytest.raises(Infeasible, match="fill more than half of the 60 tokens"):
        DuoAttention(length=60).check(short)
    assert next(iter(DuoAttention(length=999).lessons(probe.model, probe.ctx, 0))).ids_BT.shape[1] == 256
    with pytest.raises(ValueError, match="needs the value of its prepare"):
        DuoAttention().occupants(probe.model, None)


def test_one_training_serves_all_shares(tmp_path: Path) -> None:
    ctx, family = FolderContext(tmp_path), family_of("tiny-lm/recall-d64")
    info = family.info("tiny-lm/recall-d64", {"steps": 1, "batch": 2})
    weights = family.weights(info, (), 0)
    method = DuoAttention(steps=2, length=64, passkeys=1, words=4)
    stages = {m.prepare(info, weights, 0).key for m in (method, replace(method, full=0.1, prompt="streaming"))}  # type: ignore[union-attr]
    assert len(stages) == 1
    checkpoint = ctx.get(method.prepare(info, weights, 0))  # type: ignore[arg-type]
    assert isinstance(checkpoint, Checkpoint)
    assert len(method.trace(checkpoint)["loss"]) == 2
    model = family.load(info, weights, ctx)
    with method.apply(model, checkpoint):
        assert method.cache(model).held_bytes(16) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_formats_give_what_they_can(dtype: torch.dtype) -> None:
    call = a_call(40)
    short = replace(call, **{name: getattr(call, name).to(dtype) for name in ("q_BHTD", "k_BGTD", "v_BGTD")})
    exact = replace(short, **{name: getattr(short, name).float() for name in ("q_BHTD", "k_BGTD", "v_BGTD")})
    found, expected = (stepped(duo(prompt="streaming"), c, 20, FIRST)[0].float() for c in (short, exact))
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_it_goes_together_with_weights_in_few_bits(probe: KvCacheProbe) -> None:
    method, rtn = duo(), build("rtn", {"bits": 4, "group": 16})
    with method.apply(probe.model, Gates(3, GROUPS)):
        alone = probe.outputs([0, 1])
    with rtn.apply(probe.model, None):
        coarse = probe.outputs([0, 1])
        with method.apply(probe.model, Gates(3, GROUPS)):
            both = probe.outputs([0, 1])
    assert min(float((both - x).abs().max()) for x in (alone, coarse)) > 0.01
    assert VOCABULARY == 48
