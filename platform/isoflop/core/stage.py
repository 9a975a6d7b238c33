"""Stages: shared intermediates of jobs, content-addressed and computed once per cluster.

A stage is a frozen dataclass whose fields are everything its result depends on. Methods, models and tasks *declare*
the stages they need; whoever runs jobs computes each of them once, in dependency order, and hands the result out. A
stage's result is a folder, so that a trained model can be a ``save_pretrained`` checkpoint and a feature table an
``.npy`` file that is memory-mapped, and so that it survives restarts and travels between hosts as files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from isoflop.core.hashing import content_hash


class StageContext(Protocol):
    """What a stage, a method or a task may ask of the process that runs it."""

    @property
    def device(self) -> str:
        """The torch device of this worker, e.g. ``"cpu"`` or ``"cuda"``; the first one where it has several."""

    @property
    def devices(self) -> tuple[str, ...]:
        """All torch devices of this worker, over which checkpoints of language models are spread; ``device`` alone where it has one."""

    def get(self, stage: Stage) -> Any:
        """The loaded value of ``stage`` (computed first if nobody has yet). Treat it as read-only: it is shared."""

    def scratch(self, stage: Stage) -> Path:
        """A folder for what ``compute`` keeps on its way, which outlives a killed process and goes when the stage is done."""


@dataclass(frozen=True)
class Stage:
    """Base class of stages.

    Life cycle: ``deps`` are computed first; ``compute`` writes files into an empty folder, which is then moved into the
    cache atomically; ``load`` turns the folder into a value, once per worker process, for as long as memory allows.

    Subclasses are frozen dataclasses with plain fields (numbers, strings, tuples, other stages, methods) and raise ``version``
    whenever the same fields would give another result.
    """

    version: ClassVar[str] = "1"
    kind: ClassVar[str] = ""

    @property
    def slots(self) -> int:
        """Workers' places on one host that ``compute`` fills: the local processes that it runs at a time.

        Whoever runs stages keeps as many free while it runs, or all of the host's where there are fewer.
        """
        return 1

    def deps(self) -> tuple[Stage, ...]:
        """Stages whose values ``compute`` or ``load`` asks for; by default, every field that is a stage."""
        return tuple(v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Stage))

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Write the result into ``folder`` (exists, empty). Must depend on nothing but the fields."""
        raise NotImplementedError

    def load(self, ctx: StageContext, folder: Path) -> Any:
        """The value that users of the stage get from ``ctx.get``."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """The content that names the result, as plain JSON types."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"stage": self.kind or type(self).__name__, "version": self.version, **fields}

    @cached_property
    def key(self) -> str:
        """Content hash; the name of the folder in the cache."""
        return f"{self.kind or type(self).__name__.lower()}-{content_hash(self.spec())}"


def walk(stages: tuple[Stage, ...]) -> Iterator[Stage]:
    """Every stage in ``stages`` and below, dependencies first, each key once."""
    seen: set[str] = set()

    def visit(stage: Stage) -> Iterator[Stage]:
        if stage.key in seen:
            return
        seen.add(stage.key)
        for dep in stage.deps():
            yield from visit(dep)
        yield stage

    for stage in stages:
        yield from visit(stage)


def _plain(value: Any) -> Any:
    if isinstance(value, Stage):
        return value.key
    if hasattr(value, "as_field"):  # a method, which core does not know
        return _plain(value.as_field())
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
