"""A learned prompt made of real tokens' embeddings is those tokens, however the model is run and whatever else is in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from repair_cases import Bench, Given, asked, behind, off, texts

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.models.contexts import read_contexts
from isoflop.models.counting import flops_of
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT
from isoflop.testing.snapshot import Snapshot

N, T, PREFIX, CLOSE = 5, 16, 9, 1e-4
"""Rounding of these logits is 5e-6 of the largest at most; a place or a column that is off by one moves them by a hundredth."""
CACHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full-cache", {}), ("h2o", {"keep": 0.5}), ("snapkv", {"keep": 0.5, "window": 4}), ("streaming-llm", {"keep": 0.5}),
    ("kv-rtn", {"bits": 4}), ("tova", {"keep": 0.4}), ("double-sparsity", {"k_share": 0.3, "dense_layers": 0}),
)  # fmt: skip


@pytest.fixture(scope="module")
def front() -> torch.Tensor:
    return texts(1, N, seed=9)[0]


def whole(front: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    return torch.cat((front.expand(len(ids_BT), -1), ids_BT), dim=1)


@torch.no_grad()
def test_one_pass_over_texts_padded_or_not(bench: Bench, front: torch.Tensor) -> None:
    ids_BT, pads = texts(tokens=T), (0, 3, 6)
    expected = bench.lm.logits(asked(whole(front, ids_BT)))[:, N:]
    alone = [bench.lm.logits(asked(whole(front, ids_BT[row : row + 1, pad:])))[0, N:] for row, pad in enumerate(pads)]
    with behind(bench, front):
        assert off(bench.lm.logits(asked(ids_BT)), expected) < CLOSE
        found = bench.lm.logits(asked(ids_BT, pads=pads))
    for row, pad in enumerate(pads):
        assert off(found[row, pad:], alone[row]) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize(("cache", "knobs"), CACHES)
def test_methods_on_the_cache_take_it_for_tokens(
    cache: str, knobs: dict[str, Any], bench: Bench, front: torch.Tensor
) -> None:
    """In one pass, step by step, and their bytes."""
    ids_BT, found, method = texts(tokens=T), [], build(cache, knobs)
    prepared = method.calibrate(bench.lm, bench.ctx, 0) if hasattr(method, "calibrate") else None
    for place in (0, 1):
        batch = asked(ids_BT, PREFIX) if place else asked(whole(front, ids_BT), N + PREFIX)
        with method.apply(bench.lm, prepared):
            if place:
                with behind(bench, front):
                    found.append([bench.lm.logits(batch), bench.lm.stepwise_logits(batch)])
            else:
                found.append([x[:, N:] for x in (bench.lm.logits(batch), bench.lm.stepwise_logits(batch))])
            found[-1].append(bench.lm.occupant(build(cache, knobs).hooks[0]).report().stored)
    (once, steps, stored), (expected_once, expected_steps, expected_stored) = found[1], found[0]
    assert off(once, expected_once) < CLOSE
    assert off(steps, expected_steps) < CLOSE
    assert stored == expected_stored


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "full-cache", "h2o"])
def test_contexts_that_are_read_once_and_scored_behind_or_generated_from(
    cache: str | None, bench: Bench, front: torch.Tensor
) -> None:
    contexts = [row.tolist() for row in texts(3, 12, seed=1)]
    contexts[1] = contexts[1][4:]
    tails = [row.tolist() for row in texts(3, 4, seed=2)]
    told = []
    for place in (0, 1):
        read = [front.tolist() + c for c in contexts] if not place else contexts
        with bench.applied(*[(cache, {})] if cache else []):
            for known in (False, True, True):
                if place:
                    with behind(bench, front), read_contexts(bench.lm, read, known) as held:
                        told.append((held.score(tails, [4, 3, 2]).nll_B, held.generate(tails, 5, frozenset())))
                else:
                    with read_contexts(bench.lm, read) as held:
                        told.append((held.score(tails, [4, 3, 2]).nll_B, held.generate(tails, 5, frozenset())))
    expected = told[0]
    for nll_B, answers in told[3:]:
        assert abs(nll_B - expected[0]).max() < 1e-3
        assert answers == expected[1]


@torch.no_grad()
def test_what_was_read_without_it_is_not_taken_for_what_is_read_with_it(bench: Bench, front: torch.Tensor) -> None:
    """A pass over contexts that is kept for all methods on the cache belongs to the bare model."""
    contexts, tails = [row.tolist() for row in texts(2, 12, seed=3)], [[1, 2], [3, 4]]
    with build("full-cache", {}).apply(bench.lm, None):
        with read_contexts(bench.lm, contexts, known=True) as held:
            bare = held.score(tails, [2, 2]).nll_B
        with behind(bench, front), read_contexts(bench.lm, contexts, known=True) as held:
            with_it = held.score(tails, [2, 2]).nll_B
        with read_contexts(bench.lm, contexts, known=True) as held:
            again = held.score(tails, [2, 2]).nll_B
    assert abs(with_it - bare).min() > 0.05
    assert (again == bare).all()


@torch.no_grad()
def test_generation_by_the_module_and_by_the_loop_that_serves(bench: Bench, front: torch.Tensor) -> None:
    """Padded on the left; the prompt's keys are computed once, in the first pass."""
    ids_BT, pads = texts(tokens=9, seed=4).clamp(min=1), torch.tensor([0, 2, 4])
    valid_BT = torch.arange(9)[None] >= pads[:, None]
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone = torch.cat(
        [
            bench.lm.greedy(torch.cat((front, ids_BT[row, pads[row] :]))[None], 5)
            for row in range(3)
        ]
    )  # fmt: skip
    passes: list[int] = []
    first = bench.lm.decoder_layers[0].register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    with behind(bench, front):
        found = bench.lm.module.generate(ids_BT * valid_BT, attention_mask=valid_BT.long(), **given)[:, 9:]
        with build("full-cache", {}).apply(bench.lm, None), bench.lm.serving() as cache:
            mask = valid_BT.long()
            served = bench.lm.module.generate(ids_BT * valid_BT, attention_mask=mask, past_key_values=cache, **given)
        greedy = bench.lm.greedy(ids_BT[:1], 5)
    first.remove()
    assert torch.equal(found, alone)
    assert torch.equal(served[:, 9:], alone)
    assert torch.equal(greedy[0], alone[0])
    assert passes == [N + 9, 1, 1, 1, 1] * 3


@torch.no_grad()
def test_rows_may_have_prompts_of_different_lengths(bench: Bench) -> None:
    ids_BT, pads = texts(tokens=T, seed=5), (0, 3, 6)
    fronts = [texts(1, n, seed=6 + n)[0] for n in (5, 2, 4)]
    embeds_BNd = torch.stack([bench.embeds(torch.cat((torch.zeros(5 - len(f)).long(), f))) for f in fronts])
    valid_BN = torch.tensor([[n >= 5 - len(f) for n in range(5)] for f in fronts])
    for padded in (False, True):
        batch = asked(ids_BT, PREFIX, pads if padded else ())
        with bench.lm.occupy(SOFT_PROMPT, Given(embeds_BNd, valid_BN)):
            found = [bench.lm.logits(batch)]
            with build("full-cache", {}).apply(bench.lm, None):
                found += [bench.lm.logits(batch), bench.lm.stepwise_logits(batch)]
        for row, front_N in enumerate(fronts):
            pad = pads[row] if padded else 0
            expected = bench.lm.logits(asked(whole(front_N, ids_BT[row : row + 1, pad:])))[0, len(front_N) :]
            for logits_BTW in found:
                assert off(logits_BTW[row, pad:], expected) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_queries_and_columns(boolean: bool, bench: Bench, front: torch.Tensor) -> None:
    """A tree of tokens, as byte probabilities are computed: two branches behind one root do not see each other."""
    ids_BT = texts(1, 5, seed=7)
    sees_KC = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    mask = sees_KC[None, None]
    if not boolean:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with behind(bench, front):
        found = bench.lm.module(
            input_ids=ids_BT, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 1, 2]]), use_cache=False
        ).logits[0]
    for branch in ([0, 1, 2], [0, 3, 4]):
        expected = bench.lm.logits(asked(whole(front, ids_BT[:, branch])))[0, N:]
        assert off(found[branch], expected) < CLOSE


@torch.no_grad()
def test_flops_are_those_of_as_many_tokens_more(bench: Bench, front: torch.Tensor) -> None:
    """Of the decoder; the head runs on the text alone."""
    ids_BT = texts(1, T)
    head = 2 * 64 * 48 * N
    expected, _ = flops_of(lambda: bench.lm.logits(asked(whole(front, ids_BT))))
    with behind(bench, front):
        found, _ = flops_of(lambda: bench.lm.logits(asked(ids_BT)))
    assert found == expected - head


@torch.no_grad()
def test_hidden_states_are_those_of_the_text(bench: Bench, front: torch.Tensor) -> None:
    ids_BT = texts(2, T)
    expected = bench.lm.decoder(input_ids=whole(front, ids_BT), output_hidden_states=True, use_cache=False)
    with behind(bench, front):
        found = bench.lm.decoder(input_ids=ids_BT, output_hidden_states=True, use_cache=False)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert off(one, other[:, N:]) < CLOSE


@torch.no_grad()
def test_what_cannot_be_is_refused_in_one_line(bench: Bench, front: torch.Tensor) -> None:
    before = Snapshot(bench.lm)
    with behind(bench, front):
        assert bench.lm.room == 256 - N
        bench.lm.logits(asked(texts(1, 251)))
        with pytest.raises(Infeasible, match="a prompt of 5 learned ones leaves 251, and a text has 252") as refused:
            bench.lm.logits(asked(texts(1, 252)))
        assert "\n" not in str(refused.value)
        with pytest.raises(Infeasible, match="a pass has none; allowed: passes over input_ids"):
            bench.lm.module(inputs_embeds=bench.embeds(texts(1, 4)))
    before.compare(bench.lm)
    assert bench.lm.room == 256
