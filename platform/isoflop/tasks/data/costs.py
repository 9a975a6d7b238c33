"""What answers behind compressed contexts cost, measured on single examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from isoflop.models.counting import flops_of
from isoflop.models.hooks.attention import ATTENTION, CacheReport
from isoflop.models.lm import LmModel
from isoflop.tasks.footprint import byte_costs, decoder_cache, peak_bytes_of, seconds_of

MEASURED = 4
"""Examples over which costs are averaged, since prompts differ in length …"""
MEASURED_TOKENS = 1024
"""… but of these no more than have so many tokens together: measuring long windows took longer than scoring them."""


@dataclass(frozen=True)
class Priced:
    """One example to be measured.

    Attributes:
        prepare: gives what ``run`` is called with: text as the method on it leaves it; its FLOPs are the method's.
        run: reads and answers, batch of one.
        length: tokens of context and answer; ``context`` those of the context alone.
        dense: tokens without any method on the text.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    length: int
    context: int
    dense: int


def costs_of(lm: LmModel, examples: Sequence[Priced]) -> dict[str, float]:
    """Means over examples; seconds and peak, and what a method on the cache says for itself, are of the first.

    ``text_tokens`` are those of a prompt and its longest answer, ``prompt_tokens`` those of its context.
    """
    examples = _measured(examples)
    costs, caches = [], []
    for example in reversed(examples):  # so that what a method on the cache says for itself is of the first
        method, prepared = flops_of(example.prepare)
        language, cache = _flops_and_cache(lm, lambda example=example, prepared=prepared: example.run(prepared))  # type: ignore[misc]
        costs.append((method, language))
        caches.append(cache)
    method, language = np.mean(costs, axis=0).tolist()
    cache = CacheReport(*(float(np.mean([getattr(c, f.name) for c in caches])) for f in fields(CacheReport)))

    def answer() -> Any:
        return examples[0].run(examples[0].prepare())

    dense = float(np.mean([lm.dense_cache_bytes(example.dense) for example in examples]))
    peak = peak_bytes_of(answer, lm.devices)
    return {
        "visual_tokens": 0.0,
        "text_tokens": float(np.mean([example.length for example in examples])),
        "prompt_tokens": float(np.mean([example.context for example in examples])),
        "flops": method + language,
        "flops_llm": language,
        "flops_method": method,
        **byte_costs(lm, cache, dense),
        "seconds": seconds_of(answer, lm.devices, warm=True),
        "peak_bytes": float(lm.resident_bytes() + peak),
    }


def _measured(examples: Sequence[Priced]) -> Sequence[Priced]:
    """All of them, or of more than ``MEASURED_TOKENS`` those whose length is nearest to the mean, one at least."""
    lengths = np.array([example.length for example in examples])
    nearest = np.argsort(np.abs(lengths - lengths.mean()), kind="stable")
    fit = max(1, int((np.cumsum(lengths[nearest]) <= MEASURED_TOKENS).sum()))
    return [examples[place] for place in sorted(nearest[:fit])]


def _flops_and_cache(lm: LmModel, run: Callable[[], Any]) -> tuple[int, CacheReport]:
    """Of one answer. Where a method keeps the cache, one pass tells both; else the cache is kept once more to be measured."""
    if lm.occupant(ATTENTION) is None:
        return flops_of(run)[0], decoder_cache(lm, run)
    found: list[int] = []
    cache = decoder_cache(lm, lambda: found.append(flops_of(run)[0]))
    return found[0], cache
