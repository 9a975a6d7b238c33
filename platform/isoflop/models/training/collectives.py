"""What workers of a data-parallel training send each other, and how many bytes that is on the wire.

A worker's side of an exchange is a generator: it yields requests (``Sum``, ``Gather``), is sent their results, and
returns. The same generator therefore runs in a process of its own, over ``torch.distributed``, or side by side with the
other workers' in one process, in lock step; the results are bit-identical, because sums are taken in the order of ranks in
both. The exact sum is a reduce-scatter followed by an all-gather, as in a ring: the bytes are the same.

Counted are bytes that a worker *sends*, for payloads of b bytes per worker and N workers: all-gather (N-1)·b, all-to-all
(N-1)/N·b, hence 2·(N-1)/N·b for a sum. Headers of the transport are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT_BYTES = 4
LENGTH_BYTES = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Sum:
    """The sum over workers of a vector of float32; the reply is the vector."""

    tensor: Tensor


@dataclass(frozen=True)
class Gather:
    """Every worker's bytes; the reply is a list in the order of ranks.

    Attributes:
        data: a vector of uint8.
        fixed: all workers' are equally long, by construction. Otherwise lengths are exchanged first (4 bytes each) and
            the bytes padded to the longest, since gloo gathers equal sizes only.
    """

    data: Tensor
    fixed: bool


Request = Sum | Gather
Exchanging = Generator[Request, Any, T]
"""A worker's side of an exchange that returns a T."""


class ByteMeter:
    """Bytes that one of ``workers`` workers has sent.

    Attributes:
        wire: on the wire, padding and lengths included.
        payload: of the messages themselves, before they are multiplied by the collective: what papers quote.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.wire = 0.0
        self.payload = 0.0

    def sum(self, numel: int) -> None:
        """A sum of ``numel`` float32, padded to a multiple of the workers."""
        size = FLOAT_BYTES * (numel + padding(numel, self.workers))
        self.payload += FLOAT_BYTES * numel
        self.wire += 2 * (self.workers - 1) / self.workers * size

    def gather(self, length: int, longest: int, fixed: bool) -> None:
        """A gathering of ``length`` bytes, where the longest message has ``longest``."""
        self.payload += length
        self.wire += (self.workers - 1) * (longest + (0 if fixed else LENGTH_BYTES))


def dense_wire_bytes(numel: int, workers: int) -> float:
    """Bytes that a worker sends in a ring all-reduce of ``numel`` float32: 2·(N-1)/N·4·n."""
    return 2 * (workers - 1) / workers * FLOAT_BYTES * numel


def padding(numel: int, workers: int) -> int:
    """Elements to add for a multiple of ``workers``."""
    return -numel % workers


class Worker(Generic[T]):
    """One worker's generator under way, with its meter and the seconds that it computes.

    Attributes:
        request: what it waits for; None once it has returned.
        result: what it returned.
        seconds: of computation, waiting for others left out.
    """

    def __init__(self, exchanging: Exchanging[T], meter: ByteMeter) -> None:
        self._exchanging = exchanging
        self.meter = meter
        self.request: Request | None = None
        self.result: T | None = None
        self.seconds = 0.0
        self.resume(None)

    def resume(self, reply: Any) -> None:
        """Hand over the reply to the request."""
        started = time.perf_counter()
        try:
            self.request = self._exchanging.send(reply)
        except StopIteration as end:
            self.request, self.result = None, end.value
        self.seconds += time.perf_counter() - started

    @property
    def value(self) -> T:
        """What the generator returned."""
        assert self.request is None
        return self.result  # type: ignore[return-value]


def run_together(workers: Sequence[Worker[T]]) -> list[T]:
    """Run all workers in this process, in lock step; what they return, in the order of ranks.

    Raises:
        RuntimeError: they do not ask for the same thing at the same time, which would block or break a real exchange.
    """
    while (first := workers[0].request) is not None:
        requests = [worker.request for worker in workers]
        if any(type(request) is not type(first) for request in requests):
            raise RuntimeError(f"workers ask for different things: {', '.join(type(r).__name__ for r in requests)}")
        reply: Any
        if isinstance(first, Sum):
            parts = [request.tensor for request in requests if isinstance(request, Sum)]
            if len({part.shape for part in parts}) > 1:
                raise RuntimeError(f"workers add vectors of different lengths: {[len(part) for part in parts]}")
            for worker in workers:
                worker.meter.sum(parts[0].numel())
            reply = sum_in_order(parts)
        else:
            messages = [request.data for request in requests if isinstance(request, Gather)]
            lengths = [len(message) for message in messages]
            if first.fixed and len(set(lengths)) > 1:
                raise RuntimeError(f"messages of a fixed length have different ones: {lengths}")
            for worker, length in zip(workers, lengths, strict=True):
                worker.meter.gather(length, max(lengths), first.fixed)
            reply = messages
        for worker in workers:
            worker.resume(reply)
    return [worker.value for worker in workers]


def run_over_gloo(worker: Worker[T]) -> T:
    """Run this process's worker; the others run in the other processes of the default group."""
    import torch.distributed as dist

    size = dist.get_world_size()
    while (request := worker.request) is not None:
        if isinstance(request, Sum):
            worker.meter.sum(request.tensor.numel())
            worker.resume(_sum_over_gloo(request.tensor, size))
        else:
            longest = len(request.data)
            lengths = [longest] * size
            if not request.fixed:
                own = torch.tensor([len(request.data)], dtype=torch.int32)
                everybody = torch.empty(size, dtype=torch.int32)
                dist.all_gather_into_tensor(everybody, own)
                lengths = everybody.tolist()
                longest = max(lengths)
            worker.meter.gather(len(request.data), longest, request.fixed)
            padded = F.pad(request.data, (0, longest - len(request.data)))
            gathered = torch.empty(size * longest, dtype=torch.uint8)
            dist.all_gather_into_tensor(gathered, padded)
            rows = gathered.view(size, longest)
            worker.resume([row[:length] for row, length in zip(rows, lengths, strict=True)])
    return worker.value


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """((p0 + p1) + p2) + …: the one order in which every back-end adds."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _sum_over_gloo(tensor: Tensor, size: int) -> Tensor:
    """Each worker adds up one chunk of everybody's vector, in the order of ranks; then the chunks are gathered."""
    import torch.distributed as dist

    padded = F.pad(tensor, (0, padding(tensor.numel(), size)))
    chunks = torch.empty_like(padded)
    dist.all_to_all_single(chunks, padded)
    own = sum_in_order(list(chunks.view(size, -1)))
    total = torch.empty_like(padded)
    dist.all_gather_into_tensor(total, own)
    return total[: tensor.numel()]
