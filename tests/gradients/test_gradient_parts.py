"""Codings, selectors, memories, byte counting: against definitions and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from gradient_cases import exchanged, random_gradients
from hypothesis import given
from hypothesis import strategies as st

from isoflop.methods.gradients.coding import CODINGS, Entries, EntryCoding, decode_varint, encode_varint
from isoflop.methods.gradients.compressors import LowRank, RandomK
from isoflop.methods.gradients.exchange import Compression, Exchanger, clipped
from isoflop.methods.gradients.memory import ErrorFeedback, MomentumCorrection, Sent
from isoflop.methods.gradients.selection import (
    ADAPTATIONS,
    LOWER,
    entries_at,
    exact_top,
    sample_stride,
    selected_above,
    warmed_density,
)
from isoflop.models.training.collectives import ByteMeter, Gather, Sum, Worker, dense_wire_bytes, run_together


@given(
    numel=st.integers(1, 3000),
    share=st.floats(0, 1),
    coding=st.sampled_from(CODINGS),
    values=st.sampled_from(["fp32", "fp16"]),
    counted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_entries_survive_their_journey(
    numel: int, share: float, coding: str, values: str, counted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = round(share * numel)
    indices_K = torch.randperm(numel, generator=generator)[:count].sort().values
    values_K = torch.randn(count, generator=generator)
    code = EntryCoding(values, coding, counted)
    message_B = code.encode(Entries(indices_K, values_K), numel)
    tail = torch.full((5,), 255, dtype=torch.uint8)  # another tensor's message
    found, used = code.decode(torch.cat((message_B, tail)), numel, count)
    assert used == len(message_B)
    assert torch.equal(found.indices_K, indices_K)
    assert torch.equal(found.values_K, values_K if values == "fp32" else values_K.half().float())
    size = {"int32": 4 * count, "int64": 8 * count, "bitmap": math.ceil(numel / 8)}
    if coding in size:
        assert len(message_B) == size[coding] + count * (4 if values == "fp32" else 2) + (0 if counted else 4)


@given(st.lists(st.integers(0, 2**35 - 1), max_size=40))
def test_varints(numbers: list[int]) -> None:
    message_B = encode_varint(torch.tensor(numbers, dtype=torch.int64))
    assert len(message_B) == sum(max(1, math.ceil(number.bit_length() / 7)) for number in numbers)
    found, used = decode_varint(torch.cat((message_B, torch.tensor([3], dtype=torch.uint8))), len(numbers))
    assert found.tolist() == numbers
    assert used == len(message_B)


def test_float16_cuts_what_it_cannot_hold() -> None:
    entries = Entries(torch.tensor([0, 1, 2]), torch.tensor([1e6, -1e6, 1e-9]))
    code = EntryCoding("fp16")
    found, _ = code.decode(code.encode(entries, 3), 3, 3)
    assert found.values_K.tolist() == [65504.0, -65504.0, 0.0]


def test_exact_sampler_is_brute_force_top_k() -> None:
    generator = torch.Generator().manual_seed(0)
    for numel in (1, 7, 500):
        magnitude_n = torch.randn(numel, generator=generator).abs()
        for density in (0.001, 0.01, 0.3, 1.0):
            k = entries_at(density, numel)
            brute = sorted(sorted(range(numel), key=lambda i: -float(magnitude_n[i]))[:k])
            assert exact_top(magnitude_n, k).tolist() == brute
            assert k == max(1, math.ceil(round(density * numel, 9)))


@pytest.mark.parametrize("density", [0.002, 0.01, 0.05])
@pytest.mark.parametrize("heavy", [False, True])
def test_sampled_count_is_near_k_before_it_is_cut(density: float, heavy: bool) -> None:
    """Within [0.8, 1.3]·k unless the adaptations ran out; never more than k are sent, and they are large ones."""
    generator = torch.Generator().manual_seed(0)
    for numel in (5_000, 40_000):
        magnitude_n = torch.randn(numel, generator=generator).abs() ** (4 if heavy else 1)
        k = entries_at(density, numel)
        for _ in range(10):
            indices_K, count, adaptations = selected_above(magnitude_n, k, generator)
            assert count <= 1.3 * k
            assert count >= LOWER * k or adaptations == ADAPTATIONS
            assert len(indices_K) == min(k, count)
            assert torch.equal(indices_K, indices_K.sort().values)
            assert magnitude_n[indices_K].min() >= magnitude_n.topk(3 * k).values[-1]


def test_samples_hold_their_share_and_enough_for_a_threshold() -> None:
    for numel in (100, 10_000, 1_000_000):
        for density in (0.001, 0.05):
            stride = sample_stride(numel, density)
            assert stride == 1 or numel // stride >= max(math.ceil(numel * 0.01), math.ceil(2 / density))


def test_warm_up_falls_exponentially() -> None:
    found = [warmed_density(1e-6, step, 10) for step in range(12)]
    assert found == pytest.approx([10**-e for e in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)])
    assert warmed_density(0.01, 0, 0) == 0.01


def test_same_place_from_several_workers_adds_up_and_is_divided_by_all() -> None:
    from isoflop.methods.gradients.topk_ef import TopKFeedback

    shapes = {"w": torch.Size((2, 3))}
    method = TopKFeedback(workers=3, density=1 / 6, warmup=0.0, clip=False)
    from gradient_cases import settings

    exchanges = [method.exchange(s) for s in settings(method, shapes)]
    grads = [torch.tensor([[0.0, value, 0.0], [0.0, 0.0, 0.1]]) for value in (3.0, 6.0, 0.0)]
    directions, _ = exchanged(exchanges, 0, [{"w": g} for g in grads])
    assert torch.allclose(directions[0]["w"], torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.1 / 3]]))


def test_error_feedback_and_momentum_keep_what_was_not_sent() -> None:
    sent = Sent(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0]))
    feedback = ErrorFeedback()
    x = feedback.compensate("w", torch.ones(2, 2))
    feedback.retain("w", x, sent)
    assert feedback.compensate("w", torch.zeros(2, 2)).tolist() == [[0.0, 1.0], [1.0, 1.0]]
    memory = MomentumCorrection(0.5, nesterov=True)
    v = memory.compensate("w", torch.full((2, 2), 2.0))
    assert v.tolist() == [[3.0, 3.0], [3.0, 3.0]]  # u = 1, v = u + g
    memory.retain("w", v, Sent(v, v * torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0])))
    assert memory.accumulated["w"].tolist() == [[0.0, 3.0], [3.0, 3.0]]
    assert memory.velocity["w"].tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_clipping_takes_all_tensors_together() -> None:
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    short = clipped(grads, 1.0)
    assert torch.stack(list(short.values())).norm() == pytest.approx(1.0, rel=1e-5)
    assert clipped(grads, 10.0)["a"] == 3.0


def test_low_rank_returns_a_mean_of_that_rank_exactly() -> None:
    """One power iteration spans the columns of a matrix whose rank is not above its own, through the real exchange."""
    draw = torch.Generator().manual_seed(0)
    grads = [{"w": torch.outer(torch.randn(20, generator=draw), torch.randn(30, generator=draw))} for _ in range(2)]
    mean = torch.stack([g["w"] for g in grads]).mean(0)
    for rank, exact in ((2, True), (1, False)):
        exchanges = [
            Exchanger(2, Compression(LowRank(rank, 2, 0), ErrorFeedback(), frozenset({"w"}))) for _ in range(2)
        ]
        directions, _ = exchanged(exchanges, 0, grads)
        assert torch.equal(directions[0]["w"], directions[1]["w"])
        assert torch.allclose(directions[0]["w"], mean, atol=1e-4) is exact


def test_low_rank_is_a_projection_of_the_mean() -> None:
    """What is applied is the mean projected on as many directions, so that the rest is orthogonal to it."""
    grads = random_gradients(2, {"w": torch.Size((20, 30))}, 0)
    exchanges = [Exchanger(2, Compression(LowRank(2, 2, 0), ErrorFeedback(), frozenset({"w"}))) for _ in range(2)]
    directions, _ = exchanged(exchanges, 0, grads)
    mean, applied = torch.stack([g["w"] for g in grads]).mean(0), directions[0]["w"]
    assert torch.allclose(((mean - applied) * applied).sum(), torch.tensor(0.0), atol=1e-3)
    assert applied.norm() > 0.2 * mean.norm()  # two of twenty directions of noise hold more than a tenth of its square


def test_low_rank_errors_add_up_to_what_is_missing() -> None:
    """Average of what workers keep = average gradient - what was applied, also for tensors that are sent whole."""
    shapes = {"w": torch.Size((20, 30)), "small": torch.Size((2, 2))}
    grads = random_gradients(2, shapes, 0)
    exchanges = [Exchanger(2, Compression(LowRank(2, 2, 0), ErrorFeedback(), frozenset(shapes))) for _ in range(2)]
    directions, _ = exchanged(exchanges, 0, grads)
    for name in shapes:
        mean = torch.stack([g[name] for g in grads]).mean(0)
        kept = torch.stack([e.compression.memory.error[name] for e in exchanges]).mean(0)  # type: ignore[union-attr]
        assert torch.allclose(kept + directions[0][name], mean, atol=1e-6)
    assert torch.linalg.matrix_rank(directions[0]["w"]) == 2
    assert not exchanges[0].compression.memory.error["small"].any()  # type: ignore[union-attr]


def test_random_places_are_common_and_change() -> None:
    compressor, other = RandomK(lambda _: 0.1, 2, 7), RandomK(lambda _: 0.1, 2, 7)
    assert torch.equal(compressor.places("w", 100, 3), other.places("w", 100, 3))
    assert not torch.equal(compressor.places("w", 100, 3), compressor.places("w", 100, 4))
    assert len(compressor.places("w", 100, 3).unique()) == 10


def test_meter_counts_what_collectives_send() -> None:
    """A ring all-reduce, paddings and lengths included; gathered bytes go to everybody else."""
    meter = ByteMeter(4)
    meter.sum(10)  # padded to 12
    assert meter.wire == dense_wire_bytes(12, 4) == 2 * 3 / 4 * 48
    assert meter.payload == 40
    meter.gather(5, 9, fixed=False)
    assert meter.wire == 72 + 3 * (9 + 4)
    assert meter.payload == 45


def test_workers_that_ask_for_different_things_are_an_error() -> None:
    def asks(request):  # type: ignore[no-untyped-def]
        yield request

    vector, message = torch.zeros(2), torch.zeros(2, dtype=torch.uint8)
    for pair, what in (
        ((Sum(vector), Gather(message, True)), "different things"),
        ((Sum(vector), Sum(torch.zeros(3))), "different lengths"),
        ((Gather(message, True), Gather(message[:1], True)), "fixed length"),
    ):
        with pytest.raises(RuntimeError, match=what):
            run_together([Worker(asks(request), ByteMeter(2)) for request in pair])
