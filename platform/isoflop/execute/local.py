"""Runs the same work items in this process, one after the other: for debuggers and fast tests."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from isoflop.execute.base import Done, Event, Executor, ShardReport, WorkerInfo, WorkItem
from isoflop.jobs import Runner


class LocalExecutor(Executor):
    """One worker, this process. A job's deadline cannot be enforced here, since nobody is left to enforce it.

    Args:
        cache_dir: root of the stage cache.
        device: torch device, or those over which a model is spread; None to choose.
        threads: torch threads while it runs; sums in another order give other last digits, so this is as on Ray.
    """

    NAME = "local"
    here: ClassVar[bool] = True

    def __init__(
        self, cache_dir: str | Path | None = None, device: str | Sequence[str] | None = None, threads: int = 1
    ) -> None:
        self._runner = Runner(cache_dir, device, name=self.NAME)
        self._queue: deque[WorkItem] = deque()
        self._threads = threads
        self._threads_before: int | None = None

    def start(self) -> None:
        import torch

        if self._threads_before is not None:
            return
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads)

    def workers(self) -> list[WorkerInfo]:
        return [WorkerInfo(self.NAME, self.NAME, socket.gethostname(), self._runner.cache.device)]

    def submit(self, worker: str, item: WorkItem) -> None:
        self._queue.append(item)

    def poll(self, timeout: float) -> list[Event]:
        if not self._queue:
            return []
        item = self._queue.popleft()
        if item.kind == "stage":
            return [Done(self.NAME, item, self._runner.run_stage(item.job, item.stage))]
        watcher = self._on_shard

        def on_shard(shard: int, mean: float, examples: int) -> bool:
            return watcher is not None and watcher(ShardReport(self.NAME, item, shard, mean, examples))

        return [Done(self.NAME, item, self._runner.run_job(item.job, on_shard, item.alone))]

    def kill(self, worker: str, reason: str, blame: bool = True) -> None:
        """Nothing: the worker is this very process."""

    def close(self, now: bool = False) -> None:
        self._queue.clear()
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def cached_stages(self) -> set[str]:
        return self._runner.cache.keys()
