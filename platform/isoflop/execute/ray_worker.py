"""What runs inside each Ray actor."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import socket
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

import ray

from isoflop.core.public import look_beside
from isoflop.jobs import Job, Outcome, Runner
from isoflop.jobs.devices import devices_here
from isoflop.stages.shared import SharedStages, folder_size

log = logging.getLogger(__name__)


class RayWorker:
    """A slot: one :class:`Runner` with its warm models, plus a second thread for progress and stop requests.

    Args:
        name: the worker's id.
        cache_dir: stage cache on this host, or None for the default.
        imports: modules that register a sweep's own methods, models and tasks.
        import_folder: further place to look for them.
        memory: limit in bytes on what jobs may add to this process, so that a leak becomes a MemoryError here instead
            of the host's out-of-memory killer.
        gpus: that the worker has; over several of them a model is spread.
        shared: folder for large stages, the mark that tells whether this host sees it, and from how many bytes on a
            stage is large.
    """

    def __init__(
        self,
        name: str,
        cache_dir: str | None,
        imports: tuple[str, ...],
        import_folder: str | None,
        memory: int | None,
        gpus: float = 0,
        shared: tuple[str, str, int] | None = None,
    ) -> None:
        import torch

        look_beside(import_folder)
        if imports and import_folder is not None:
            sys.path.append(import_folder)
        for module in imports:
            importlib.import_module(module)
        # torch sizes its pool by the host's cores; several actors on one host would fight over them
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self._runner = Runner(Path(cache_dir) if cache_dir else None, devices_here(gpus), name)
        if memory:
            _limit_memory(memory)
        self._shared: SharedStages | None = None
        if shared is not None and (seen := SharedStages(shared[0])).sees(shared[1]):
            self._shared, self._large = seen, shared[2]
        self._lock = threading.Lock()
        # bounded: without a pruner nobody collects them
        self._reports: deque[tuple[str, int, float, int]] = deque(maxlen=10_000)
        self._stop: set[str] = set()

    def hello(self) -> dict[str, Any]:
        """Who and where this worker is, and which stages its host has on disk."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
            "device": self._runner.cache.device,
            "slot": gpus,
            "stages": sorted(self._runner.cache.keys()),
            "shared": self._shared is not None,
        }

    def run_job(self, item: str, job: dict[str, Any], fetch: dict[str, list[Any]], alone: bool = False) -> Outcome:
        """Run a job; its own failures come back as an outcome."""
        built = Job.from_dict(job)
        self._fetch(built, fetch)

        def on_shard(shard: int, mean: float, examples: int) -> bool:
            with self._lock:
                self._reports.append((item, shard, mean, examples))
                return item in self._stop

        return self._runner.run_job(built, on_shard, alone)

    def run_stage(self, job: dict[str, Any], key: str, fetch: dict[str, list[Any]]) -> dict[str, Any]:
        """Compute one stage of a job."""
        built = Job.from_dict(job)
        self._fetch(built, fetch)
        return self._runner.run_stage(built, key)

    @ray.method(concurrency_group="control")
    def stage_files(self, job: dict[str, Any], key: str, share: bool = False) -> dict[str, bytes] | str:
        """A computed stage as files; a large one, with ``share``, as the folder in which all hosts find it."""
        folder = self._runner.cache.root / key
        if share and self._shared is not None and folder_size(folder) > self._large:
            try:
                return str(self._shared.publish(key, folder))
            except OSError as error:
                log.warning("stage %s cannot be put into %s: %s", key, self._shared.root, error)
        return self._runner.stage_files(Job.from_dict(job), key)

    @ray.method(concurrency_group="control")
    def progress(self) -> list[tuple[str, int, float, int]]:
        """Shards finished since the last call: (item, shard, mean error so far, examples so far)."""
        with self._lock:
            reports = list(self._reports)
            self._reports.clear()
        return reports

    @ray.method(concurrency_group="control")
    def stop(self, item: str) -> None:
        """Let the running job ``item`` end after its current shard."""
        with self._lock:
            self._stop.add(item)

    def _fetch(self, job: Job, fetch: dict[str, list[Any]]) -> None:
        for key, refs in fetch.items():
            if not (self._runner.cache.root / key / "stage.json").is_file():
                found = refs[0] if isinstance(refs[0], str) else ray.get(refs[0])
                self._runner.install_stage(job, key, Path(found) if isinstance(found, str) else found)


def _limit_memory(extra: int) -> None:
    status = Path("/proc/self/statm")
    now = int(status.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else 0
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, now + extra))
