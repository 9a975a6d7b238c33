"""What tasks on a user's data share: where the data lie, which examples are taken, and in which order.

A field that names data is part of a job's id by the data's content, and not by their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.rows import Row, Rows, chosen, read
from isoflop.models.base import ModelInfo
from isoflop.models.features import batches
from isoflop.tasks.base import Task


@dataclass(frozen=True)
class Example:
    """A row with its number; ``place`` is where it stands in a file, for messages."""

    id: int
    row: Row
    place: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class DataTask(Task):
    """Base class of tasks on rows of a user's data.

    Which examples are taken depends on the data and on ``limit`` and ``seed`` only; fewer are a subset of more. A job's own
    seed shuffles their order.
    """

    data: Annotated[
        str, Knob(path=True, doc="file, folder, hub:OWNER/NAME or public:NAME/FILE; relative to the sweep's file")
    ]
    split: Annotated[str, Knob(doc="of a hub's data set; of a folder, how names of its files begin")] = ""
    limit: Annotated[int, Knob(low=0, high=10_000_000, doc="most examples; 0 takes all")] = 0
    seed: Annotated[int, Knob(low=0, high=2**31 - 1, doc="draws the examples where there are more than limit")] = 0
    shard: Annotated[
        int, Knob(low=1, high=100_000, doc="examples per shard; a pruner may stop a job between shards")
    ] = 64

    @property
    def rows(self) -> Rows:
        """All of the data."""
        return read(self.data, self.split)

    def content(self) -> str:
        """Names the data, whatever their place and order."""
        return self.rows.content

    def check_rows(self, rows: Rows) -> None:
        """Raise UserError where the data lack what the options name."""

    def check_example(self, example: Example) -> None:
        """Raise UserError for a row that cannot be asked."""

    def examples(self) -> list[Example]:
        """Those that are taken, in the order in which they are drawn."""
        rows = self.rows
        self.check_rows(rows)
        return drawn(rows, self.limit, self.seed)

    def check(self, info: ModelInfo) -> None:
        """What the model must have, fields that the options name, and every row that is taken: before anything runs."""
        super().check(info)
        self.check_rows(self.rows)
        _check_examples(self, self.rows.content)


@lru_cache(maxsize=256)  # a plan checks a task with every model and method
def _check_examples(task: DataTask, content: str) -> None:
    for example in task.examples():
        task.check_example(example)


def drawn(rows: Rows, limit: int, seed: int) -> list[Example]:
    """At most ``limit`` examples, 0 for all."""
    places = chosen(len(rows), limit or None, seed, rows.ids_N)
    return [Example(int(rows.ids_N[place]), rows.rows[place], rows.place(place)) for place in places]


def shards(task: Task, examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Examples in the order of a job's seed, ``size`` at a time."""
    order = np.random.default_rng(derive_seed("order", task.name, seed)).permutation(len(examples))
    for part in batches(len(examples), size):
        yield [examples[place] for place in order[part]]


def bad_row(task: Task, example: Example, problem: str) -> UserError:
    """The error for an example that cannot be used: says where it stands, and shows the row."""
    row = str(dict(example.row))
    where = f"{example.place}: " if example.place else ""
    return UserError(f"task {task.name}: {where}{problem}; the row is {row[:160]}{'…' if len(row) > 160 else ''}")
