"""Runs work items on Ray: one long-lived actor per slot, models warm, two calls in flight per actor.

Ray's own retries and restarts are off: what to do about a dead worker is the driver's decision, and a restarted actor
would have lost its warm models without saying so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
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

from isoflop.core.errors import UserError
from isoflop.execute.base import Done, Event, Executor, Lost, Resources, ShardReport, WorkerInfo, WorkItem
from isoflop.execute.ray_worker import RayWorker
from isoflop.stages import LARGE_STAGE, SharedStages

log = logging.getLogger(__name__)
INFRASTRUCTURE = (RayActorError, OutOfMemoryError, WorkerCrashedError, ObjectLostError, RaySystemError)
_KNOCK_SECONDS = 10.0
_START_SECONDS = 120.0
_START_ATTEMPTS = 3
_REGISTER_SECONDS = 600  # Ray's own 60 are too few for a busy machine: what starts slowly is killed, to start again
_NODE_CHECK_SECONDS = 5.0
_PROGRESS_SECONDS = 0.3


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
    born: float = field(default_factory=time.monotonic)
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
    ) -> None:
        self._resources = resources
        self._address = address
        self._cache_dir = str(cache_dir) if cache_dir else None
        self._max_workers = max_workers
        self._imports = imports
        self._node_ip = node_ip
        self._import_folder = import_folder
        self._shared = SharedStages(shared_stages) if shared_stages and address is not None else None
        self._large_stage = large_stage
        self._mark = ""
        self._workers: dict[str, _Worker] = {}
        self._by_ref: dict[Any, tuple[_Worker, WorkItem]] = {}
        self._disks: dict[str, set[str]] = {}  # node -> keys of the stages on its disk
        self._copies: dict[str, tuple[_Worker, Any]] = {}  # stage on its way to other nodes -> (sender, files)
        self._count = 0
        self._started_ray = False
        self._stillborn = 0  # workers in a row that died before they could speak
        self._last_node_check = 0.0
        self._last_progress = 0.0
        self._events: list[Event] = []

    # life cycle

    def start(self) -> None:
        self._connect()
        self._check_possible()
        self._offer_shared_folder()
        self._fill()
        deadline = time.monotonic() + _START_SECONDS
        while not self.workers():
            self._fill()  # again, for those that died before they could speak
            self._greet(timeout=1.0)
            if time.monotonic() > deadline:
                raise UserError(
                    f"no Ray worker came up within {_START_SECONDS:.0f} s; cluster resources: {ray.cluster_resources()}"
                )

    def close(self, now: bool = False) -> None:
        for worker in list(self._workers.values()):
            with contextlib.suppress(RayError):
                ray.kill(worker.actor, no_restart=True)
        self._workers.clear()
        self._by_ref.clear()
        if self._shared is not None:
            self._shared.remove_mark(self._mark)
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        common: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": logging.ERROR}
        try:
            if self._address is None:
                start_private_ray(**common)
            else:
                _knock(self._address)
                if self._node_ip:
                    common["_node_ip_address"] = self._node_ip
                context = ray.init(address=self._address, **common)
                self.dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            hint = ""
            if "auth" in str(error).lower():
                hint = " (the cluster wants a token: set RAY_AUTH_MODE=token and have its token file in your home)"
            raise UserError(
                f"Ray at {self._address or 'local'} cannot be reached: {' '.join(str(error).split())[:300]}{hint}"
            ) from None
        self._started_ray = True

    def _offer_shared_folder(self) -> None:
        if self._shared is None:
            return
        try:
            self._mark = self._shared.leave_mark()
        except OSError as error:
            log.warning("large stages go through the object store: %s: %s", self._shared.root, error.strerror)
            self._shared = None

    def _check_possible(self) -> None:
        want = self._resources
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
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
        nodes = [n for n in ray.nodes() if n["Alive"]]
        slots = sum(_slots_on(n["Resources"], self._resources) for n in nodes)
        wanted = min(slots, self._max_workers or slots)
        for _ in range(wanted - len(self._workers)):
            self._spawn()

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
        shared = (str(self._shared.root), self._mark, self._large_stage) if self._shared is not None else None
        actor = (
            ray.remote(concurrency_groups={"control": 1})(RayWorker)
            .options(**options)
            .remote(worker_id, self._cache_dir, self._imports, self._import_folder, want.memory, shared)
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
                log.warning("worker %s died while starting: %s", worker.id, _last_line(error))
                continue
            self._stillborn = 0
            self._disks.setdefault(hello["node"], set()).update(hello.pop("stages"))
            worker.shares = hello.pop("shared")
            worker.info = WorkerInfo(id=worker.id, **hello)

    # work

    def workers(self) -> list[WorkerInfo]:
        return [w.info for w in self._workers.values() if w.info is not None]

    def cached_stages(self) -> set[str]:
        shared = self._shared_folder()
        return set().union(shared.keys() if shared else (), *(self._disks[w.node] for w in self.workers()))

    def _shared_folder(self) -> SharedStages | None:
        """The folder for large stages, when all workers see it."""
        return self._shared if all(w.shares for w in self._workers.values() if w.info is not None) else None

    def submit(self, worker: str, item: WorkItem) -> None:
        target = self._workers[worker]
        fetch = self._fetch_plan(target, item)
        if item.kind == "stage":
            ref = target.actor.run_stage.remote(item.job.to_dict(), item.stage, fetch)
        else:
            ref = target.actor.run_job.remote(item.id, item.job.to_dict(), fetch)
        target.items.append((item, ref))
        self._by_ref[ref] = (target, item)

    def _fetch_plan(self, target: _Worker, item: WorkItem) -> dict[str, list[Any]]:
        """For stages that only another node holds: references to their files, owned by the driver, or a shared folder.

        References travel inside lists so that Ray does not resolve them before the call; a worker that has the files
        by then (a shared disk) never fetches them.
        """
        assert target.info is not None
        plan: dict[str, list[Any]] = {}
        for key in item.needs:
            if key in self._disks[target.info.node]:
                continue
            if key not in self._copies:
                home = next((w for w in self._workers.values() if w.info and key in self._disks[w.info.node]), None)
                shared = self._shared_folder()
                if home is None:
                    if shared is not None and key in shared:
                        plan[key] = [str(shared.folder(key))]
                    continue
                self._copies[key] = home, home.actor.stage_files.remote(item.job.to_dict(), key, shared is not None)
            plan[key] = [self._copies[key][1]]
        return plan

    def poll(self, timeout: float) -> list[Event]:
        self._tend()
        if not self._by_ref:
            if not self._events and timeout:
                time.sleep(min(timeout, 0.05))
        else:
            refs = list(self._by_ref)
            first, _ = ray.wait(refs, num_returns=1, timeout=0 if self._events else timeout)
            if first:
                ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
                for ref in ready:
                    self._collect(ref)
        self._report_progress()
        events, self._events = self._events, []
        return events

    def _collect(self, ref: Any) -> None:
        if ref not in self._by_ref:  # its worker was lost a moment ago
            return
        worker, item = self._by_ref[ref]
        for key in item.needs:
            self._copies.pop(key, None)  # it arrived or never will; whoever else is waiting for it holds it
        try:
            result = ray.get(ref)
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
        disk = self._disks[worker.info.node]
        disk.update(item.needs)
        if item.kind == "stage" and result.get("ok"):
            disk.add(item.stage)
        self._events.append(Done(worker.id, item, result))

    def kill(self, worker: str, reason: str, blame: bool = True) -> None:
        target = self._workers.get(worker)
        if target is None:
            return
        target.reason = reason
        with contextlib.suppress(RayError):
            ray.kill(target.actor, no_restart=True)
        self._lose(target, reason, blame)

    def _lose(self, worker: _Worker, reason: str, blame: bool = True) -> None:
        items = tuple(item for item, _ in worker.items)
        before = self.cached_stages()
        self._forget(worker)
        with contextlib.suppress(RayError):
            ray.kill(worker.actor, no_restart=True)
        gone = frozenset(before - self.cached_stages())
        self._events.append(Lost(worker.id, items, reason, blame, gone))
        self._last_node_check = 0.0

    def _lose_to(self, worker: _Worker, error: RayError) -> None:
        """A call of the worker failed. A job may have killed it, unless its whole node is gone or does not answer."""
        assert worker.info is not None
        if worker.info.node not in _live_nodes():
            self._lose(worker, _gone(worker.info), blame=False)
        else:
            self._lose(worker, worker.reason or _last_line(error), not isinstance(error, ActorUnavailableError))

    def _forget(self, worker: _Worker) -> None:
        self._workers.pop(worker.id, None)
        for _, ref in worker.items:
            self._by_ref.pop(ref, None)
        self._copies = {key: copy for key, copy in self._copies.items() if copy[0] is not worker}

    def _tend(self) -> None:
        """Greet new actors; look now and then for new nodes and replace lost actors."""
        if time.monotonic() - self._last_node_check > _NODE_CHECK_SECONDS * min(1 + self._stillborn, 12):
            self._last_node_check = time.monotonic()
            self._leave_dead_nodes()
            self._fill()
        self._greet()

    def _leave_dead_nodes(self) -> None:
        """Also idle workers die with their node, and no call of theirs would tell."""
        alive = _live_nodes()
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


def start_private_ray(**options: Any) -> None:
    """Start Ray on this host for this process alone; ``options`` are those of ``ray.init``.

    A bare ``ray.init()`` would join any cluster it finds, and listen on every interface: Ray replaces 127.0.0.1 by the
    host's own address unless it takes the host for one that cannot be part of a cluster.

    Raises:
        RuntimeError: Ray did not come up, with several tries.
    """
    before = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes that it starts
    ray_constants.ENABLE_RAY_CLUSTER = False
    common = {
        "address": "local",
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "_system_config": {"worker_register_timeout_seconds": _REGISTER_SECONDS},
    }
    try:
        for attempt in range(1, _START_ATTEMPTS + 1):
            if _init_in_time(**common, **options):
                return
            log.warning("Ray did not come up within its own 30 s, attempt %d of %d", attempt, _START_ATTEMPTS)
        raise RuntimeError(f"it did not come up within 30 s, {_START_ATTEMPTS} times; is this machine overloaded?")
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        if before[0] is not None:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = before[0]


def _init_in_time(**options: Any) -> bool:
    """``ray.init``; False where its node was not up within the 30 s that Ray allows, whatever else the machine does."""
    try:
        ray.init(**options)
    except Exception as error:  # of no narrower type
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        return False
    return True


def _live_nodes() -> set[str]:
    return {n["NodeID"] for n in ray.nodes() if n["Alive"]}


def _gone(info: WorkerInfo) -> str:
    return f"its node {info.node[:8]} on {info.host} is gone"


def _knock(address: str) -> None:
    """Raise ConnectionError when nothing listens at ``host:port``; Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers there ({error.strerror or error})") from None


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
