"""KVzip: scores equal to the released code's and to a second reading worked out by hand, one choice over all layers, nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, a_call, one_row
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.jobs.job import Job, MethodSpec, ResolvedJob
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import slice_call
from isoflop.methods.kv_cache.compressed_cache import CompressedCache
from isoflop.methods.kv_cache.kvzip import FIRST, LATER, OVERLAP, KVzip, Reader
from isoflop.methods.kv_cache.probe import PROMPT, KvCacheProbe
from isoflop.methods.kv_cache.rereading import Passage, largest_attention
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.models.counting import flops_of
from isoflop.models.hooks.attention import ATTENTION, AttentionCall, causal_attention, replaced_attention
from isoflop.models.lm import LmBatch, LmModel
from isoflop.models.ragged import RaggedSegment

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "kvzip.json").read_text())
"""Of snu-mllab/KVzip (commit 5d84729, attention/score.py): ``KVScore._get_score`` for the first row of ``a_call(90, seed=7)``, whose first
30 tokens are the cache and 3 of them a system prompt, repeated in two parts; ``_threshold`` and ``_threshold_uniform`` of ``uneven``."""
LAYERS = 3


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(layers=LAYERS)


def test_scores_are_those_of_the_released_code() -> None:
    call = one_row(a_call(90, seed=7), 0)
    method, noticed = KVzip(sinks=3), dict[int, Tensor]()
    store = method.compress(slice_call(call, 0, 30), None)
    for (start, stop), (first, last) in (((3, 18), (30, 52)), ((18, 30), (52, 80))):
        real_BT = torch.ones(1, last - first, dtype=torch.bool)
        passage = Passage(torch.zeros(1, last - first).long(), real_BT, torch.zeros(1, 1), start, stop)
        method.notice(slice_call(call, first, last), store, passage, noticed)
    torch.testing.assert_close(noticed[0][0, :, 3:], torch.tensor(NUMBERS["scores"]), atol=1e-6, rtol=0)


def uneven(layer: int) -> Tensor:
    even = torch.rand(1, 3, 25, generator=torch.Generator().manual_seed(layer))
    return even ** torch.tensor([1.0, 3.0, 6.0])[:, None]


@pytest.mark.parametrize(("budgets", "theirs"), [("all", "valid"), ("head", "uniform")])
def test_what_stays_is_what_the_released_code_keeps(budgets: str, theirs: str) -> None:
    """But for the pair at its threshold, which it drops, so that it keeps one less than it was asked for."""
    scores_BLT = torch.cat([uneven(0), uneven(1)], dim=1)
    kept = KVzip(scope=budgets)._kept(scores_BLT, [8], 3)[0]
    expected = torch.zeros_like(kept)
    for head, places in enumerate(place for layer in NUMBERS[theirs] for place in layer):
        expected[head, places] = True
    assert int(kept.sum()) == 48 == int(expected.sum()) + (theirs == "valid")
    assert bool(kept[expected].all())


# Against a second reading by hand


def calls_of(model: LmModel, ids_BT: Tensor) -> dict[int, AttentionCall]:
    """Queries and keys of every layer in a plain pass."""
    found = {}

    def attend(call: AttentionCall) -> Tensor:
        found[call.layer] = call
        return causal_attention(call)

    with replaced_attention(model.decoder, attend), torch.no_grad():
        model.decoder(input_ids=ids_BT, use_cache=False)
    return found


def scores_by_hand(model: LmModel, ids_T: Tensor, chunk: int, sinks: int, lead: list[list[int]]) -> Tensor:
    """One prompt: it and each passage in a plain pass; largest weights over the parts' keys, query by query, (L · G, T)."""
    length = len(ids_T)
    scores = torch.zeros(model.info.geometry["layers"] * GROUPS, length)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        words = torch.tensor(lead[1] if start else lead[0], dtype=torch.long)
        text = torch.cat((ids_T, words, ids_T[max(0, start - OVERLAP) if start else 0 : stop]))
        keys = [*range(min(sinks, start)), *range(start, stop)]
        for layer, call in calls_of(model, text[None]).items():
            for place in range(length, len(text)):
                seen = torch.tensor([*keys, *range(length, place + 1)])
                for head in range(4):
                    logits = call.k_BGTD[0, head // 2, seen] @ call.q_BHTD[0, head, place] * call.softmax.scaling
                    weight = logits.softmax(0)[min(sinks, start) : len(keys)]
                    row = layer * GROUPS + head // 2
                    scores[row, start:stop] = torch.maximum(scores[row, start:stop], weight)
    return scores


def kept_by(model: LmModel, method: KVzip, ids_BT: Tensor, valid_BT: Tensor | None = None) -> list[list[list[int]]]:
    """Numbers of the kept tokens of each row, by layer and head."""
    mask = None if valid_BT is None else valid_BT.long()
    with method.apply(model, None), torch.no_grad():
        cache = method.cache(model)
        with cache.session():
            model.module(ids_BT, attention_mask=mask, position_ids=positions(ids_BT, valid_BT), use_cache=False)
            segments = [store.segments[0] for _, store in sorted(cache.stores().items())]
    found: list[list[list[int]]] = [[] for _ in ids_BT]
    for segment in segments:
        assert isinstance(segment, RaggedSegment)
        for row, (places, counts) in enumerate(
            zip(segment.positions_BGN.tolist(), segment.lengths_BG.tolist(), strict=True)
        ):
            found[row] += [p[:n] for p, n in zip(places, counts, strict=True)]
    return found


def positions(ids_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
    if valid_BT is None:
        return torch.arange(ids_BT.shape[1])[None]
    return (valid_BT.long().cumsum(-1) - 1).clamp(min=0)


class Words:
    """A tokenizer that knows the two instructions, of so many tokens and of one less."""

    def __init__(self, words: int = 3) -> None:
        self.words = words

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [{FIRST: 40, LATER: 43}[text] + n % 4 for n in range(self.words - (text == LATER))]


@pytest.mark.parametrize("spoken", [False, True])
@pytest.mark.parametrize("chunk", [100, 15])
def test_what_stays_is_what_a_second_reading_needs(chunk: int, spoken: bool, probe: KvCacheProbe) -> None:
    model = LmModel(probe.model.info, probe.model.module, (lambda: Words()) if spoken else None)
    ids_BT = probe.batch([0]).ids_BT[:, :PROMPT]
    lead = [[40, 41, 42], [43, 44]] if spoken else [[], []]
    scores = scores_by_hand(model, ids_BT[0], chunk, 2, lead)
    scores[:, :2] = 9.0
    ranked = sorted((-float(scores[h, t]), h, t) for h in range(len(scores)) for t in range(PROMPT))
    count = 12 * len(scores)
    assert ranked[count][0] - ranked[count - 1][0] > 1e-5, "no near tie at the border"
    expected = [sorted(t for _, h, t in ranked[:count] if h == head) for head in range(len(scores))]
    found = kept_by(model, KVzip(keep=0.3, sinks=2, chunk=chunk), ids_BT)[0]
    assert found == expected
    assert found != kept_by(model, KVzip(keep=0.3, sinks=2, chunk=chunk, instruct=not spoken), ids_BT)[0] or not spoken


def test_rows_of_unequal_lengths_are_as_if_alone(probe: KvCacheProbe) -> None:
    """Each in parts of its own tokens; a row that ends earlier reads nothing any more."""
    ids_BT = probe.batch([0, 1, 2]).ids_BT[:, :PROMPT]
    pads = (0, 9, 27)
    valid_BT = torch.arange(PROMPT) >= torch.tensor(pads)[:, None]
    model = LmModel(probe.model.info, probe.model.module, lambda: Words())
    for budgets in ("all", "layer", "head"):
        method = KVzip(keep=0.4, chunk=11, scope=budgets)
        together = kept_by(model, method, ids_BT, valid_BT)
        for row, pad in enumerate(pads):
            assert together[row] == kept_by(model, method, ids_BT[row : row + 1, pad:])[0]


def test_what_a_row_reads_ends_with_it(probe: KvCacheProbe) -> None:
    """Rows of 40, 31 and 12 tokens in parts of 11: of the instruction, the overlap and the part nothing behind a row's end."""
    ids_BT = probe.batch([0, 1, 2]).ids_BT[:, :PROMPT]
    valid_BT = torch.arange(PROMPT) >= torch.tensor((0, 9, 28))[:, None]
    read = list(KVzip(chunk=11).passages(ids_BT, valid_BT, Reader((1, 2, 3), (4, 5))))
    counts = [passage.real_BT.sum(-1).tolist() for passage in read]
    assert counts == [[3 + 11] * 3, [2 + 8 + 11, 2 + 8 + 11, 2 + 8 + 1], [2 + 8 + 11, 2 + 8 + 9, 0], [2 + 8 + 7, 0, 0]]
    assert [passage.positions_BT[:, 0].tolist() for passage in read] == [[40, 31, 12]] * 4


def test_tokens_behind_the_end_of_a_row_do_not_count() -> None:
    call = a_call(40, rows=1)
    keys, there_BC = call.k_BGTD, torch.ones(1, 10, dtype=torch.bool)
    real_BT = torch.arange(30)[None] < 5
    found = largest_attention(call.q_BHTD[:, :, 10:], keys, call.softmax, there_BC, real_BT)
    short = largest_attention(call.q_BHTD[:, :, 10:15], keys[:, :, :15], call.softmax, there_BC, real_BT[:, :5])
    every = largest_attention(call.q_BHTD[:, :, 10:], keys, call.softmax, there_BC, torch.ones_like(real_BT))
    torch.testing.assert_close(found, short)
    assert bool((every > found + 1e-3).any())


def test_budgets_are_kept_exactly_where_they_are_shared(probe: KvCacheProbe) -> None:
    ids_BT = probe.batch([0, 1]).ids_BT[:, :PROMPT]
    for keep in (0.05, 0.3, 0.55, 1.0):
        mean = max(1, int(keep * PROMPT + 0.5))
        for budgets, size in (("all", LAYERS * GROUPS), ("layer", GROUPS), ("head", 1)):
            for row in kept_by(probe.model, KVzip(keep=keep, scope=budgets), ids_BT):
                counts = [len(head) for head in row]
                assert [sum(counts[i : i + size]) for i in range(0, len(counts), size)] == [size * mean] * (
                    len(counts) // size
                )
                assert all(head[: min(4, mean)] == list(range(min(4, mean))) for head in row)
    wide, even = (kept_by(probe.model, KVzip(keep=0.3, scope=b), ids_BT)[0] for b in ("all", "layer"))
    assert [len(h) for h in wide] != [len(h) for h in even], "layers trade, too"


def test_reading_again_leaves_nothing_behind(probe: KvCacheProbe) -> None:
    """With everything kept, logits are those of no method, and tokens behind the prompt are numbered from its end."""
    batch = probe.batch([0, 1])
    bare = probe.model.logits(batch)
    method = KVzip(keep=1.0, chunk=7)
    with method.apply(probe.model, None), torch.no_grad():
        cache = method.cache(probe.model)
        for found in (probe.model.logits(batch), probe.model.stepwise_logits(batch)):
            torch.testing.assert_close(found[:, PROMPT:], bare[:, PROMPT:], atol=2e-5, rtol=1e-4)
        with cache.session():
            probe.model.module(batch.ids_BT[:, :PROMPT], use_cache=False)
            for store in cache.stores().values():
                assert store.recent.tokens == 0
                assert store.state == {}
                assert store.extra == []
            probe.model.module(
                batch.ids_BT[:, PROMPT:], position_ids=torch.arange(PROMPT, PROMPT + 8)[None], use_cache=False
            )
            assert cache.stores()[0].recent.positions_BGN[0, 0].tolist() == list(range(PROMPT, PROMPT + 8))


def test_generation_is_decoding_step_by_step(probe: KvCacheProbe) -> None:
    ids_BT = probe.batch([0, 1]).ids_BT[:, :PROMPT]
    with KVzip(keep=0.3, chunk=13).apply(probe.model, None), torch.no_grad():
        found = probe.model.greedy(ids_BT, 6)
        batch = LmBatch(torch.cat((ids_BT, found), 1), torch.zeros(2, PROMPT + 6).long(), PROMPT)
        expected = probe.model.logits(batch)[:, PROMPT - 1 : -1].argmax(-1)
        with probe.model.serving() as cache:
            told = probe.model.module.generate(
                ids_BT, past_key_values=cache, max_new_tokens=6, min_new_tokens=6, do_sample=False
            )
    assert torch.equal(found, expected)
    assert torch.equal(told[:, PROMPT:], found)


def test_bytes_and_the_second_reading_are_counted(probe: KvCacheProbe) -> None:
    """20 of 40 tokens on average, 2 bytes a number, keys and values 16 wide, and 4 bytes for the end of each of 6 heads."""
    batch = probe.batch([0, 1])
    prompt = LmBatch(batch.ids_BT[:, :PROMPT], torch.zeros(2, PROMPT).long(), PROMPT)
    plain, _ = flops_of(lambda: probe.model.logits(prompt))
    method = KVzip(chunk=16)
    with method.apply(probe.model, None), torch.no_grad():
        probe.model.logits(batch)
        costs = method.footprint(probe.model, probe.ctx)
        flops, _ = flops_of(lambda: probe.model.logits(prompt))
    assert costs["kv_prompt_bytes"] == LAYERS * GROUPS * (20 * 2 * 16 * 2 + 4)
    assert costs["kv_scoring_tokens"] == PROMPT + 2 * OVERLAP
    assert flops > 2 * plain


# What is refused


def test_prompts_with_images_are_refused_at_plan() -> None:
    with pytest.raises(Infeasible, match="are not all text; allowed: language models") as refused:
        KVzip().check(VisualTokenProbe(examples=1).model.info)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("words", "chunk"), [(0, 48), (3, 46), (60, 0)])
def test_prompts_that_cannot_be_read_twice_are_refused(words: int, chunk: int, probe: KvCacheProbe) -> None:
    """In one line whose advice fits: later parts follow tokens that stand before them, and all an instruction."""
    room = probe.model.info.geometry["positions"]
    lm = LmModel(probe.model.info, probe.model.module, (lambda: Words(words)) if words else None)
    ids_BT = torch.ones(1, room - 48 - OVERLAP, dtype=torch.long)
    advised = f"chunk up to {chunk} fits" if chunk else "instruct: false and chunk up to 48 fit"
    with pytest.raises(Infeasible, match=f"has {room} positions; {advised}"):
        kept_by(lm, KVzip(), ids_BT)
    kept_by(lm, KVzip(chunk=chunk) if chunk else KVzip(chunk=48, instruct=False), ids_BT)
    with pytest.raises(Infeasible, match="; "):
        kept_by(lm, KVzip(chunk=chunk + 1) if chunk else KVzip(chunk=49, instruct=False), ids_BT)
    fits = LmBatch(ids_BT[:, : room // 4], torch.zeros(1, room // 4).long(), room // 4)
    with KVzip().apply(lm, None), torch.no_grad():
        assert torch.isfinite(lm.logits(fits)).all(), "nothing of the refused pass is left"


@pytest.mark.parametrize(("tokens", "chunk"), [(120, 120), (136, 120), (137, 120), (200, 48), (200, 49), (240, 8)])
def test_what_a_plan_lets_pass_is_read(tokens: int, chunk: int, probe: KvCacheProbe) -> None:
    """Where nothing is said in front, a plan knows all that will be read."""
    lm, method = LmModel(probe.model.info, probe.model.module), KVzip(chunk=chunk)

    def refused(run: Any) -> bool:
        try:
            run()
        except Infeasible:
            return True
        return False

    planned = refused(lambda: method.check_room(lm.info, tokens, "t"))
    assert planned == refused(lambda: kept_by(lm, method, torch.ones(1, tokens, dtype=torch.long)))
    assert planned == ((tokens, chunk) in {(137, 120), (200, 49)})


def test_a_plan_asks_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(KVzip, "check_room", lambda self, info, tokens, task: asked.append(tokens))
    job = Job("tiny-lm/text-d64", (MethodSpec.of("kvzip", build("kvzip", {}).knobs()),), "bits-per-byte", 0, 0)
    ResolvedJob.of(job)
    assert asked
    assert all(tokens > 0 for tokens in asked)


def test_a_cache_without_token_ids_says_so(probe: KvCacheProbe) -> None:
    cache = probe.model.occupant(ATTENTION)
    with KVzip().apply(probe.model, None), torch.no_grad():
        cache = probe.model.occupant(ATTENTION)
        assert isinstance(cache, CompressedCache)
        embeds = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
        with cache.session(), pytest.raises(Infeasible, match="token ids are not known here"):
            probe.model.module(inputs_embeds=embeds, use_cache=False)


def test_without_a_tokenizer_nothing_is_said(probe: KvCacheProbe) -> None:
    occupant: Any = KVzip().occupants(probe.model, None)[ATTENTION]
    assert occupant.prepared == Reader((), (), probe.model.info.geometry["positions"])
    spoken = LmModel(probe.model.info, probe.model.module, lambda: Words())
    occupant = KVzip().occupants(spoken, None)[ATTENTION]
    assert occupant.prepared == Reader((40, 41, 42), (43, 44), probe.model.info.geometry["positions"])
    occupant = KVzip(instruct=False).occupants(spoken, None)[ATTENTION]
    assert occupant.prepared.first == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_as_full_precision_does(dtype: torch.dtype) -> None:
    call = a_call(60)
    half = replace(call, q_BHTD=call.q_BHTD.to(dtype), k_BGTD=call.k_BGTD.to(dtype), v_BGTD=call.v_BGTD.to(dtype))
    whole = replace(half, q_BHTD=half.q_BHTD.float(), k_BGTD=half.k_BGTD.float(), v_BGTD=half.v_BGTD.float())
    passage = Passage(torch.zeros(2, 30).long(), torch.ones(2, 30, dtype=torch.bool), torch.zeros(1, 1), 0, 30)
    found: list[dict[int, Tensor]] = [{}, {}]
    for noticed, one in zip(found, (half, whole), strict=True):
        KVzip().notice(slice_call(one, 30, 60), KVzip().compress(slice_call(one, 0, 30), None), passage, noticed)
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-5)
