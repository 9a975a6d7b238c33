"""What a task is: examples plus a metric, giving one error per example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from isoflop.core.hook import Hook
from isoflop.core.knobs import check_knobs
from isoflop.core.registry import Registry
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Model, ModelInfo

if TYPE_CHECKING:
    from isoflop.methods.base import Method


@dataclass(frozen=True)
class Shard:
    """Scores of some examples, in the task's seeded order.

    Attributes:
        ids: example numbers, the same for every model and method, so that runs compare pairwise.
        errors: one error in [0, 1] (or another quantity to be minimised) per example.
        metrics: secondary per-example metrics, by name.
    """

    ids: np.ndarray
    errors: np.ndarray
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Task(ABC):
    """Base class of tasks: a frozen dataclass whose ``Knob`` fields are the task's options.

    ``quantity`` is what ``error`` is. ``version`` is part of every job id: raise it whenever the same options would give other examples or another metric.
    ``needs`` is what the model must offer (``ModelInfo.offers``), ``hooks`` the places that it must have.
    ``asks`` names hooks of the model that the task uses besides running it (``prompt_text``, ``byte_view``, or
    ``feed_forward``, whose occupant it tells of every pass that it scores); methods that act, or are measured, there and
    nowhere else are refused by other tasks.
    ``labelled`` is the option that the label of a reference (``lm-eval:arc_easy``) gives where it is not given itself.
    ``metrics`` are the names of all secondary metrics that its shards may hold; None where only running tells, so that a sweep
    can ask for any name.
    ``chance`` is the expected error of the best answerer that sees the question only, at the default options.
    """

    name: ClassVar[str] = ""
    version: ClassVar[str] = "1"
    quantity: ClassVar[str] = "error"
    needs: ClassVar[frozenset[str]] = frozenset()
    metrics: ClassVar[tuple[str, ...] | None] = None
    chance: ClassVar[float] = float("nan")
    labelled: ClassVar[str] = ""
    hooks: ClassVar[frozenset[Hook[Any]]] = frozenset()
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset()

    def content(self) -> str:
        """Names the outside data that the examples come from, whatever their place; part of every job id. Empty for none."""
        return ""

    def reported(self) -> tuple[str, ...] | None:
        """Secondary metrics of the task with its options; None where they cannot be told before it runs.

        What a class outside isoflop inherits is not taken for its own word.
        """
        cls = type(self)
        return self.metrics if "metrics" in vars(cls) or cls.__module__.startswith("isoflop.") else None

    def check(self, info: ModelInfo) -> None:
        """Raise Infeasible when the model cannot do this task; says what is missing."""
        info.check_offers(f"task {self.name}", self.hooks, self.needs)

    def check_method(self, method: Method, info: ModelInfo) -> None:  # noqa: B027
        """Raise Infeasible when the task, with its options, gives the method nothing to act on."""

    def prompt_length(self, info: ModelInfo) -> int | None:
        """Tokens of every prompt that methods on the cache compress, None where that is not known before running."""
        return None

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        """Shared intermediates that ``evaluate`` will ask for (test examples, vision features …)."""
        return ()

    @abstractmethod
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Yield shards (at least one); a caller may stop in between."""

    @abstractmethod
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of answering one example with the methods that are applied now, measured on the live model.

        Keys in use (more are kept too): ``visual_tokens`` (V, entering the language model), ``text_tokens`` (Q),
        ``flops`` (all, per answer), ``flops_llm``, ``flops_vision``, ``flops_method`` (overhead of the compressor),
        ``weight_bytes`` (model and compressor), ``kv_bytes``, ``seconds`` (per answer), ``peak_bytes``.
        """


TASKS: Registry[type[Task]] = Registry("task", ("isoflop.tasks",))


def task_class(ref: str, where: str = "") -> type[Task]:
    """The class of a task as a sweep names it: ``choice``, or ``choice:LABEL`` to tell several of a kind apart.

    Raises:
        UserError: there is none.
    """
    return TASKS.get(ref.partition(":")[0], where)


def task_of(ref: str, options: Mapping[str, Any], paths: Mapping[str, Any] | None = None, where: str = "") -> Task:
    """A task with its options checked.

    Args:
        paths: those of its options that are paths.
    """
    cls = task_class(ref, where)
    return cls(**check_knobs(cls, {**options, **(paths or {})}, f"task {ref}", where))
