"""Everything that a cache holds of a request is counted: whatever tensor can be reached from a store, in batches with padding, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from kv_cases import FITTING
from torch import Tensor

from isoflop.methods.base import METHODS, build
from isoflop.methods.kv_cache.base import KvCacheMethod
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.models.contexts import read_contexts

NOT_HELD = {"positions_BGN", "heads_G", "channels", "mean", "rooms", "_rooms"}
"""Order queries against keys, or are known of the model, or belong to the making of a block; and room that holds nothing yet."""
FORGETFUL = {"tova", "streaming-llm"}
"""Whose scores are made anew for each choice."""
CASES: list[tuple[str, dict[str, Any]]] = [
    *((n, FITTING.get(n, {})) for n in METHODS.names() if issubclass(METHODS.get(n), KvCacheMethod)),
    ("kivi", {"residual": 4, "group": 4}),
    ("think", {"recent": 5, "keep": 0.6, "window": 6}),
    ("ems", {"window": 3, "count_bias": True}),
    ("kv-rtn", {"streaming_gap": 3}),
    ("duo-attention", {"full": 0.0, "recent": 3}),
]


def reached(one: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors within, by the names of what holds them."""
    if isinstance(one, Tensor):
        yield name, one
    elif is_dataclass(one):
        for field in fields(one):
            if field.name not in NOT_HELD:
                yield from reached(getattr(one, field.name), f"{name}.{field.name}")
    elif isinstance(one, dict):
        for key, value in one.items():
            if key not in NOT_HELD:
                yield from reached(value, f"{name}[{key}]")
    elif isinstance(one, (list, tuple)):
        for place, value in enumerate(one):
            yield from reached(value, f"{name}[{place}]")


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(layers=3)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_no_tensor_of_a_store_goes_uncounted(name: str, knobs: dict[str, Any], probe: KvCacheProbe) -> None:
    method, lm = build(name, knobs), probe.model
    assert isinstance(method, KvCacheMethod)
    contexts = [list(range(1, 31)), list(range(9, 28))]
    with method.apply(lm, probe.prepared(method, 0)), read_contexts(lm, contexts) as read:
        for tails in ([[5], [7]], [[5, 9, 2, 4, 8, 3], [7, 1, 3, 3, 9, 9]]):
            read.generate(tails, 1, frozenset())
        stores = method.cache(lm).stores()
        with method.cache(lm).returning():
            read._pass(read._ids([[5, 9, 2, 4, 8, 3], [7, 1, 3, 3, 9, 9]]), 0, 1)
            later = method.cache(lm).stores()
        for held in (stores, later):
            parts = [t for store in held.values() for t in (*store.resident(), *store.recent.tensors())]
            counted = {t.data_ptr() for t in parts if t.numel()}
            found = {path for path, t in reached(held) if t.numel() and t.data_ptr() not in counted}
            assert not {path for path in found if name not in FORGETFUL or not path.endswith("[scores]")}
