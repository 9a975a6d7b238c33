"""IDP: which prompt is chosen, by hand; one prompt is compress-then-prompt; each row by itself; nothing that is scored is looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from repair_cases import Bench, asked, off, texts, trial
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from isoflop.core.errors import Infeasible
from isoflop.jobs.job import ResolvedJob
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import build
from isoflop.methods.kv_cache.probe import untrained_decoder
from isoflop.methods.own_weights import trained
from isoflop.methods.repair.idp import Choosing, Idp, SoftPrompts, scores
from isoflop.models.contexts import read_contexts
from isoflop.models.counting import flops_of
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT
from isoflop.models.lm import LmBatch, LmModel

P, N, T, PREFIX = 6, 4, 16, 10
RTN = ("rtn", {"bits": 3, "group": 32})


def idp(**knobs: Any) -> Idp:
    method = build("idp", {"prompts": P, "tokens": N, "steps": 2, "batch": 2, "init": "random", **knobs})
    assert isinstance(method, Idp)
    return method


def drawn(bench: Bench, method: Idp, seed: int = 0) -> SoftPrompts:
    module = method.drawn(bench.lm, bench.ctx, seed)
    assert isinstance(module, SoftPrompts)
    return module.requires_grad_(False)


def chosen(bench: Bench) -> list[int]:
    occupant = bench.lm.occupant(SOFT_PROMPT)
    assert isinstance(occupant, Choosing)
    assert occupant.chosen_B is not None
    found: list[int] = occupant.chosen_B.tolist()
    return found


def alone(bench: Bench, module: SoftPrompts, number: int, batch: LmBatch) -> Tensor:
    """Logits behind one prompt and no other."""
    method = build("compress-then-prompt", {"tokens": N})
    with method.apply(bench.lm, module.prompts[number]):
        return bench.lm.logits(batch)


def by_hand(lm: LmModel, module: SoftPrompts, ids: list[int], method: Idp) -> Tensor:
    """Scores of one text: the first layer's attention to all prompts, number by number."""
    layer, decoder = lm.decoder_layers[0], lm.decoder
    heads, groups, width = 4, 2, 16

    def projected(x_Td: Tensor, projection: Any, count: int, first: int) -> Tensor:
        h_HTD = projection(layer.input_layernorm(x_Td)).view(len(x_Td), count, width).transpose(0, 1)
        cos, sin = decoder.rotary_emb(x_Td[None], torch.arange(first, first + len(x_Td))[None])
        turned, _ = apply_rotary_pos_emb(h_HTD[None], h_HTD[None], cos, sin)
        return turned[0]

    q_HTD = projected(decoder.embed_tokens(torch.tensor(ids)), layer.self_attn.q_proj, heads, N)
    keys = [projected(prompt.embeds_Nd, layer.self_attn.k_proj, groups, 0) for prompt in module.prompts]  # type: ignore[arg-type]
    total = torch.zeros(len(keys), dtype=torch.float64)
    places = range(len(ids)) if method.queries == "all" else [len(ids) - 1]
    for head in range(heads):
        for t in places:
            logits = [[float(q_HTD[head, t] @ k[head // 2, n]) * width**-0.5 for n in range(N)] for k in keys]
            values = torch.tensor(logits, dtype=torch.float64)
            if method.score == "prob":
                values = values.exp() / values.exp().sum()
            total += values.sum(1)
    return total / (heads * len(places) * N)


@torch.no_grad()
@pytest.mark.parametrize("score", ["prob", "logit"])
@pytest.mark.parametrize("queries", ["all", "last"])
def test_the_choice_by_hand_row_by_row_padded_and_behind_compressed_weights(
    score: str, queries: str, bench: Bench
) -> None:
    """(e) of the card: rows of one batch get different prompts; and what each gets is the one prompt's own logits (b)."""
    method, pads = idp(score=score, queries=queries), (0, 2, 5, 0, 1, 3, 0, 4)
    module, ids_BT = drawn(bench, method), texts(len(pads), T, seed=21)
    batch = asked(ids_BT, PREFIX, pads)
    with bench.applied(RTN):
        wanted_BP = torch.stack(
            [by_hand(bench.lm, module, ids_BT[row, pad:PREFIX].tolist(), method) for row, pad in enumerate(pads)]
        )
        with method.apply(bench.lm, module):
            found, numbers = bench.lm.logits(batch), chosen(bench)
            with build("full-cache", {}).apply(bench.lm, None):
                steps = bench.lm.stepwise_logits(batch)
                assert chosen(bench) == numbers
        best = wanted_BP.topk(2).values
        assert float((best[:, 0] - best[:, 1]).min()) > 1e-5, "no near tie"
        assert numbers == wanted_BP.argmax(1).tolist()
        assert len(set(numbers)) > 1
        for row, pad in enumerate(pads):
            expected = alone(bench, module, numbers[row], asked(ids_BT[row : row + 1, pad:]))[0]
            assert off(found[row, pad:], expected) < 1e-4
            assert off(steps[row, pad:], expected) < 1e-4


@torch.no_grad()
def test_scores_against_loops() -> None:
    """Grouped heads, padding, both scores; float16 inputs are scored in float32."""
    rng = torch.Generator().manual_seed(1)
    q, k = (torch.randn(shape, generator=rng).half() for shape in ((2, 4, 5, 8), (3, 2, 6, 8)))
    valid_BT = torch.tensor([[True] * 5, [False, False, True, True, True]])
    for score in ("prob", "logit"):
        found_BP = scores(q, k, Softmax(0.3), valid_BT, score)
        for b in range(2):
            total = torch.zeros(3, dtype=torch.float64)
            for h in range(4):
                for t in valid_BT[b].nonzero()[:, 0].tolist():
                    logits_PN = 0.3 * (k[:, h // 2].double() @ q[b, h, t].double())
                    total += (logits_PN.flatten().softmax(0).view(3, 6) if score == "prob" else logits_PN).mean(1)
            torch.testing.assert_close(found_BP[b].double(), total / 4 / int(valid_BT[b].sum()), atol=1e-5, rtol=1e-4)


def test_one_prompt_is_compress_then_prompt(bench: Bench) -> None:
    """(a): the same training to the last bit, and the same logits."""
    knobs = {"tokens": N, "steps": 3, "batch": 2}
    for init in ("vocab", "text"):
        one, losses = trained(idp(prompts=1, init=init, **knobs), bench.lm, bench.ctx, 0)
        plain, expected = bench.learn("compress-then-prompt", init=init, **knobs)
        assert losses == expected
        assert torch.equal(one.prompts[0].embeds_Nd, plain.embeds_Nd)
        with torch.no_grad():
            batch, found = asked(texts(), PREFIX), []
            for method, module in ((idp(prompts=1), one), (build("compress-then-prompt", {"tokens": N}), plain)):
                with method.apply(bench.lm, module):
                    found.append(bench.lm.logits(batch))
        assert torch.equal(*found)


@torch.no_grad()
def test_order_and_copies_of_prompts_change_nothing(bench: Bench) -> None:
    """(c)."""
    batch, module = asked(texts(6, T, seed=22), PREFIX), drawn(bench, idp())
    for score in ("prob", "logit"):
        with idp(score=score).apply(bench.lm, module):
            expected, numbers = bench.lm.logits(batch), chosen(bench)
        turned = SoftPrompts(bench.lm.info, P, N)
        turned.prompts = torch.nn.ModuleList([*module.prompts][::-1])
        with idp(score=score).apply(bench.lm, turned):
            assert torch.equal(bench.lm.logits(batch), expected)
            assert chosen(bench) == [P - 1 - number for number in numbers]
        twice = SoftPrompts(bench.lm.info, P + 1, N)
        twice.prompts = torch.nn.ModuleList([*module.prompts, module.prompts[numbers[0]]])
        if score == "logit":  # probabilities of all are shared out among more
            with idp(score=score, prompts=P + 1).apply(bench.lm, twice):
                assert torch.equal(bench.lm.logits(batch), expected)


@torch.no_grad()
def test_a_prompt_that_is_the_input_is_chosen_where_attention_compares_tokens() -> None:
    """(d): queries and keys of the first layer are the embeddings themselves, and positions turn nothing."""
    lm = untrained_decoder()
    lm.info = replace(lm.info, hooks=lm.info.hooks | {SOFT_PROMPT})
    eye = torch.eye(64) * 3
    lm.decoder_layers[0].self_attn.q_proj.weight.copy_(eye)
    lm.decoder_layers[0].self_attn.k_proj.weight.copy_(eye[torch.arange(64) % 64 < 32][:32])
    lm.decoder_layers[0].self_attn.q_proj.weight.copy_(torch.cat((eye[:16], eye[:16], eye[16:32], eye[16:32])))
    lm.decoder.rotary_emb.inv_freq.zero_()
    ids_BT, module = texts(P, N, seed=23), SoftPrompts(lm.info, P, N)
    for row, prompt in enumerate(module.prompts):
        prompt.embeds_Nd.copy_(lm.decoder.embed_tokens(ids_BT[row]))  # type: ignore[operator, union-attr]
    bench, order = Bench(lm, None), [3, 1, 5, 0, 4, 2]  # type: ignore[arg-type]
    for score in ("prob", "logit"):
        with idp(score=score).apply(lm, module):
            lm.logits(asked(ids_BT[order]))
            assert chosen(bench) == order


@torch.no_grad()
def test_what_is_behind_the_prompt_is_not_looked_at(bench: Bench) -> None:
    """In one pass, and where contexts are read by themselves."""
    method = idp()
    module, ids_BT = drawn(bench, method), texts(6, T, seed=24)
    with method.apply(bench.lm, module):
        bench.lm.logits(asked(ids_BT, PREFIX))
        numbers = chosen(bench)
        other_BT = torch.cat((ids_BT[:, :PREFIX], texts(6, T - PREFIX, seed=25)), dim=1)
        bench.lm.logits(asked(other_BT, PREFIX))
        assert chosen(bench) == numbers
        with read_contexts(bench.lm, ids_BT[:, :PREFIX].tolist()) as held:
            held.score([[1, 2]] * 6, [2] * 6)
            assert chosen(bench) == numbers
        bench.lm.logits(asked(other_BT, 0))
        assert chosen(bench) != numbers, "all of a text where none of it is a prompt"


@torch.no_grad()
def test_other_ways_to_choose(bench: Bench) -> None:
    module, batch, pads = drawn(bench, idp()), asked(texts(40, T, seed=26), PREFIX), (0, 3)
    with idp(select="first").apply(bench.lm, module):
        found = bench.lm.logits(batch)
    assert off(found, alone(bench, module, 0, batch)) < 1e-5
    with idp(select="mean").apply(bench.lm, module):
        found = bench.lm.logits(batch)
    one = SoftPrompts(bench.lm.info, 1, N)
    one.prompts[0].embeds_Nd.copy_(sum(prompt.embeds_Nd for prompt in module.prompts) / P)  # type: ignore[operator, union-attr, misc]
    assert off(found, alone(bench, one, 0, batch)) < 1e-5
    with idp(select="random").apply(bench.lm, module):
        bench.lm.logits(batch)
        numbers = chosen(bench)
        assert set(numbers) == set(range(P)), "each of 6 among 40 texts"
        bench.lm.logits(asked(batch.ids_BT[:2], PREFIX))
        assert chosen(bench) == numbers[:2]
        ids_BT = torch.stack((batch.ids_BT[0], torch.cat((torch.zeros(3).long(), batch.ids_BT[1, :-3]))))
        bench.lm.logits(asked(ids_BT, 0, pads))
        padded = chosen(bench)[1]
        bench.lm.logits(asked(batch.ids_BT[1:2, :-3], 0))
        assert chosen(bench) == [padded]


def test_each_prompt_learns_by_itself_on_texts_of_its_own(bench: Bench) -> None:
    """In turns; what one learns does not depend on how the others are doing."""
    method = idp(prompts=3, init="vocab", steps=2, lr=0.01)
    lessons = list(method.lessons(bench.lm, bench.ctx, 0))
    assert [number for number, _ in lessons] == [0, 1, 2] * 2
    assert len({batch.ids_BT.numpy().tobytes() for _, batch in lessons}) == 6
    begun = drawn(bench, method)
    for number, prompt in enumerate(begun.prompts):
        assert torch.equal(prompt.embeds_Nd, bench.embeds(torch.arange(number * N, number * N + N)))  # type: ignore[arg-type]
    whole, losses = trained(method, bench.lm, bench.ctx, 0)
    assert len(losses) == 6
    far = method.drawn(bench.lm, bench.ctx, 0)
    assert isinstance(far, SoftPrompts)
    with torch.no_grad():
        far.prompts[1].embeds_Nd.mul_(5.0)  # type: ignore[operator, union-attr]
    other, _ = trained(method, bench.lm, bench.ctx, 0, begun=far)
    for number in (0, 2):
        assert torch.equal(whole.prompts[number].embeds_Nd, other.prompts[number].embeds_Nd)
        assert not torch.equal(whole.prompts[number].embeds_Nd, begun.prompts[number].embeds_Nd)
    assert not torch.equal(whole.prompts[1].embeds_Nd, other.prompts[1].embeds_Nd)


@torch.no_grad()
def test_bytes_slots_and_flops_by_hand(bench: Bench) -> None:
    """All prompts and their keys in the first layer (2 heads of 16) are kept; a request has the slots of one."""
    method, batch = idp(), asked(texts(1, T), T)
    module = drawn(bench, method)
    with build("full-cache", {}).apply(bench.lm, None):
        with build("compress-then-prompt", {"tokens": N}).apply(bench.lm, module.prompts[0]):
            expected, _ = flops_of(lambda: bench.lm.logits(batch))
        with method.apply(bench.lm, module):
            found, _ = flops_of(lambda: bench.lm.logits(batch))
            costs = method.footprint(bench.lm, bench.ctx)
            cache = bench.lm.occupant(build("full-cache", {}).hooks[0]).report()
    assert costs["method_params"] == P * N * (64 + 32)
    assert costs["method_bytes"] == 2 * P * N * (64 + 32)
    assert cache.stored == (T + N) * 256
    projections = 2 * T * 64 * (64 + 32 + 32)
    assert found - expected == projections + 2 * T * P * N * 64


@pytest.mark.parametrize(
    ("task", "knobs", "says"),
    [
        ({"prefix": 0.0}, {}, "method idp: task bits-per-byte has no prompt to choose by; allowed: select: first or mean"),
        ({}, {"tokens": 900}, "puts 900 tokens before every input"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_plan(task: dict[str, Any], knobs: dict[str, Any], says: str) -> None:
    job = trial(RTN, ("idp", knobs))
    with pytest.raises(Infeasible, match=says) as refused:
        ResolvedJob.of(replace(job, task_options=tuple(task.items())))
    assert "\n" not in str(refused.value)


def test_a_task_without_a_prompt_takes_what_does_not_choose_by_it_and_one_training_serves_all() -> None:
    keys = set()
    for knobs in ({"select": "first"}, {"select": "mean"}, {"prompts": 4, "select": "random"}):
        resolved = ResolvedJob.of(replace(trial(RTN, ("idp", knobs)), task_options=(("prefix", 0.0),)))
        keys.add(
            next(
                stage.key
                for method, stage in zip(resolved.methods, resolved.prepared, strict=True)
                if stage and method.name == "idp"
            )
        )
    assert len(keys) == 1
