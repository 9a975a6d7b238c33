"""Deep Gradient Compression: what only the real algorithm does."""

from __future__ import annotations

import pytest
import torch
from gradient_cases import Recipe, exchanged, lessons, random_gradients, settings, simulated
from gradient_cases import Regression as Network

from isoflop.methods.gradients.base import GradientMethod
from isoflop.methods.gradients.dense import DenseGradients
from isoflop.methods.gradients.dgc import Dgc
from isoflop.methods.gradients.exchange import Exchanger
from isoflop.methods.gradients.memory import MomentumCorrection
from isoflop.models.training.collectives import dense_wire_bytes
from isoflop.models.training.loop import descend

SHAPES = {"w": torch.Size((20, 30)), "conv": torch.Size((4, 3, 3)), "bias": torch.Size((20,))}
ALL = {"density": 1.0, "warmup": 0.0, "clip": False, "lr": 0.02}


def alone(momentum: float, nesterov: bool = False, clip: float = 1e9) -> Network:
    """The network trained by one process on whole batches."""
    network, recipe = Network(), Recipe(clip=clip)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=momentum, nesterov=nesterov)
    descend(optimizer, recipe, lessons(recipe.steps), network)
    return network


def assert_close(a: Network, b: Network, tolerance: float = 1e-6) -> None:
    for (name, one), other in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.allclose(one, other, atol=tolerance), name


@pytest.mark.parametrize("nesterov", [False, True])
def test_everything_sent_without_masking_is_momentum_sgd(nesterov: bool) -> None:
    method = Dgc(masking=False, workers=3, nesterov=nesterov, **ALL)
    assert_close(simulated(method)[0], alone(0.9, nesterov))


def test_everything_sent_with_masking_is_sgd_without_momentum() -> None:
    """For matrices; vectors are not compressed and keep theirs."""
    sent, plain = exchangers(Dgc(masking=True, **ALL)), exchangers(Dgc(momentum=0.0, masking=False, **ALL))
    for step in range(4):
        grads = random_gradients(2, SHAPES, step)
        (a, *_), _ = exchanged(sent, step, grads)
        (b, *_), _ = exchanged(plain, step, grads)
        assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in SHAPES)


def test_dense_is_the_training_of_one_process() -> None:
    network, report = simulated(DenseGradients(workers=2, lr=0.02), Recipe(clip=0.5))
    assert_close(network, alone(0.9, clip=0.5))
    assert report.steady(report.wire_bytes) == pytest.approx(report.dense_step_bytes, rel=0.01)


@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("sampler", ["exact", "sampled"])
def test_nothing_is_lost(values: str, sampler: str) -> None:
    """Sum of everything sent + v = sum over time of u, with masking off; in float16 the rounding stays in v."""
    workers = exchangers(Dgc(density=0.05, masking=False, warmup=0.0, clip=False, values=values, sampler=sampler))
    sent = dict.fromkeys(("w", "conv"), 0.0)
    produced = [dict.fromkeys(("w", "conv"), 0.0) for _ in workers]
    for step in range(8):
        directions, _ = exchanged(workers, step, random_gradients(2, SHAPES, step))
        for name in sent:
            sent[name] = sent[name] + 2 * directions[0][name]
            for worker, total in zip(workers, produced, strict=True):
                total[name] = total[name] + memory_of(worker).velocity[name]
    for name in sent:
        left = sum(memory_of(worker).accumulated[name] for worker in workers)
        assert torch.allclose(sent[name] + left, sum(total[name] for total in produced), atol=1e-4)


def test_what_was_sent_is_exactly_zero_in_both_memories() -> None:
    workers = exchangers(Dgc(density=0.1, warmup=0.0, clip=False))
    for step in range(3):
        exchanged(workers, step, random_gradients(2, SHAPES, step))
    grads = random_gradients(2, SHAPES, 9)
    for worker, own in zip(workers, grads, strict=True):
        memory = memory_of(worker)
        for name in ("w", "conv"):
            v = memory.accumulated[name] + 0.9 * memory.velocity[name] + own[name]
            expected = v.abs().flatten().topk(-(-v.numel() // 10)).indices
            own[f"expected {name}"] = expected
    expected_of = [{n: own.pop(f"expected {n}") for n in ("w", "conv")} for own in grads]
    exchanged(workers, 3, grads)
    for worker, expected in zip(workers, expected_of, strict=True):
        memory = memory_of(worker)
        for name, places in expected.items():
            assert not memory.accumulated[name].flatten()[places].any()
            assert not memory.velocity[name].flatten()[places].any()
            assert int((memory.accumulated[name] == 0).sum()) == len(places)


def test_replicas_are_bit_identical() -> None:
    """All workers apply the same direction, step by step."""
    workers = exchangers(Dgc(density=0.02, workers=4))
    for step in range(50):
        directions, _ = exchanged(workers, step, random_gradients(4, SHAPES, step))
        for name in SHAPES:
            assert all(torch.equal(directions[0][name], other[name]) for other in directions[1:])


@pytest.mark.parametrize("workers", [2, 4])
def test_wire_bytes_are_the_formula(workers: int) -> None:
    """(N-1)·k·(4+4) for the matrices, a ring all-reduce for the vectors; 1/(N·r) against dense."""
    method = Dgc(density=0.01, workers=workers, warmup=0.0)
    _, meters = exchanged(exchangers(method), 0, random_gradients(workers, SHAPES, 0))
    entries = 6 + 1  # ⌈0.01·600⌉ and ⌈0.01·36⌉
    assert meters[0].wire == (workers - 1) * entries * 8 + dense_wire_bytes(20, workers)
    assert meters[0].payload == entries * 8 + 80
    big = {"w": torch.Size((500, 400))}
    _, meters = exchanged([method.exchange(s) for s in settings(method, big)], 0, random_gradients(workers, big, 0))
    assert dense_wire_bytes(200_000, workers) / meters[0].wire == pytest.approx(1 / (workers * 0.01))


def test_own_gradients_are_clipped_before_they_are_accumulated() -> None:
    method = Dgc(density=1.0, warmup=0.0, workers=4, masking=False)
    grads = random_gradients(4, SHAPES, 0)
    exchanges = [method.exchange(s) for s in settings(method, SHAPES, clip=0.2)]
    exchanged(exchanges, 0, grads)
    for worker, own in zip(exchanges, grads, strict=True):
        norm = torch.stack([g.norm() for g in own.values()]).norm()
        assert torch.allclose(memory_of(worker).velocity["w"], own["w"] * 0.1 / norm, atol=1e-6)


def test_warm_up_sends_more_and_is_told_apart() -> None:
    _, report = simulated(Dgc(density=0.05, warmup=0.5), Recipe(steps=20))
    assert report.steady_from == 10
    assert report.wire_bytes[:10] == sorted(report.wire_bytes[:10], reverse=True)
    assert report.wire_bytes[9] > report.wire_bytes[10] == report.wire_bytes[-1]
    assert report.steady(report.wire_bytes) == report.wire_bytes[-1]


def exchangers(method: GradientMethod) -> list[Exchanger]:
    """All workers of a method, for the gradients above."""
    return [method.exchange(setting) for setting in settings(method, SHAPES)]


def memory_of(worker: Exchanger) -> MomentumCorrection:
    """A worker's u and v."""
    assert worker.compression is not None
    assert isinstance(worker.compression.memory, MomentumCorrection)
    return worker.compression.memory
