"""Places on hosts for stages that run several processes: which workers stand aside while one is computed.

A worker is a slot of its host. A stage with k processes takes k slots of one host: the worker that computes it, and k - 1
others that are given nothing meanwhile. Pure bookkeeping; the driver asks it before it hands anything out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from isoflop.execute import WorkerInfo, WorkItem


@dataclass
class _Claim:
    """An item that needs several slots, from when it leaves the queue until it has ended.

    Attributes:
        worker: computes it.
        beside: workers that stand aside for it.
        started: it was handed out.
    """

    item: WorkItem
    worker: str
    node: str
    beside: set[str] = field(default_factory=set)
    started: bool = False


def room(workers: Sequence[WorkerInfo]) -> dict[str, float]:
    """How many slots a stage may ask for, by host: as many as it has workers, on the largest hosts any number.

    So a stage waits for a host that can hold it where there is one, and otherwise shares the slots of a largest one.
    """
    sizes = Counter(worker.node for worker in workers)
    most = max(sizes.values(), default=0)
    return {node: math.inf if size == most else size for node, size in sizes.items()}


class Places:
    """At most one claim per host is incomplete; idle workers of that host join it before they are given anything else.

    So every claim is filled as soon as enough running items have ended, whatever else is queued, and two claims never wait
    for each other's workers.
    """

    def __init__(self) -> None:
        self._claims: dict[str, _Claim] = {}  # by the worker that computes

    def claim(self, worker: WorkerInfo, item: WorkItem) -> None:
        """``worker`` will compute ``item`` once enough others of its host stand aside."""
        self._claims[worker.id] = _Claim(item, worker.id, worker.node)

    def withdraw(self, workers: Sequence[WorkerInfo], sound: Callable[[WorkItem], bool]) -> list[WorkItem]:
        """Give up the claims that have not started and should not any more; returns their items.

        Args:
            workers: all that live; a claim is given up when its host has come to be too small for it.
            sound: whether an item can be computed now and something still waits for it.
        """
        rooms = room(workers)
        unsound = [
            claim
            for claim in self._claims.values()
            if not claim.started and not (claim.item.slots <= rooms.get(claim.node, 0) and sound(claim.item))
        ]
        for claim in unsound:
            del self._claims[claim.worker]
        return [claim.item for claim in unsound]

    def settle(self, workers: Sequence[WorkerInfo], idle: Callable[[str], bool]) -> list[tuple[str, WorkItem]]:
        """Let idle workers stand aside where they are wanted; items that can be handed out now, with their workers.

        Args:
            workers: all that live.
            idle: whether a worker has nothing to do.
        """
        ready = []
        for claim in self._claims.values():
            host = [w.id for w in workers if w.node == claim.node]
            claim.beside &= set(host)
            wanted = min(claim.item.slots, len(host)) - 1  # a host may have fewer slots than it has processes
            for other in host:
                if len(claim.beside) < wanted and idle(other) and not self.taken(other):
                    claim.beside.add(other)
            if not claim.started and len(claim.beside) >= wanted:
                claim.started = True
                ready.append((claim.worker, claim.item))
        return ready

    def taken(self, worker: str) -> bool:
        """Whether a worker computes a claim or stands aside for one."""
        return worker in self._claims or any(worker in claim.beside for claim in self._claims.values())

    def wanted(self, node: str) -> bool:
        """Whether a claim on this host waits for workers: they are then given nothing to queue behind what they run."""
        return any(claim.node == node and not claim.started for claim in self._claims.values())

    def beside(self, worker: str) -> str | None:
        """The worker for whose item this one stands aside."""
        return next((claim.worker for claim in self._claims.values() if worker in claim.beside), None)

    def ended(self, worker: str, item: str) -> None:
        """An item of a worker has ended."""
        claim = self._claims.get(worker)
        if claim is not None and claim.item.id == item:
            del self._claims[worker]

    def lost(self, worker: str) -> WorkItem | None:
        """A worker is gone; returns the item that it was to compute but had not been handed."""
        for claim in self._claims.values():
            claim.beside.discard(worker)
        claim_of_it = self._claims.pop(worker, None)
        return claim_of_it.item if claim_of_it is not None and not claim_of_it.started else None
