"""Caches that grow: a step writes its token behind the others, and keeps nothing alive that is not counted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from allocations import Allocations
from kv_cases import small
from torch import Tensor

from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.base import CompressedCache, KvCacheMethod
from isoflop.methods.kv_cache.ems import EMS
from isoflop.methods.kv_cache.eviction import Rolling
from isoflop.methods.kv_cache.probe import VOCABULARY, KvCacheProbe
from isoflop.models.growing import Rooms
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.segments import DenseSegment, Segment, stored_bytes
from isoflop.models.whole_cache import WholeCache

NAMES = [name for name in METHODS.names() if issubclass(METHODS.get(name), KvCacheMethod)]
LAYERS, PROMPT, STEPS = 3, 128, 40


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(layers=LAYERS)


def a_prompt(tokens: int = PROMPT) -> Tensor:
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_what_has_grown_is_what_was_joined() -> None:
    rng, rooms = torch.Generator().manual_seed(0), Rooms()
    parts = [torch.randn(2, 3, tokens, 4, generator=rng) for tokens in (0, 5, 1, 1, 30, 0, 2)]
    held, moved = parts[0], 0
    for count, part in enumerate(parts[1:], 2):
        before, held = held, rooms.append("x", held, part)
        moved += held.data_ptr() != before.data_ptr()
        assert torch.equal(held, torch.cat(parts[:count], dim=2))
    assert moved == 3  # the first tokens, the first of room, the thirty


@torch.no_grad()
def test_no_two_owners_write_into_the_same_room() -> None:
    """A copy, a slice and an older state of what has grown all go their own ways."""
    zeros, one, two = (torch.full((1, 1, 1, 2), float(n)) for n in range(3))
    positions = torch.zeros(1, 1, 1, dtype=torch.long)
    segment = DenseSegment(positions, None, zeros, zeros)
    segment.append(zeros, zeros, positions + 1)
    twin = copy.deepcopy(segment)
    part = DenseSegment(segment.positions_BGN, None, segment.k_BGND, segment.v_BGND)
    segment.append(one, one, positions + 2)
    part.append(two, two, positions + 2)
    twin.append(zeros, zeros, positions + 2)
    assert [s.k_BGND[0, 0, :, 0].tolist() for s in (segment, part, twin)] == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]


@torch.no_grad()
def test_a_part_of_the_rows_or_heads_grows_by_itself() -> None:
    """Its memory begins where that of the whole does."""
    rooms, whole = Rooms(), torch.zeros(2, 3, 1, 4)
    whole = rooms.append("x", whole, whole)
    for part in (whole[:1], whole[:, :1]):
        new = torch.ones_like(part[:, :, :1])
        assert torch.equal(rooms.append("x", part, new), torch.cat((part, new), dim=2))
    assert not whole.any()


def test_gradients_flow_through_what_has_grown() -> None:
    k, positions = torch.randn(1, 1, 3, 2, requires_grad=True), torch.arange(3)[None, None]
    segment = DenseSegment(positions, None, k, k)
    first = segment.keys().pow(2).sum()
    segment.append(k, k, positions + 3)
    (first + segment.keys().pow(2).sum()).backward()
    torch.testing.assert_close(k.grad, 6 * k)


@torch.no_grad()
def test_room_is_no_content() -> None:
    segment = DenseSegment(*_tokens(20))
    segment.append(*_tokens(1, behind=20))
    assert segment.k_BGND.untyped_storage().nbytes() > segment.k_BGND.nbytes  # there is room
    assert stored_bytes(segment.tensors(), 32) == 2 * 21 * 4 * 4 * 2


def _tokens(count: int, behind: int | None = None) -> Any:
    k, positions = torch.ones(1, 2, count, 4), torch.arange(count).expand(1, 2, count)
    return (positions, None, k, k.clone()) if behind is None else (k, k.clone(), positions + behind)


@pytest.mark.parametrize("name", [*NAMES, "no method"])
def test_a_step_of_decoding_does_not_copy_the_cache(name: str, probe: KvCacheProbe) -> None:
    """Whatever joins or moves keys of at least the kept prompt: nothing but growth, at most once in a quarter of the tokens."""
    model = probe.model
    whole = WholeCache(16) if name == "no method" else None
    method = None if whole else small(name)
    keys = int(PROMPT * getattr(method, "keep", 1.0)) * 2 * 16
    placed = model.occupy(ATTENTION, whole) if whole else method.apply(model, probe.prepared(method, 0))  # type: ignore[union-attr]
    with torch.no_grad(), placed:
        policy: Any = model.occupant(ATTENTION)
        with policy.session():
            model.module(a_prompt(), use_cache=False)
            with Allocations(least=keys) as seen:
                for step in range(STEPS):
                    position = torch.tensor([[PROMPT + step]])
                    model.module(torch.tensor([[step]]), position_ids=position, use_cache=False)
    merges = STEPS // method.window if isinstance(method, EMS) else 0  # each of which writes all that is held anew
    assert seen.large["cat"] == 2 * LAYERS * merges
    assert seen.large["copy_"] <= 2 * 2 * LAYERS  # keys and values, and what goes with an eviction
    evicts = isinstance(method, Rolling)
    assert seen.large["gather"] <= 2 * LAYERS * (STEPS * evicts + 4 * merges)


@pytest.mark.parametrize("name", NAMES)
def test_a_session_keeps_nothing_alive_that_it_does_not_count(name: str, probe: KvCacheProbe) -> None:
    """Memory behind all tensors of the compressed prompt, positions apart, is what the report says."""
    method = small(name)
    with torch.no_grad(), method.apply(probe.model, probe.prepared(method, 0)):
        policy = probe.model.occupant(ATTENTION)
        assert isinstance(policy, CompressedCache)
        with policy.session():
            probe.model.module(a_prompt(), use_cache=False)
            positions = {s.positions_BGN.untyped_storage().data_ptr() for s in _segments(policy._stores)}
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(policy._stores)}
            alive = sum(storage.nbytes() for place, storage in storages.items() if place not in positions)
            held = [t for store in (policy._stores or {}).values() for t in store.resident()]
            counted = stored_bytes(held, 32)  # what layers share counts once
    # half of what is left out of count in a whole cache would be 8 times as much
    assert counted <= alive <= counted + 8 * LAYERS * 2 * PROMPT


def _segments(held: Any) -> Iterator[Segment]:
    for store in held.values():
        yield from store.all()


def _tensors(held: Any) -> Iterator[Tensor]:
    """Every tensor that can be reached."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Rooms):
        yield from held._buffers.values()
    elif is_dataclass(held) and not isinstance(held, type):
        for field in fields(held):
            yield from _tensors(getattr(held, field.name))
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, (list, tuple)):
        for value in held:
            yield from _tensors(value)
