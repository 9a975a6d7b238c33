"""Passes over prompts that are run once and serve every method on the cache: the same figures to the last bit, and never when measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from kv_cases import small

from isoflop.methods.base import METHODS, build
from isoflop.methods.kv_cache.base import KvCacheMethod
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.models.contexts import Scores, read_contexts
from isoflop.models.hooks.attention import ATTENTION, CacheReport
from isoflop.models.lm import LmModel
from isoflop.models.prompt_passes import PromptPass, PromptPasses

NAMES = [name for name in METHODS.names() if issubclass(METHODS.get(name), KvCacheMethod)]
CONTEXTS = [list(range(1, 31)), list(range(9, 28))]
TAILS = [[5, 9, 2, 4], [7, 1, 3, 3]]


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(layers=3)


@contextmanager
def counted(lm: LmModel) -> Iterator[list[int]]:
    """Widths of the decoder's passes."""
    widths: list[int] = []
    handle = lm.decoder.register_forward_hook(lambda module, args, output: widths.append(output[0].shape[1]))
    try:
        yield widths
    finally:
        handle.remove()


def asked(
    lm: LmModel, method: KvCacheMethod, prepared: object, known: bool
) -> tuple[Scores, list, CacheReport, list[int]]:
    with method.apply(lm, prepared), counted(lm) as widths, torch.no_grad():
        with read_contexts(lm, CONTEXTS, known=known) as contexts:
            scores = contexts.score(TAILS, [4, 2])
            said = contexts.generate([tail[:2] for tail in TAILS], 5, frozenset())
        policy = lm.occupant(ATTENTION)
        assert policy is not None
        return scores, said, policy.report(), widths


@pytest.mark.parametrize("name", NAMES)
def test_a_known_prompt_gives_what_reading_it_gives(name: str, probe: KvCacheProbe) -> None:
    lm, method = probe.model, small(name)
    lm.passes = PromptPasses()
    prepared = probe.prepared(method, 0)
    read, said, report, widths = asked(lm, method, prepared, known=False)
    first, *_ = asked(lm, build("knorm", {}), None, known=True)
    again = asked(lm, method, prepared, known=True)  # another method has read it
    once_more = asked(lm, method, prepared, known=True)
    for found in (again, once_more):
        assert found[0].nll_B.tolist() == read.nll_B.tolist()
        assert found[1:3] == (said, report)
    assert max(widths) == 30
    if method.exact_prompt:
        assert once_more[3].count(30) == widths.count(30) - 1, "the prompt was not run again"
    assert first.nll_B.tolist() != read.nll_B.tolist() or name == "knorm"


def test_a_prompt_that_is_read_under_the_budget_is_always_run(probe: KvCacheProbe) -> None:
    lm, method = probe.model, build("a2sf", {"prompt": "sequential", "keep": 0.5})
    lm.passes = PromptPasses()
    for _ in range(2):
        *_, widths = asked(lm, method, None, known=True)
        assert max(widths) == 30


def test_another_padding_another_prompt_and_another_occupant_are_other_passes(probe: KvCacheProbe) -> None:
    lm, method = probe.model, build("snapkv", {"window": 4})
    lm.passes = PromptPasses()

    def run(contexts: list[list[int]], beside: str | None = None) -> int:
        with torch.no_grad(), counted(lm) as widths:
            if beside is None:
                with method.apply(lm, None), read_contexts(lm, contexts, known=True):
                    return len(widths)
            other = build(beside, {"bits": 3})
            with other.apply(lm, None), method.apply(lm, None), read_contexts(lm, contexts, known=True):
                return len(widths)

    assert run(CONTEXTS) == 1
    assert run(CONTEXTS) == 0
    assert run(CONTEXTS[:1]) == 1
    assert run([[0] * 11 + CONTEXTS[1], CONTEXTS[1] + CONTEXTS[1][:11]]) == 1
    assert run([CONTEXTS[0], [*CONTEXTS[1][:-1], 40]]) == 1
    assert run(CONTEXTS, beside="rtn") == run(CONTEXTS, beside="rtn") == 1, "weights are others"
    assert run(CONTEXTS) == 0


def a_pass(size: int) -> PromptPass:
    return PromptPass([], torch.zeros(1)) if size == 0 else _Sized([], torch.zeros(1), size)


class _Sized(PromptPass):
    def __init__(self, calls: list, last_BW: torch.Tensor, size: int) -> None:
        super().__init__(calls, last_BW)
        self.size = size

    @property
    def bytes(self) -> int:
        return self.size


def test_what_is_kept_stays_through_rounds_and_goes_when_it_is_not_asked_for() -> None:
    """Four prompts come round and round, and three have room: three are found in every round."""
    passes = PromptPasses(most_bytes=30)
    found = []
    for _ in range(5):
        for key in (b"a", b"b", b"c", b"d"):
            known = passes.find(key)
            found.append(known is not None)
            if known is None:
                passes.keep(key, a_pass(10))
    assert found == [False] * 4 + [True, True, True, False] * 4
    for _ in range(20):  # another task's prompts
        for key in (b"x", b"y"):
            if passes.find(key) is None:
                passes.keep(key, a_pass(10))
    assert passes.find(b"x") is not None
    assert passes.find(b"y") is not None
    passes.keep(b"huge", a_pass(31))
    assert passes.find(b"huge") is None


def test_bytes_are_those_of_queries_keys_and_values(probe: KvCacheProbe) -> None:
    lm = probe.model
    lm.passes = PromptPasses()
    asked(lm, build("snapkv", {"window": 4}), None, known=True)
    (kept,) = lm.passes._kept.values()
    geometry = lm.info.geometry
    heads = geometry["heads"] + 2 * geometry["kv_heads"]
    assert kept.bytes == 2 * 30 * geometry["layers"] * heads * geometry["head_width"] * 4
    assert replace(kept, calls=kept.calls[:1]).bytes * geometry["layers"] == kept.bytes
