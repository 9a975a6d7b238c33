"""Which node of a cluster holds which stages on disk, and how a stage gets from one to another."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isoflop.execute.base import WorkItem
from isoflop.stages import SharedStages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """A worker that can send what its node holds.

    Attributes:
        shares: whether it sees the folder for large stages.
    """

    id: str
    actor: Any
    node: str
    shares: bool


class StagePlaces:
    """Args:
    shared: folder for stages larger than ``large`` bytes that one node computed and another needs, or None. Unless all
        workers see it, they go through Ray's object store like the others.
    """

    def __init__(self, shared: Path | None, large: int) -> None:
        self._shared = SharedStages(shared) if shared is not None else None
        self._large = large
        self._mark = ""
        self._disks: dict[str, set[str]] = {}  # node -> keys of the stages on its disk
        self._copies: dict[str, tuple[str, Any]] = {}  # stage on its way to other nodes -> (sender, files)

    def offer(self) -> None:
        """Leave a mark in the shared folder, by which workers tell whether they see it."""
        if self._shared is None:
            return
        try:
            self._mark = self._shared.leave_mark()
        except OSError as error:
            log.warning("large stages go through the object store: %s: %s", self._shared.root, error.strerror)
            self._shared = None

    def withdraw(self) -> None:
        """Take the mark away."""
        if self._shared is not None:
            self._shared.remove_mark(self._mark)

    @property
    def offered(self) -> tuple[str, str, int] | None:
        """What a worker must know of the shared folder."""
        return (str(self._shared.root), self._mark, self._large) if self._shared is not None else None

    def add(self, node: str, stages: Iterable[str]) -> None:
        """A node holds these stages."""
        self._disks.setdefault(node, set()).update(stages)

    def keys(self, holders: Iterable[Holder]) -> set[str]:
        """Stages that workers can reach."""
        known = list(holders)
        shared = self._folder(known)
        return set().union(shared.keys() if shared else (), *(self._disks[h.node] for h in known))

    def fetch_plan(self, node: str, item: WorkItem, holders: Iterable[Holder]) -> dict[str, list[Any]]:
        """For stages that only other nodes hold: references to their files, owned by the driver, or a shared folder.

        References travel inside lists so that Ray does not resolve them before the call; a worker that has the files
        by then (a shared disk) never fetches them.
        """
        known = list(holders)
        plan: dict[str, list[Any]] = {}
        for key in item.needs:
            if key in self._disks[node]:
                continue
            if key not in self._copies:
                home = next((h for h in known if key in self._disks[h.node]), None)
                shared = self._folder(known)
                if home is None:
                    if shared is not None and key in shared:
                        plan[key] = [str(shared.folder(key))]
                    continue
                self._copies[key] = home.id, home.actor.stage_files.remote(item.job.to_dict(), key, shared is not None)
            plan[key] = [self._copies[key][1]]
        return plan

    def arrived(self, item: WorkItem) -> None:
        """What an item needed has arrived or never will; whoever else is waiting for it holds it."""
        for key in item.needs:
            self._copies.pop(key, None)

    def lost(self, sender: str) -> None:
        """What a worker was sending is not on its way any more."""
        self._copies = {key: copy for key, copy in self._copies.items() if copy[0] != sender}

    def _folder(self, holders: list[Holder]) -> SharedStages | None:
        """The folder for large stages, when all workers see it."""
        return self._shared if all(h.shares for h in holders) else None
