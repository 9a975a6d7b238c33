"""Multiple choice by a text encoder: options whose tokens it would fill in, or a head that chooses.

Shape suffixes: O options, S masked positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.stage import StageContext
from isoflop.models.counting import flops_of
from isoflop.models.encoder import CHOOSES, FILLS, EncoderBatch, EncoderInfo, EncoderModel
from isoflop.models.lm import NOT_SCORED
from isoflop.tasks.base import Shard
from isoflop.tasks.data.base import Example, shards
from isoflop.tasks.data.costs import MEASURED
from isoflop.tasks.data.prompts import shown
from isoflop.tasks.data.rankers import cost_of_run

if TYPE_CHECKING:
    from isoflop.tasks.data.choice import Choice


def check_chooses(task: Choice, info: EncoderInfo) -> None:
    """Raise Infeasible where an encoder cannot choose, or options of the task mean nothing to it."""
    if not info.offers & {FILLS, CHOOSES}:
        raise Infeasible(
            f"task {task.name} needs an encoder that fills masks or chooses among options, and model {info.ref} has neither head "
            f"({info.head}); allowed: …ForMaskedLM, …ForMultipleChoice, language models"
        )
    head = CHOOSES in info.offers
    for wrong, what in (
        (task.chat, "chat = true"),
        (head and task.normalise != "none", f"normalise = {task.normalise!r}"),
        (head and task.shots > 0, f"shots = {task.shots}"),
    ):
        if wrong:
            raise Infeasible(
                f"task {task.name}: {what} means nothing to model {info.ref}, a {info.head} encoder; leave it out"
            )


@torch.no_grad()
def evaluate(task: Choice, model: EncoderModel, ctx: StageContext, seed: int) -> Iterator[Shard]:
    """Ask shard by shard."""
    for examples in shards(task, task.examples(), task.shard, seed):
        found = [_answer(task, model, example) for example in examples]
        columns = {name: np.array([scores[name] for scores in found]) for name in found[0]}
        yield Shard(np.array([example.id for example in examples]), columns.pop("error"), columns)


@torch.no_grad()
def measure(task: Choice, model: EncoderModel) -> dict[str, float]:
    """Mean footprint of one question with all its options; seconds and peak are of the first.

    ``text_tokens`` are those of one option's text, however often it is read with another mask; ``passes`` says how many rows an
    answer takes.
    """
    examples = task.examples()[:MEASURED]
    flops = [flops_of(lambda example=example: _answer(task, model, example))[0] for example in examples]  # type: ignore[misc]
    rows = [_rows(task, model, example) for example in examples]
    return {
        **cost_of_run(model, lambda: _answer(task, model, examples[0])),
        "text_tokens": float(np.mean([len(ids) for own in rows for ids in own])),
        "passes": float(np.mean([len(own) for own in rows])),
        "flops": float(np.mean(flops)),
        "flops_llm": float(np.mean(flops)),
    }


def _answer(task: Choice, model: EncoderModel, example: Example) -> dict[str, float]:
    if CHOOSES in model.info.offers:
        logits_O = model.choose(model.batch(_pairs(task, model, example)))
        return task.judged(example, -logits_O.log_softmax(-1).double().cpu().numpy(), logits_O.double().cpu().numpy())
    losses, lengths = [], []
    for masked in _masked(task, model, example):
        losses.append(_loss(model, masked))
        lengths.append(len(masked))
    return task.scored(example, np.array(losses), np.array(lengths, dtype=float))


def _rows(task: Choice, model: EncoderModel, example: Example) -> list[Any]:
    if CHOOSES in model.info.offers:
        return [row["input_ids"] for row in _pairs(task, model, example)]
    return [row["input_ids"] for masked in _masked(task, model, example) for row, _, _ in masked]


def _pairs(task: Choice, model: EncoderModel, example: Example) -> list[Any]:
    """Each option as a pair with what is asked, as the head was trained: the context with question and option (RACE), or question and option."""
    options = task.options_of(example)
    if task.prompt:
        asked, before = task.text_of(example).text, ""
    elif task.context:
        asked, before = shown(example.row, task.context), f"{shown(example.row, task.question)} "
    else:
        asked, before = shown(example.row, task.question), ""
    return [model.tokens(asked, before + option, cut=False) for option in options]


Masked = list[tuple[Any, int, int]]
"""A text once for each of its tokens that are asked for: tokenised with that one masked, its place, and what stood there."""


def _masked(task: Choice, model: EncoderModel, example: Example) -> Iterator[Masked]:
    """Of each option, its tokens behind the prompt, masked one at a time (pseudo-log-likelihood, arXiv 1910.14659)."""
    prompt = task.text_of(example).text.rstrip()
    for option in task.options_of(example):
        whole = model.tokens(f"{prompt} {option}", cut=False, return_offsets_mapping=True)
        places = [n for n, (start, stop) in enumerate(whole["offset_mapping"]) if stop > max(start, len(prompt))]
        rows = []
        for place in places:
            ids = list(whole["input_ids"])
            target, ids[place] = ids[place], model.tokenizer.mask_token_id
            types = {"token_type_ids": whole["token_type_ids"]} if "token_type_ids" in whole else {}
            rows.append(({"input_ids": ids, **types}, place, target))
        yield rows


def _loss(model: EncoderModel, masked: Sequence[tuple[Any, int, int]]) -> float:
    """Negative pseudo-log-likelihood of an option in nats."""
    total = 0.0
    for numbers in model.batches([len(row["input_ids"]) for row, _, _ in masked]):
        plain = model.batch([masked[n][0] for n in numbers])
        targets_BT = torch.full_like(plain.ids_BT, NOT_SCORED)
        for row, number in enumerate(numbers):
            targets_BT[row, masked[number][1]] = masked[number][2]
        batch = EncoderBatch(plain.ids_BT, plain.mask_BT, plain.types_BT, targets_BT=targets_BT)
        logits_SW, targets_S = model.fill(batch)
        total += float(_nll(logits_SW, targets_S).sum())
    return total


def _nll(logits_SW: Tensor, targets_S: Tensor) -> Tensor:
    return F.cross_entropy(logits_SW.float(), targets_S, reduction="none").double()
