"""Tasks on language models: what is scored, that one pass is decoding, generation in a method's session."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from lm_cases import RECALL, TEXT
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.core.knobs import check_knobs
from isoflop.methods.base import METHODS, build
from isoflop.methods.kv_cache.base import KvCacheMethod
from isoflop.models.family import family_of
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel
from isoflop.models.worlds.english import EnglishStage
from isoflop.tasks.base import TASKS, Shard, Task
from isoflop.tasks.language_task import LanguageTask, score

KV_METHODS = [name for name in METHODS.own() if issubclass(METHODS.get(name), KvCacheMethod)]
BRIEF: dict[str, dict[str, Any]] = {"lococo": {"steps": 10}, "duo-attention": {"steps": 10}}
"""Methods that train weights of their own: what they compute does not depend on how long."""


def task(name: str, **options: Any) -> Task:
    return TASKS.get(name)(**check_knobs(TASKS.get(name), options, f"task {name}"))


def language_task(name: str, **options: Any) -> LanguageTask:
    found = task(name, **options)
    assert isinstance(found, LanguageTask)
    return found


def gathered(shards: list[Shard]) -> tuple[np.ndarray, np.ndarray]:
    """Ids in order, and their errors."""
    ids, errors = np.concatenate([s.ids for s in shards]), np.concatenate([s.errors for s in shards])
    return np.sort(ids), errors[ids.argsort()]


@pytest.mark.parametrize("name", KV_METHODS)
@pytest.mark.parametrize("query", ["blind", "aware"])
def test_scores_are_those_of_decoding_token_by_token(
    name: str, query: str, recall_lm: LmModel, lm_ctx: FolderContext
) -> None:
    suite = language_task("kv-recall", examples=4, pairs=8, asked=4, query=query).suite(recall_lm.info, lm_ctx)
    method = build(name, BRIEF.get(name, {}))
    with method.apply(recall_lm, calibrated(method, recall_lm, lm_ctx)):
        nll_B, right_B, _ = score(recall_lm, suite.sequences)
        logits_BTW = recall_lm.stepwise_logits(suite.sequences)
    targets_BT = suite.sequences.targets_BT
    nll_BT = F.cross_entropy(logits_BTW.transpose(1, 2), targets_BT, reduction="none", ignore_index=NOT_SCORED)
    assert np.allclose(nll_BT.sum(1).numpy(), nll_B, rtol=1e-3)
    assert (((logits_BTW.argmax(-1) == targets_BT).sum(1).numpy()) == right_B).all()


def calibrated(method: Any, model: LmModel, ctx: FolderContext) -> Any:
    return method.calibrate(model, ctx, 0) if hasattr(method, "calibrate") else None


@pytest.mark.parametrize(
    ("name", "options"),
    [("kv-recall", {}), ("kv-recall", {"query": "aware"}), ("kv-copy", {}), ("kv-copy", {"query": "aware"})],
)
def test_suites_of_symbols(name: str, options: dict[str, Any], recall_lm: LmModel, lm_ctx: FolderContext) -> None:
    few, many = (language_task(name, examples=n, **options) for n in (70, 140))
    short, long = few.suite(recall_lm.info, lm_ctx), many.suite(recall_lm.info, lm_ctx)
    assert (long.sequences.ids_BT[:70] == short.sequences.ids_BT).all()
    assert short.sequences.ids_BT.shape[1] == few.tokens_needed()
    scored = short.sequences.targets_BT != NOT_SCORED
    assert not scored[:, : short.sequences.prefix].any()
    assert (short.units_N == scored.sum(1).numpy()).all()
    assert short.sequences.ids_BT.unique(dim=0).shape[0] == 70


def test_aware_prompts_hold_the_asked_keys(recall_lm: LmModel, lm_ctx: FolderContext) -> None:
    task_ = language_task("kv-recall", examples=3, query="aware", pairs=9, asked=4)
    sequences = task_.suite(recall_lm.info, lm_ctx).sequences
    named, asked = (
        sequences.ids_BT[:, sequences.prefix - 5 : sequences.prefix - 1],
        sequences.ids_BT[:, sequences.prefix :: 2],
    )
    assert (named.sort(1).values == asked.sort(1).values).all()


def test_an_oracle_makes_no_error_and_a_liar_nothing_else(recall_lm: LmModel, lm_ctx: FolderContext) -> None:
    chosen = language_task("kv-recall", examples=6, asked=3)
    targets_BT = chosen.suite(recall_lm.info, lm_ctx).sequences.targets_BT

    class Fixed(LmModel):
        shift = 0

        def scored_logits(self, batch: LmBatch, most: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            targets_S = batch.targets_BT[batch.targets_BT != NOT_SCORED]
            yield F.one_hot((targets_S + self.shift) % 128, 128).float() * 50, targets_S

    oracle, liar = Fixed(recall_lm.info, recall_lm.module), Fixed(recall_lm.info, recall_lm.module)
    liar.shift = 1
    assert (gathered(list(chosen.evaluate(oracle, lm_ctx, 0)))[1] == 0).all()
    assert (gathered(list(chosen.evaluate(liar, lm_ctx, 0)))[1] == 1).all()
    assert len(targets_BT) == 6


def test_the_order_follows_the_seed_and_the_scores_do_not(recall_lm: LmModel, lm_ctx: FolderContext) -> None:
    chosen = task("kv-copy", examples=20, shard=8, length=10)
    runs = [list(chosen.evaluate(recall_lm, lm_ctx, seed)) for seed in (0, 1)]
    assert [len(s.ids) for s in runs[0]] == [8, 8, 4]
    assert (runs[0][0].ids != runs[1][0].ids).any()
    (ids, errors), (_, again) = map(gathered, runs)
    assert ids.tolist() == list(range(20))
    assert np.allclose(errors, again)


def test_bits_per_byte_are_bits_over_bytes(text_lm: LmModel, lm_ctx: FolderContext) -> None:
    """One window, scored by hand: tokens behind the prompt's successor, over the bytes of their text."""
    chosen = language_task("bits-per-byte", examples=5, tokens=48, prefix=0.5)
    suite = chosen.suite(text_lm.info, lm_ctx)
    row = suite.sequences.ids_BT[3]
    tokenizer = lm_ctx.get(text_lm.info.tokenizer)  # type: ignore[arg-type]
    with torch.no_grad():
        log_probs = text_lm.module(row[None]).logits[0].log_softmax(-1)
    bits = -sum(float(log_probs[t, row[t + 1]]) for t in range(24, 47)) / math.log(2)
    text = tokenizer.decode(row[25:])
    assert suite.units_N[3] == len(text.encode())
    error = gathered(list(chosen.evaluate(text_lm, lm_ctx, 0)))[1][3]
    assert error == pytest.approx(bits / len(text.encode()), rel=1e-4)


def test_windows_are_held_out_text(text_lm: LmModel, lm_ctx: FolderContext) -> None:
    suite = language_task("bits-per-byte", examples=6, tokens=48, prefix=0.0).suite(text_lm.info, lm_ctx)
    tokenizer = lm_ctx.get(text_lm.info.tokenizer)  # type: ignore[arg-type]
    documents = lm_ctx.get(EnglishStage.here())
    for row in suite.sequences.ids_BT:
        text = tokenizer.decode(row)
        assert any(text in document for document in documents["test"].values())
    assert ((suite.sequences.targets_BT != NOT_SCORED).sum(1) == 47).all()


@pytest.mark.parametrize(
    ("name", "options"), [("kv-recall", {}), ("kv-copy", {}), ("generation-latency", {"prompt": 20, "new": 4})]
)
@pytest.mark.parametrize("method", [None, "full-cache", "streaming-llm"])
def test_footprints_are_measured(
    name: str, options: dict[str, Any], method: str | None, recall_lm: LmModel, lm_ctx: FolderContext
) -> None:
    with build(method, {}).apply(recall_lm, None) if method else nullcontext():
        costs = task(name, **options).measure(recall_lm, lm_ctx)
    geometry = recall_lm.info.geometry
    token_bytes = 2 * geometry["layers"] * geometry["kv_heads"] * geometry["head_width"] * 2
    tokens = costs["text_tokens"] - (name == "generation-latency")  # the last token is not read again
    assert costs["kv_bytes_dense"] == tokens * token_bytes
    assert costs["bytes"] == costs["weight_bytes"] + costs["kv_bytes"]
    assert costs["flops"] > 0
    assert costs["peak_bytes"] > 0
    assert (costs["kv_bytes"] < costs["kv_bytes_dense"]) == (method == "streaming-llm")


@pytest.mark.parametrize("method", [None, *KV_METHODS])
def test_generate_of_hugging_face_works_inside_a_method(
    method: str | None, recall_lm: LmModel, lm_ctx: FolderContext
) -> None:
    ids = torch.from_numpy(np.random.default_rng(2).integers(2, 128, (2, 20)))
    built = build(method, BRIEF.get(method, {})) if method else None
    with built.apply(recall_lm, calibrated(built, recall_lm, lm_ctx)) if built else nullcontext():
        greedy = recall_lm.greedy(ids, 6)
        with recall_lm.serving() as cache:
            theirs = recall_lm.module.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        if built is not None:
            sequence = torch.cat((ids, greedy), dim=1)
            logits = recall_lm.stepwise_logits(LmBatch(sequence, sequence, ids.shape[1]))
            assert (logits[:, ids.shape[1] - 1 : -1].argmax(-1) == greedy).all()
    assert (theirs[:, 20:] == greedy).all()


@torch.no_grad()
def test_padded_prompts_generate_as_they_do_alone(recall_lm: LmModel) -> None:
    ids = torch.from_numpy(np.random.default_rng(3).integers(2, 128, (2, 16)))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with build("full-cache", {}).apply(recall_lm, None):
        with recall_lm.serving() as cache:
            both = recall_lm.module.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0
            )
        assert (recall_lm.greedy(ids[:1], 5) == both[:1, 16:]).all()
        assert (recall_lm.greedy(ids[1:, 5:], 5) == both[1:, 16:]).all()


def test_latency_is_seconds_per_token(recall_lm: LmModel, lm_ctx: FolderContext) -> None:
    chosen = task("generation-latency", prompt=16, new=5, examples=3)
    shards = list(chosen.evaluate(recall_lm, lm_ctx, 0))
    assert [int(s.ids[0]) for s in shards] == [0, 1, 2]
    for shard in shards:
        total = shard.metrics["prompt_seconds"] + 4 * shard.metrics["step_seconds"]
        assert shard.errors[0] == pytest.approx(total[0] / 5)
        assert shard.errors[0] > 0


@pytest.mark.parametrize(
    ("name", "options", "ref", "message"),
    [
        ("kv-recall", {}, TEXT, r"needs vocabulary:recall-1"),
        ("bits-per-byte", {}, RECALL, r"needs tokenizer"),
        ("kv-recall", {"pairs": 4, "asked": 5}, RECALL, r"asked = 5 exceeds pairs = 4"),
        ("kv-recall", {"filler": 512, "pairs": 63, "asked": 63}, RECALL, None),
        ("kv-copy", {"length": 100, "gap": 27}, RECALL, r"length \+ gap = 127 exceeds the 126 symbols"),
        ("kv-copy", {"length": 5, "cue": 4}, RECALL, r"cue = 4 leaves nothing of length = 5"),
        ("bits-per-byte", {"tokens": 2048}, TEXT, r"2048 tokens; model tiny-lm/text-d64 has room for 1024"),
        ("bits-per-byte", {"tokens": 8, "prefix": 0.9}, TEXT, r"prefix = 0.9 leaves nothing"),
        ("generation-latency", {"prompt": 1024}, TEXT, r"prompt \+ new = 1056 tokens"),
        ("generation-latency", {}, "tiny-llava/d24", r"needs a language model"),
    ],
)  # fmt: skip
def test_impossible_tasks_are_told_before_they_run(
    name: str, options: dict[str, Any], ref: str, message: str | None
) -> None:
    info = family_of(ref).info(ref, {})
    if message is None:
        task(name, **options).check(info)
        return
    with pytest.raises(Infeasible, match=message):
        task(name, **options).check(info)


@pytest.mark.parametrize("query", ["blind", "aware"])
@pytest.mark.parametrize("name", ["kv-recall", "kv-copy"])
def test_the_prompt_is_as_long_as_the_task_says_before_it_runs(
    name: str, query: str, recall_lm: LmModel, lm_ctx: FolderContext
) -> None:
    task = language_task(name, examples=2, query=query)
    assert task.prompt_length(recall_lm.info) == task.suite(recall_lm.info, lm_ctx).sequences.prefix


@pytest.mark.parametrize(("method", "knob"), [("h2o", "keep"), ("double-sparsity", "k_share")])
def test_a_share_that_keeps_nothing_of_the_prompt_is_refused_with_the_least_that_does(method: str, knob: str) -> None:
    with pytest.raises(Infeasible, match=rf"{method}: {knob} = 0.01 of the 26 tokens .* from 0.02 on") as error:
        build(method, {knob: 0.01}).check_prompt(26, "kv-recall")
    assert "kv-recall" in str(error.value)
    build(method, {knob: 0.02}).check_prompt(26, "kv-recall")
