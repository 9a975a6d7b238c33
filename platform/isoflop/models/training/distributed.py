"""Data-parallel training with an exchange of gradients of one's own: over ``DistributedDataParallel``, or simulated.

Every worker computes the gradient of its share of a batch; the exchange turns all workers' gradients into one direction,
the same on all of them, and momentum SGD steps along it. In the simulation one process holds the weights once and every
worker's gradients and memory; over gloo each worker is a process with weights of its own. Both give the same bits.

A communication hook is asked once per bucket of gradients, and DDP regroups its buckets after the first step. The hook here
keeps the buckets of a step until the last one has come, and exchanges all gradients at once: a method then sees whole
gradients by parameter name (their norm among them), and all workers send in one order, which collectives that are started
from callbacks of several buckets would not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from isoflop.models.hooks.gradients import ExchangeReport
from isoflop.models.training.collectives import (
    ByteMeter,
    Exchanging,
    Worker,
    run_over_gloo,
    run_together,
)
from isoflop.models.training.loop import Schedule, follow
from isoflop.models.training.sockets import loopback, socket_bytes_sent
from isoflop.models.training.taught import Taught

CHECK_EVERY = 10
"""Steps between comparisons of the replicas."""
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
BatchT = TypeVar("BatchT")


class GradientExchange(Protocol):
    """One worker's side of a gradient exchange, with the worker's memory."""

    @property
    def corrected(self) -> frozenset[str]:
        """Parameters whose direction holds the momentum already."""

    @property
    def steady_from(self) -> int:
        """First step at which a step's bytes are those of all later ones."""

    def step(self, number: int, grads: Mapping[str, Tensor]) -> Exchanging[dict[str, Tensor]]:
        """The directions of all parameters from this worker's gradients; requests go in the order of ``grads``."""


@dataclass(frozen=True)
class Setting:
    """What an exchange is made for.

    Attributes:
        workers, rank: N, and which of them this is.
        seed: of the training.
        steps: of the whole training.
        clip: the gradient norm that a training with one worker is clipped to.
        shapes: of all parameters, by name.
    """

    workers: int
    rank: int
    seed: int
    steps: int
    clip: float
    shapes: Mapping[str, torch.Size]


class ExchangingMethod(Taught, Protocol):
    """What the training asks of a method."""

    @property
    def processes(self) -> int:
        """Local processes that a training runs."""

    @property
    def backend(self) -> str:
        """``ddp``, or ``simulated``."""

    def knobs(self) -> dict[str, Any]:
        """All knob values, from which a worker's process makes the method again."""

    @property
    def workers(self) -> int:
        """N."""

    @property
    def lr(self) -> float:
        """Peak learning rate."""

    @property
    def momentum(self) -> float:
        """Of the optimiser, or of the exchange in its place."""

    @property
    def nesterov(self) -> bool:
        """Nesterov's momentum."""

    def exchange(self, setting: Setting) -> GradientExchange:
        """A worker's exchange, with an empty memory."""


def simulate(
    loss: nn.Module,
    method: ExchangingMethod,
    recipe: Schedule,
    lessons: Iterable[BatchT],
    share: Callable[[BatchT, int, int], BatchT],
    seed: int,
) -> ExchangeReport:
    """Train ``loss`` with all workers in this process; returns what was recorded.

    Args:
        loss: maps a batch to the mean loss over it; its parameters are trained.
        lessons: one batch per step, for all workers together.
        share: the part of a batch for a rank of so many; equally large for all.

    Raises:
        ReplicasDiffer: the workers' directions differ.
    """
    ranks = [method.exchange(_setting(loss, method, recipe, seed, rank)) for rank in range(method.workers)]
    replica = _Replica(loss, method, ranks[0])
    report = ExchangeReport(method.workers, "simulated", replica.elements, ranks[0].steady_from)

    def differentiate(batch: BatchT) -> Tensor:
        started, number = time.perf_counter(), len(report.loss)
        losses, grads = [], []
        for rank in range(method.workers):
            losses.append(replica.backward(loss(share(batch, rank, method.workers))))
            grads.append(replica.gradients())
        meters = [ByteMeter(method.workers) for _ in ranks]
        workers = [Worker(e.step(number, g), m) for e, g, m in zip(ranks, grads, meters, strict=True)]
        directions = run_together(workers)
        if number % CHECK_EVERY == 0 and len({fingerprint(d) for d in directions}) > 1:
            raise ReplicasDiffer(f"step {number}: the workers' directions differ")
        replica.set_gradients(directions[0])
        report.loss.append(sum(losses) / len(losses))
        report.wire_bytes.append(sum(m.wire for m in meters) / len(meters))
        report.payload_bytes.append(sum(m.payload for m in meters) / len(meters))
        report.exchange_ms.append(1e3 * sum(w.seconds for w in workers) / len(workers))
        report.ms.append(1e3 * (time.perf_counter() - started))
        return torch.tensor(report.loss[-1])

    follow(replica.optimizer, recipe, lessons, differentiate)
    return report


def connect(folder: Path, rank: int, workers: int) -> Any:
    """Join the group of ``workers`` processes that share ``folder``; returns what ``leave`` wants.

    They find each other through a file there, so that no port can be taken, and talk over the loopback interface.
    """
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = loopback()
    store = dist.FileStore(str(folder / "store"), workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=_COLLECTIVE_TIMEOUT)
    return store


def leave(store: Any, rank: int, workers: int) -> None:
    """Wait until all have come here: who ends while another still receives would cut it off."""
    store.set(f"left-{rank}", "1")
    store.wait([f"left-{other}" for other in range(workers)])


def train_rank(
    loss: nn.Module,
    method: ExchangingMethod,
    recipe: Schedule,
    lessons: Iterable[BatchT],
    share: Callable[[BatchT, int, int], BatchT],
    seed: int,
    rank: int,
    folder: Path,
) -> None:
    """Train as one of the ``method.workers`` processes that are connected; leaves ``record-<rank>.json`` in ``folder``.

    Arguments as of :func:`simulate`.
    """
    from torch.nn.parallel import DistributedDataParallel

    exchange = method.exchange(_setting(loss, method, recipe, seed, rank))
    replica = _Replica(loss, method, exchange)
    report = ExchangeReport(method.workers, "ddp", replica.elements, exchange.steady_from)
    prints: dict[int, str] = {0: fingerprint(replica.parameters)}
    # The seed gives all replicas the same weights (the prints at step 0 tell), and buffers hold constants.
    parallel = DistributedDataParallel(loss, broadcast_buffers=False, init_sync=False)
    hook = _Hook(exchange, replica.names, method.workers)
    parallel.register_comm_hook(hook, exchange_bucket)
    before = socket_bytes_sent()

    def differentiate(batch: BatchT) -> Tensor:
        started, number = time.perf_counter(), len(report.loss)
        if number and number % CHECK_EVERY == 0:
            prints[number] = fingerprint(replica.parameters)
        hook.number = number
        report.loss.append(replica.backward(parallel(share(batch, rank, method.workers))))
        report.wire_bytes.append(hook.meter.wire)
        report.payload_bytes.append(hook.meter.payload)
        report.exchange_ms.append(1e3 * hook.seconds)
        report.ms.append(1e3 * (time.perf_counter() - started))
        return torch.tensor(report.loss[-1])

    follow(replica.optimizer, recipe, lessons, differentiate)
    prints[len(report.loss)] = fingerprint(replica.parameters)
    after = socket_bytes_sent()
    report.socket_bytes = None if before is None or after is None else float(after - before)
    (folder / f"record-{rank}.json").write_text(json.dumps({"report": asdict(report), "prints": prints}))


def gather_records(folder: Path, workers: int) -> ExchangeReport:
    """One report of the records that ``train_rank`` left.

    Raises:
        ReplicasDiffer: the workers' weights were not bit-identical at one of the checks.
    """
    records = [json.loads((folder / f"record-{rank}.json").read_text()) for rank in range(workers)]
    for number in records[0]["prints"]:
        if len({record["prints"].get(number) for record in records}) > 1:
            raise ReplicasDiffer(f"before step {number}: the workers' weights differ")
    reports = [ExchangeReport(**record["report"]) for record in records]
    merged = reports[0]
    for name in ExchangeReport.SERIES:
        columns = zip(*(getattr(report, name) for report in reports), strict=True)
        setattr(merged, name, [sum(values) / workers for values in columns])
    sockets = [report.socket_bytes for report in reports if report.socket_bytes is not None]
    merged.socket_bytes = sum(sockets) / workers if len(sockets) == workers else None
    return merged


class ReplicasDiffer(RuntimeError):
    """Workers that must hold the same weights do not."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the bits of named tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def exchange_bucket(hook: _Hook, bucket: Any) -> torch.futures.Future[Tensor]:
    """The communication hook; its second argument's name is part of DDP's interface."""
    return hook.take(bucket)


exchange_bucket.__annotations__.clear()  # DDP compares them with classes, and postponed ones are text


class _Hook:
    """Collects the buckets of a step, exchanges at the last one, fills all of them.

    Attributes:
        number: of the step under way; set it before the backward pass.
        meter, seconds: of the last exchange.
    """

    def __init__(self, exchange: GradientExchange, names: Mapping[int, str], workers: int) -> None:
        self._exchange = exchange
        self._names = names
        self._workers = workers
        self._views: dict[str, Tensor] = {}
        self._waiting: list[tuple[Tensor, torch.futures.Future[Tensor]]] = []
        self.number = 0
        self.meter = ByteMeter(workers)
        self.seconds = 0.0

    def take(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """A future for the bucket's directions, completed with the step's last bucket."""
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._waiting.append((bucket.buffer(), future))
        for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self._views[self._names[id(parameter)]] = view
        if bucket.is_last():
            self._run()
        return future

    def _run(self) -> None:
        """Exchange what has come, in the order of the model's parameters, and write the directions in its place."""
        views, self._views = self._views, {}
        grads = {name: views[name].clone() for name in self._names.values() if name in views}
        self.meter = ByteMeter(self._workers)
        worker = Worker(self._exchange.step(self.number, grads), self.meter)
        for name, direction in run_over_gloo(worker).items():
            views[name].copy_(direction)
        self.seconds = worker.seconds
        for buffer, future in self._waiting:
            future.set_result(buffer)
        self._waiting = []


class _Replica:
    """Parameters by name, and momentum SGD that leaves alone what the exchange has given its momentum."""

    def __init__(self, loss: nn.Module, method: ExchangingMethod, exchange: GradientExchange) -> None:
        self.parameters = dict(loss.named_parameters())
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.elements = sum(parameter.numel() for parameter in self.parameters.values())
        corrected = [p for name, p in self.parameters.items() if name in exchange.corrected]
        others = [p for name, p in self.parameters.items() if name not in exchange.corrected]
        nesterov = method.nesterov and method.momentum > 0  # which torch refuses without momentum
        groups: list[dict[str, Any]] = [
            {"params": others, "momentum": method.momentum, "nesterov": nesterov},
            {"params": corrected, "momentum": 0.0},
        ]
        self.optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=method.lr)

    def backward(self, loss: Tensor) -> float:
        """New gradients; returns the loss as a number."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return float(loss.detach())

    def gradients(self) -> dict[str, Tensor]:
        """The gradients by name, which the next backward pass leaves alone."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def set_gradients(self, directions: Mapping[str, Tensor]) -> None:
        """Put the directions in the gradients' place."""
        for name, parameter in self.parameters.items():
            parameter.grad = directions[name]


def _setting(loss: nn.Module, method: ExchangingMethod, recipe: Schedule, seed: int, rank: int) -> Setting:
    shapes = {name: parameter.shape for name, parameter in loss.named_parameters()}
    return Setting(method.workers, rank, seed, recipe.steps, recipe.clip, shapes)
