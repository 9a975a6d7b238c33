"""The interface between the driver and whatever runs its work: Ray, this process, or simulated time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from isoflop.jobs import Job


@dataclass(frozen=True)
class Resources:
    """What one job needs; a worker is a slot of this size.

    Attributes:
        gpus: may be a fraction; 0 hides every GPU from the job.
        memory: bytes of host memory, or None; also the limit that turns a leak into an error (``RLIMIT_AS`` headroom).
    """

    cpus: float = 1
    gpus: float = 0
    memory: int | None = None


@dataclass(frozen=True)
class WorkItem:
    """One thing to do: run a job, or compute one of its stages.

    Attributes:
        id: unique per attempt.
        stage: key of the stage to compute, for ``kind="stage"``.
        needs: keys of the stages that must be at hand first, dependencies first.
        slots: workers' places on one host that it fills (``Stage.slots``).
        alone: its worker has nothing else meanwhile, so that a death of the worker is its own doing.
    """

    id: str
    kind: Literal["job", "stage"]
    job: Job
    stage: str = ""
    needs: tuple[str, ...] = ()
    slots: int = 1
    alone: bool = False


@dataclass(frozen=True)
class WorkerInfo:
    """A live worker."""

    id: str
    node: str
    host: str
    device: str
    slot: str = ""


@dataclass(frozen=True)
class Done:
    """An item ended: ``result`` is an :class:`isoflop.jobs.Outcome` for a job, a dict for a stage."""

    worker: str
    item: WorkItem
    result: Any


@dataclass(frozen=True)
class Lost:
    """A worker died. ``items`` are those it had not finished, the running one first.

    Attributes:
        blame: whether the running item may be what killed it.
        gone: stages that no worker can reach without it.
        certain: whether the first item was the running one for sure. It may have ended, and its result been lost with the
            worker, when a later one killed it.
    """

    worker: str
    items: tuple[WorkItem, ...]
    reason: str
    blame: bool = True
    gone: frozenset[str] = frozenset()
    certain: bool = True


@dataclass(frozen=True)
class ShardReport:
    """A running job finished a shard."""

    worker: str
    item: WorkItem
    shard: int
    mean_error: float
    examples: int


Event = Done | Lost
OnShard = Callable[[ShardReport], bool]


class Executor(ABC):
    """Life cycle: ``start``, any number of ``submit`` and ``poll``, ``close``. Items of a worker run in order.

    ``here``: they run in this process, inside of ``poll``.
    """

    here: ClassVar[bool] = False

    @abstractmethod
    def start(self) -> None:
        """Bring workers up; nothing when they are.

        Raises:
            UserError: at once, for resources that the cluster can never give.
            Unavailable: what it runs on does not come up.
        """

    @abstractmethod
    def workers(self) -> list[WorkerInfo]:
        """The workers that take work now; the list changes as nodes join and leave."""

    @abstractmethod
    def submit(self, worker: str, item: WorkItem) -> None:
        """Queue an item on a worker."""

    @abstractmethod
    def poll(self, timeout: float) -> list[Event]:
        """Events since the last call; waits up to ``timeout`` seconds for the first. Raises Unavailable where what it runs
        on has died and cannot be started again."""

    @abstractmethod
    def kill(self, worker: str, reason: str, blame: bool = True) -> None:
        """Kill a worker (a job passed its deadline); its items come back as ``Lost`` and a new worker takes its place."""

    def watch(self, on_shard: OnShard | None) -> None:
        """Have ``on_shard`` called, between polls at the latest, for each shard that a job finishes; when it returns
        True the job ends after its current shard. Costs nothing while nobody watches."""
        self._on_shard = on_shard

    def tell(self, line: Callable[[str], None]) -> None:
        """Have ``line`` called, also while it starts, with what people should know of whatever runs the work."""
        self._line = line

    _line: Callable[[str], None] | None = None
    _on_shard: OnShard | None = None
    dashboard: str = ""
    """Address of a page that shows the workers, once started; empty where there is none."""

    @abstractmethod
    def close(self, now: bool = False) -> None:
        """End all workers; ``now`` does not wait for running items."""

    def cached_stages(self) -> set[str]:
        """Keys of the stages that the hosts of the present workers hold."""
        return set()
