"""A cluster in simulated time: the driver's own scheduling on any number of GPUs, in seconds.

Jobs, loads and stages take times drawn from distributions; jobs fail and nodes are lost at given rates. The driver does
not know the difference: it is given :attr:`SimulatedExecutor.clock` instead of the real one.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from isoflop.execute.base import Done, Event, Executor, Lost, WorkerInfo, WorkItem
from isoflop.jobs import Job, Outcome, ResolvedJob
from isoflop.jobs.warm import MOST_WARM


@dataclass(frozen=True)
class Rates:
    """Times are seconds; durations are lognormal with the given median and ``spread`` (σ of the logarithm).

    Attributes:
        load: to load a model that the worker does not hold warm.
        failure: share of jobs that fail.
        node_hours: mean time between losses of one node; a lost node returns after ``repair``. 0: nodes do not fail.
    """

    job: float = 60.0
    load: float = 20.0
    stage: float = 300.0
    spread: float = 0.5
    failure: float = 0.0
    node_hours: float = 0.0
    repair: float = 600.0


@dataclass
class _Slot:
    info: WorkerInfo
    queue: deque[WorkItem] = field(default_factory=deque)
    warm: OrderedDict[str, None] = field(default_factory=OrderedDict)
    started: float = 0.0
    until: float = 0.0
    token: int = 0  # of the running item; an event of a killed one carries an old token


class SimulatedExecutor(Executor):
    """``nodes`` × ``slots`` workers in simulated time.

    Args:
        score: the error that a job would measure.
        seed: of all draws.
    """

    def __init__(self, nodes: int, slots: int, rates: Rates, score: Callable[[Job], float], seed: int = 0) -> None:
        self._rates = rates
        self._score = score
        self._rng = np.random.default_rng(seed)
        self._now = 0.0
        self._tokens = itertools.count(1)
        self._heap: list[tuple[float, int, str, str]] = []
        self._slots: dict[str, _Slot] = {}
        self._running = 0  # slots with work
        self._down: dict[str, list[WorkerInfo]] = {}
        self._nodes = nodes
        self._per_node = slots
        self._events: list[Event] = []
        self.busy = 0.0
        self.loads = 0
        self.losses = 0

    @property
    def clock(self) -> Callable[[], float]:
        """Simulated seconds since the start."""
        return lambda: self._now

    def start(self) -> None:
        if self._slots:
            return
        for node in range(self._nodes):
            for slot in range(self._per_node):
                self._add(WorkerInfo(f"n{node}g{slot}", f"n{node}", f"host{node}", "simulated", str(slot)))
            self._plan_loss(f"n{node}")

    def workers(self) -> list[WorkerInfo]:
        return [slot.info for slot in self._slots.values()]

    def submit(self, worker: str, item: WorkItem) -> None:
        slot = self._slots[worker]
        slot.queue.append(item)
        if len(slot.queue) == 1:
            self._running += 1
            self._begin(slot)

    def poll(self, timeout: float) -> list[Event]:
        events, self._events = self._events, []
        if events:
            return events
        # Everything that ends within a poll of the first end is seen together, as on a real cluster. While nothing runs,
        # only the poll itself passes: the driver is writing or asking, and must not find itself at the next node's loss.
        jump = bool(self._heap) and (self._running > 0 or not self._slots)
        horizon = (self._heap[0][0] if jump else self._now) + timeout
        while self._heap and self._heap[0][0] <= horizon:
            self._now, token, kind, name = heapq.heappop(self._heap)
            if kind == "end":
                self._end(name, token)
            elif kind == "loss":
                self._lose_node(name)
            else:
                for info in self._down.pop(name, []):
                    self._add(info)
                self._plan_loss(name)
        self._now = horizon if not jump else self._now
        events, self._events = self._events, []
        return events

    def kill(self, worker: str, reason: str, blame: bool = True) -> None:
        slot = self._slots.pop(worker)
        self._count_busy(slot)
        self._running -= bool(slot.queue)
        self._events.append(Lost(worker, tuple(slot.queue), reason, blame))
        self._add(slot.info)

    def close(self, now: bool = False) -> None:
        self._heap.clear()

    def _add(self, info: WorkerInfo) -> None:
        self._slots[info.id] = _Slot(info)

    def _draw(self, median: float) -> float:
        return float(median * np.exp(self._rng.normal(0.0, self._rates.spread)))

    def _begin(self, slot: _Slot) -> None:
        item = slot.queue[0]
        seconds = self._draw(self._rates.stage if item.kind == "stage" else self._rates.job)
        if item.kind == "job":
            model = ResolvedJob.of(item.job).model_key
            if model not in slot.warm:
                seconds += self._draw(self._rates.load)
                self.loads += 1
            slot.warm[model] = None
            slot.warm.move_to_end(model)
            while len(slot.warm) > MOST_WARM:
                slot.warm.popitem(last=False)
        slot.started, slot.until, slot.token = self._now, self._now + seconds, next(self._tokens)
        heapq.heappush(self._heap, (slot.until, slot.token, "end", slot.info.id))

    def _end(self, worker: str, token: int) -> None:
        slot = self._slots.get(worker)
        if slot is None or slot.token != token or not slot.queue:
            return
        self._count_busy(slot)
        item = slot.queue.popleft()
        if item.kind == "stage":
            result: object = {"ok": True, "seconds": slot.until - slot.started, "bytes": 0}
        elif self._rng.random() < self._rates.failure:
            result = Outcome(
                "failed", error_type="SimulatedFailure", error_text="drawn by the simulation", worker=worker
            )
        else:
            info = ResolvedJob.of(item.job).info
            result = Outcome(
                "ok",
                errors=[self._score(item.job)],
                shard_sizes=[1],
                axes={"N": info.n_params},
                worker=worker,
                seconds=slot.until - slot.started,
            )
        self._events.append(Done(worker, item, result))
        if slot.queue:
            self._begin(slot)
        else:
            self._running -= 1

    def _count_busy(self, slot: _Slot) -> None:
        if slot.queue:
            self.busy += min(self._now, slot.until) - slot.started

    def _plan_loss(self, node: str) -> None:
        if self._rates.node_hours > 0:
            when = self._now + float(self._rng.exponential(self._rates.node_hours * 3600))
            heapq.heappush(self._heap, (when, next(self._tokens), "loss", node))

    def _lose_node(self, node: str) -> None:
        self.losses += 1
        gone = [slot for slot in self._slots.values() if slot.info.node == node]
        for slot in gone:
            self._count_busy(slot)
            self._running -= bool(slot.queue)
            del self._slots[slot.info.id]
            # a lost node is nobody's fault, but the driver cannot know; as with Ray, the running job is suspected
            self._events.append(Lost(slot.info.id, tuple(slot.queue), f"node {node} was lost"))
        self._down[node] = [slot.info for slot in gone]
        heapq.heappush(self._heap, (self._now + self._rates.repair, next(self._tokens), "return", node))
