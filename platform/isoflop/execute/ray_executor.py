"""Runs work items on Ray: one long-lived actor per slot, models warm, two calls in flight per actor.

Ray's own retries and restarts are off: what to do about a dead worker is the driver's decision, and a restarted actor
would have lost its warm models without saying so.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from isoflop.core.errors import Unavailable, UserError
from isoflop.execute.base import Done, Event, Executor, Lost, Resources, ShardReport, WorkerInfo, WorkItem
from isoflop.execute.ray_cluster import RayCluster, RayDied
from isoflop.execute.ray_node import IN_THIS_PROCESS, START_SECONDS
from isoflop.execute.ray_stages import Holder, StagePlaces
from isoflop.execute.ray_worker import RayWorker
from isoflop.stages import LARGE_STAGE

INFRASTRUCTURE = (RayActorError, OutOfMemoryError, WorkerCrashedError, ObjectLostError, RaySystemError, GetTimeoutError)
_NODE_CHECK_SECONDS = 5.0
_PROGRESS_SECONDS = 0.3
_GET_SECONDS = 300.0  # for a result that is there; without its node's object store nothing would end the wait
_STILLBORN = 12  # workers in a row that died while starting, with none alive: it is no accident any more


@dataclass
class _Worker:
    """The driver's side of one actor."""

    id: str
    actor: Any
    hello: Any
    info: WorkerInfo | None = None
    shares: bool = False
    items: list[tuple[WorkItem, Any]] = field(default_factory=list)
    progress: Any = None
    reason: str = ""


class RayExecutor(Executor):
    """Actors on a Ray cluster.

    Args:
        resources: of one job; the cluster is divided into as many slots of this size as fit.
        address: of a running cluster (``auto``, ``host:port``, ``ray://…``), or None for a private one on this host,
            bound to loopback.
        cache_dir: root of the stage cache on each host; None for each host's default.
        max_workers: upper bound on slots.
        imports: modules to import in each worker (a sweep's ``import:``).
        node_ip: address of the driver's own node, for hosts that have several.
        import_folder: further place to look for ``imports``.
        shared_stages: folder for stages larger than ``large_stage`` bytes that one node computed and another needs.
            Unless all workers see it, they go through Ray's object store like the others.
        start_timeout: seconds in which a private Ray, and then the first worker, must be up.
    """

    def __init__(
        self,
        resources: Resources,
        address: str | None = None,
        cache_dir: str | Path | None = None,
        max_workers: int | None = None,
        imports: tuple[str, ...] = (),
        node_ip: str | None = None,
        import_folder: str | None = None,
        shared_stages: Path | None = None,
        large_stage: int = LARGE_STAGE,
        start_timeout: float = START_SECONDS,
    ) -> None:
        self._resources = resources
        self._cluster = RayCluster(address, node_ip, start_timeout)
        self._cache_dir = str(cache_dir) if cache_dir else None
        self._max_workers = max_workers
        self._imports = imports
        self._import_folder = import_folder
        self._stages = StagePlaces(shared_stages if address is not None else None, large_stage)
        self._workers: dict[str, _Worker] = {}
        self._by_ref: dict[Any, tuple[_Worker, WorkItem]] = {}
        self._count = 0
        self._stillborn = 0  # workers in a row that died before they could speak
        self._homeless = False  # no node can hold a job, and that was told
        self._last_node_check = 0.0
        self._last_fill = 0.0
        self._last_progress = 0.0
        self._events: list[Event] = []

    # life cycle

    def start(self) -> None:
        self._cluster.connect()
        self.dashboard = self._cluster.dashboard
        self._check_possible()
        self._stages.offer()
        deadline = time.monotonic() + self._cluster.start_timeout
        while not self.workers():
            try:
                self._cluster.check()
                self._fill()  # again, for those that died before they could speak
                self._greet(timeout=1.0)
            except RayDied as death:
                self._start_again(death)
            if time.monotonic() > deadline and not self.workers():
                raise Unavailable(
                    f"no Ray worker came up within {self._cluster.start_timeout:g} s; on a busy machine give it longer with "
                    f"--ray-start-timeout SECONDS, or {IN_THIS_PROCESS}"
                )

    def tell(self, line: Callable[[str], None]) -> None:
        self._cluster.tell = line

    def close(self, now: bool = False) -> None:
        for worker in list(self._workers.values()):
            with contextlib.suppress(RayError):
                ray.kill(worker.actor, no_restart=True)
        self._workers.clear()
        self._by_ref.clear()
        self._stages.withdraw()
        self._cluster.close()

    def _start_again(self, death: RayDied) -> None:
        """The cluster has died: what its workers had comes back as lost through no fault of theirs."""
        for worker in list(self._workers.values()):
            if worker.info is None:
                self._forget(worker)
            else:
                self._lose(worker, f"Ray has died: {death}", blame=False, kill=False)
        self._cluster.restart(death)
        self._stillborn = 0
        self._last_node_check = self._last_fill = 0.0

    def _check_possible(self) -> None:
        want = self._resources
        nodes = [n["Resources"] for n in self._cluster.live_nodes()]
        if not any(_slots_on(n, want) >= 1 for n in nodes):
            have = "; ".join(
                f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs, {n.get('memory', 0) / 2**30:.1f} GiB"
                for n in nodes
            )
            raise UserError(
                f"resources: no node of the cluster can ever give one job {want.cpus:g} CPUs, {want.gpus:g} GPUs"
                + (f", {want.memory / 2**30:.1f} GiB" if want.memory else "")
                + f"; nodes have: {have}"
            )

    def _fill(self) -> None:
        """As many actors as the cluster has slots; called again as nodes join."""
        slots = sum(_slots_on(n["Resources"], self._resources) for n in self._cluster.live_nodes())
        wanted = min(slots, self._max_workers or slots)
        if self._stillborn > _STILLBORN * max(1, wanted) and not self.workers():
            raise RayDied(f"{self._stillborn} workers in a row died while starting")
        if not wanted and not self._homeless:
            self._cluster.tell("no node of the cluster can run a job now; waiting for one (Ctrl-C ends the sweep)")
        self._homeless = not wanted
        for _ in range(wanted - len(self._workers)):
            self._cluster.ask(self._spawn)

    def _spawn(self) -> None:
        want = self._resources
        worker_id = f"w{self._count}"
        self._count += 1
        env = {"OMP_NUM_THREADS": str(max(1, int(want.cpus))), "TOKENIZERS_PARALLELISM": "false"}
        if want.gpus == 0:
            env["CUDA_VISIBLE_DEVICES"] = ""  # an actor without GPUs would otherwise see all of them
        options: dict[str, Any] = {
            "num_cpus": want.cpus,
            "num_gpus": want.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": env},
            "scheduling_strategy": "SPREAD",
        }
        if want.memory:
            options["memory"] = want.memory
        actor = (
            ray.remote(concurrency_groups={"control": 1})(RayWorker)
            .options(**options)
            .remote(
                worker_id,
                self._cache_dir,
                self._imports,
                self._import_folder,
                want.memory,
                want.gpus,
                self._stages.offered,
            )
        )
        self._workers[worker_id] = _Worker(worker_id, actor, actor.hello.remote())

    def _greet(self, timeout: float = 0.0) -> None:
        """Collect the greetings of new actors; drop those that died before they could speak."""
        waiting = {w.hello: w for w in self._workers.values() if w.info is None}
        if not waiting:
            return
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
        if ready and len(waiting) > 1:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        for ref in ready:
            worker = waiting[ref]
            try:
                hello = ray.get(ref)
            except RayError as error:
                self._stillborn += 1
                self._forget(worker)
                if not self.workers() and "creation task" in str(error):  # its own code failed, as the next one's would
                    reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()[-1].strip()
                    raise UserError(f"a worker could not start: {reason}") from None
                self._cluster.tell(f"worker {worker.id} died while starting: {_last_line(error)}")
                continue
            self._stillborn = 0
            self._stages.add(hello["node"], hello.pop("stages"))
            worker.shares = hello.pop("shared")
            worker.info = WorkerInfo(id=worker.id, **hello)

    # work

    def workers(self) -> list[WorkerInfo]:
        return [w.info for w in self._workers.values() if w.info is not None]

    def cached_stages(self) -> set[str]:
        return self._stages.keys(self._holders())

    def _holders(self) -> list[Holder]:
        return [Holder(w.id, w.actor, w.info.node, w.shares) for w in self._workers.values() if w.info is not None]

    def submit(self, worker: str, item: WorkItem) -> None:
        target = self._workers[worker]
        assert target.info is not None
        fetch = self._stages.fetch_plan(target.info.node, item, self._holders())
        if item.kind == "stage":
            ref = target.actor.run_stage.remote(item.job.to_dict(), item.stage, fetch)
        else:
            ref = target.actor.run_job.remote(item.id, item.job.to_dict(), fetch, item.alone)
        target.items.append((item, ref))
        self._by_ref[ref] = (target, item)

    def poll(self, timeout: float) -> list[Event]:
        try:
            self._cluster.check()
            self._tend()
            self._collect_all(0 if self._events else timeout)
            self._report_progress()
        except RayDied as death:
            self._start_again(death)
        events, self._events = self._events, []
        return events

    def _collect_all(self, timeout: float) -> None:
        """What has ended; waits for the first."""
        refs = list(self._by_ref)
        if not refs:
            time.sleep(min(timeout, 0.05))
            return
        try:
            first, _ = ray.wait(refs, num_returns=1, timeout=timeout)
            ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0] if first else []
        except (RaySystemError, ConnectionError, OSError) as error:
            raise RayDied(_last_line(error)) from None
        for ref in ready:
            self._collect(ref)

    def _collect(self, ref: Any) -> None:
        if ref not in self._by_ref:  # its worker was lost a moment ago
            return
        worker, item = self._by_ref[ref]
        self._stages.arrived(item)
        try:
            result = ray.get(ref, timeout=_GET_SECONDS)
        except INFRASTRUCTURE as error:
            self._lose_to(worker, error)
            return
        except RayTaskError as error:
            # Runner turns a job's own exceptions into outcomes: this is a failure around the job. When Ray itself is
            # the cause, it is a stage whose sender was lost on the way.
            self._lose(worker, _last_line(error), blame=not isinstance(error.cause, RayError))
            return
        del self._by_ref[ref]
        worker.items = [(i, r) for i, r in worker.items if r != ref]
        assert worker.info is not None
        self._stages.add(worker.info.node, item.needs)
        if item.kind == "stage" and result.get("ok"):
            self._stages.add(worker.info.node, (item.stage,))
        self._cluster.progress()
        self._events.append(Done(worker.id, item, result))

    def kill(self, worker: str, reason: str, blame: bool = True) -> None:
        target = self._workers.get(worker)
        if target is None:
            return
        target.reason = reason
        with contextlib.suppress(RayError):
            ray.kill(target.actor, no_restart=True)
        self._lose(target, reason, blame)

    def _lose(self, worker: _Worker, reason: str, blame: bool = True, kill: bool = True, certain: bool = True) -> None:
        items = tuple(item for item, _ in worker.items)
        before = self.cached_stages()
        self._forget(worker)
        if kill:
            with contextlib.suppress(RayError):
                ray.kill(worker.actor, no_restart=True)
        gone = frozenset(before - self.cached_stages())
        self._events.append(Lost(worker.id, items, reason, blame, gone, certain))
        self._last_node_check = 0.0

    def _lose_to(self, worker: _Worker, error: RayError) -> None:
        """A call of the worker failed. A job may have killed it, unless its whole node is gone or does not answer."""
        assert worker.info is not None
        if worker.info.node not in self._node_ids():
            self._lose(worker, _gone(worker.info), blame=False)
        else:
            # Ray sends a result while the next call runs already: one of an item that has ended may die with the process.
            blame = not isinstance(error, ActorUnavailableError)
            self._lose(worker, worker.reason or _last_line(error), blame, certain=len(worker.items) == 1)

    def _forget(self, worker: _Worker) -> None:
        self._workers.pop(worker.id, None)
        for _, ref in worker.items:
            self._by_ref.pop(ref, None)
        self._stages.lost(worker.id)

    def _tend(self) -> None:
        """Greet new actors; look now and then for new nodes and replace lost actors."""
        now = time.monotonic()
        if now - self._last_node_check > _NODE_CHECK_SECONDS:
            self._last_node_check = now
            self._leave_dead_nodes()
            if now - self._last_fill > _NODE_CHECK_SECONDS * min(self._stillborn, 12):
                self._last_fill = now
                self._fill()
        self._greet()

    def _node_ids(self) -> set[str]:
        return {node["NodeID"] for node in self._cluster.live_nodes()}

    def _leave_dead_nodes(self) -> None:
        """Also idle workers die with their node, and no call of theirs would tell."""
        alive = self._node_ids()
        for worker in list(self._workers.values()):
            if worker.info is not None and worker.info.node not in alive:
                self._lose(worker, _gone(worker.info), blame=False)

    def _report_progress(self) -> None:
        if self._on_shard is None or time.monotonic() - self._last_progress < _PROGRESS_SECONDS:
            return
        self._last_progress = time.monotonic()
        for worker in list(self._workers.values()):
            if worker.progress is None:
                if any(item.kind == "job" for item, _ in worker.items):
                    worker.progress = worker.actor.progress.remote()
                continue
            ready, _ = ray.wait([worker.progress], timeout=0)
            if not ready:
                continue
            try:
                reports = ray.get(ready[0])
            except (RayError, GetTimeoutError):
                reports = []
            worker.progress = None
            by_id = {item.id: item for item, _ in worker.items}
            for item_id, shard, mean, examples in reports:
                item = by_id.get(item_id)
                if item is not None and self._on_shard(ShardReport(worker.id, item, shard, mean, examples)):
                    worker.actor.stop.remote(item_id)


def _gone(info: WorkerInfo) -> str:
    return f"its node {info.node[:8]} on {info.host} is gone"


def _slots_on(have: dict[str, float], want: Resources) -> int:
    """How many jobs of this size a node can hold."""
    limits = [have.get("CPU", 0) / want.cpus if want.cpus else float("inf")]
    if want.gpus:
        whole = have.get("GPU", 0)
        # A fraction must fit into one GPU; several GPUs must come whole.
        limits.append(int(whole) * int(1 / want.gpus + 1e-9) if want.gpus < 1 else whole / want.gpus)
    if want.memory:
        limits.append(have.get("memory", 0) / want.memory)
    slots = min(limits)
    return 0 if slots == float("inf") else int(slots + 1e-9)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        f"{type(error).__name__}: {lines[-1] if isinstance(error, RayTaskError) else lines[0]}"[:500]
        if lines
        else type(error).__name__
    )
