"""Execution: runs work items on workers. The one room that knows Ray; queue, retries and deadlines live in the driver."""

from isoflop.execute.base import Done, Event, Executor, Lost, OnShard, Resources, ShardReport, WorkerInfo, WorkItem
from isoflop.execute.local import LocalExecutor

__all__ = [
    "Done",
    "Event",
    "Executor",
    "LocalExecutor",
    "Lost",
    "OnShard",
    "Resources",
    "ShardReport",
    "WorkItem",
    "WorkerInfo",
]
