"""What tasks of evaluation harnesses share: names of documents and tasks, their requests' options, their values."""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from isoflop.core.errors import Infeasible, UserError, nearest, unknown
from isoflop.core.hashing import content_hash, file_hash
from isoflop.core.knobs import Knob
from isoflop.core.rows import example_number
from isoflop.models.base import ModelInfo
from isoflop.tasks.base import Shard, Task

MOST_GENERATED = 256
"""Tokens of an answer where the harness' task names no other number; lm-eval's own default."""
PLACES = frozenset({"dataset_path", "dataset_name", "dataset_kwargs", "metadata"})
"""What a configuration says of where its data lie; data are named by their documents."""


@dataclass(frozen=True)
class Documents:
    """What is known of a harness' task before a model answers it.

    Attributes:
        task: the harness' own object.
        versions: of harness and task.
        config: the task's configuration, without places.
        numbers: of its documents, from their content.
        metrics: names, the first first.
        more_is_better: by metric.
    """

    task: Any
    versions: tuple[str, str]
    config: str
    numbers: tuple[int, ...]
    metrics: tuple[str, ...]
    more_is_better: Mapping[str, bool]


@dataclass(frozen=True, kw_only=True)
class HarnessTask(Task):
    """Base class of tasks that a harness asks and judges, and a model of this platform answers."""

    labelled: ClassVar[str] = "task"

    task: Annotated[str, Knob(doc="name of the harness' task")] = ""
    include_path: Annotated[str, Knob(path=True, doc="folder with tasks of one's own, in the harness' form")] = ""
    metric: Annotated[str, Knob(doc="which of the task's metrics is the error; empty for its first")] = ""
    filter: Annotated[str, Knob(doc="which of the task's filters; empty for its first")] = ""
    limit: Annotated[int, Knob(low=0, high=10_000_000, doc="most documents, from the first; 0 takes all")] = 0
    shard: Annotated[
        int, Knob(low=1, high=100_000, doc="documents per shard; a pruner may stop a job between shards")
    ] = 64

    @abstractmethod
    def loaded(self) -> Documents:
        """The harness' task with its documents. Raises UserError where there is none."""

    def reported(self) -> tuple[str, ...]:
        """The harness' metrics of its task."""
        return (*self.loaded().metrics, "documents")

    def content(self) -> str:
        """Versions of harness and task, the task's configuration, and its documents."""
        loaded = self.loaded()
        return content_hash([loaded.versions, loaded.config, [str(number) for number in loaded.numbers]])

    def check(self, info: ModelInfo) -> None:
        """A task and a metric that exist."""
        super().check(info)
        loaded = self.loaded()
        if self.metric and self.metric not in loaded.metrics:
            raise unknown(f"metric of {self.task}", self.metric, loaded.metrics, f"task {self.name}")

    def chosen_metric(self) -> str:
        """The one that is the error."""
        return self.metric or self.loaded().metrics[0]

    def error_of(self, metric: str, value: float) -> float:
        """1 − the value where more is better, else the value."""
        return 1.0 - value if self.loaded().more_is_better.get(metric, True) else value

    def whole(self, error: float, documents: int) -> Shard:
        """One example: an error that is of all documents together."""
        return Shard(
            np.array([example_number(self.task)]), np.array([error]), {"documents": np.array([float(documents)])}
        )


def numbers_of(documents: Sequence[str]) -> tuple[int, ...]:
    """Example numbers from what documents say, wherever they stand; copies get their own."""
    seen: dict[str, int] = {}
    numbers = []
    for text in documents:
        numbers.append(example_number(text, seen.get(text, 0)))
        seen[text] = seen.get(text, 0) + 1
    return tuple(numbers)


def shots_text(task: Any) -> str:
    """The documents that answered examples come from, where there are any."""
    shots: Iterable[Any] | None = task.fewshot_docs() if task.config.num_fewshot else None
    return "" if shots is None else json.dumps(list(shots), sort_keys=True, default=str)


def config_text(config: dict[str, Any]) -> str:
    """A configuration without places, as text that does not change between processes."""
    return json.dumps({k: v for k, v in config.items() if k not in PLACES}, sort_keys=True, default=_named)


def unknown_task(kind: str, name: str, known: Sequence[str], include_path: str) -> UserError:
    """The error for a task that a harness does not have."""
    guess = nearest(name, known)
    hint = f" (did you mean {guess!r}?)" if guess else ""
    own = f" and {include_path}" if include_path else "; include_path: FOLDER adds one's own"
    return UserError(f"task {kind}: unknown task {name!r}{hint}; allowed: {len(known)} of the harness{own}")


def check_folder(kind: str, include_path: str) -> None:
    """Raise UserError where the folder of a user's own tasks does not exist."""
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"task {kind}: include_path = {include_path}: no such folder")


def loaded_beside(yaml: str | None, load: Callable[[], Any]) -> Any:
    """What ``load`` gives, with the relative paths of a user's own task taken from where its YAML lies.

    Those that lead nowhere there are taken from where the process runs.

    Args:
        yaml: of the task; None for one of the harness' own.
    """
    if yaml is None:
        return load()
    try:
        with chdir(Path(yaml).parent):  # the harness hands these paths to the library of data sets as they are
            return load()
    except FileNotFoundError as error:
        try:
            return load()
        except FileNotFoundError:
            raise error from None


def not_loaded(kind: str, name: str, error: Exception) -> UserError:
    """The error for a task whose data, configuration or templates fail in ways of their own."""
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return UserError(f"task {kind}: {name} cannot be loaded ({reason})")


def is_group(kind: str, name: str, found: dict[Any, Any]) -> UserError:
    """The error for a name that stands for several tasks; names them."""
    inside = [str(key) for value in found.values() for key in (value if isinstance(value, dict) else [value])]
    return UserError(
        f"task {kind}: {name} is a group; name its tasks: {', '.join((inside or list(map(str, found)))[:12])}"
    )


def generation(options: dict[str, Any], what: str) -> tuple[int, tuple[str, ...]]:
    """Tokens and ends of an answer. Raises Infeasible where it is not greedy."""
    # a temperature means nothing where the task says that nothing is drawn
    sampled = options.get("do_sample", float(options.get("temperature") or 0.0) > 0)
    if sampled or int(options.get("num_beams") or 1) > 1:
        raise Infeasible(f"{what}: its answers are sampled ({options}); allowed: tasks with greedy answers")
    until = options.get("until") or []
    ends = (until,) if isinstance(until, str) else tuple(until)
    most = options.get("max_gen_toks") or options.get("max_new_tokens") or options.get("max_tokens") or MOST_GENERATED
    return int(most), tuple(end for end in ends if end)


def cut(text: str, ends: Sequence[str]) -> str:
    """An answer up to the first text that ends it."""
    for end in ends:
        text = text.partition(end)[0]
    return text


def _named(value: Any) -> str:
    """What JSON does not know, in words that do not change between processes: of functions their name and the file that they
    stand in, with all that they call there."""
    while isinstance(value, partial):
        value = value.func
    try:
        source = file_hash(Path(inspect.getfile(value)))
    except (OSError, TypeError):
        source = ""
    return f"{getattr(value, '__qualname__', type(value).__name__)} {source}"
