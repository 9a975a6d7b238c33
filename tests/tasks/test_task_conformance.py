"""The suite for tasks on every registered task, and on tasks that break a promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch

from isoflop.core.errors import UserError
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.attention import ATTENTION
from isoflop.tasks.base import TASKS, Shard, Task
from isoflop.tasks.reading import Reading
from isoflop.testing import TaskProbe, check_task, task_checks
from isoflop.testing import tasks as suite
from isoflop.testing.task_probes import task_probe

CASES = [pytest.param(run, id=f"{name}-{i}") for name in TASKS.own() for i, run in task_checks(name)]


@pytest.mark.parametrize("check", CASES)
def test_registered_task_keeps_the_contract(check: Any) -> None:
    check()


@pytest.fixture(scope="module")
def probe() -> TaskProbe:
    return task_probe(Reading)


@dataclass(frozen=True)
class Sound(Reading):
    """The base of the broken tasks below."""

    name: ClassVar[str] = "sound"


@dataclass(frozen=True)
class Undocumented(Sound):
    """An option that nobody explains."""

    extra: Annotated[int, Knob(low=1, high=2)] = 1


@dataclass(frozen=True)
class AsksForWhatAlwaysActs(Sound):
    """Asks for the cache, where occupants act in every pass."""

    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({ATTENTION})


@dataclass(frozen=True)
class TakesAnyModel(Sound):
    """Finds out late."""

    def check(self, info: ModelInfo) -> None:
        """Nothing is refused."""


@dataclass(frozen=True)
class NamesHalf(Sound):
    """Refuses, but does not say what is missing."""

    def check(self, info: ModelInfo) -> None:
        """One word for everything."""
        try:
            super().check(info)
        except UserError as error:
            raise type(error)(f"task {self.name}: this model does not offer visual_tokens") from None


class Changed(Sound):
    """Changes the shards of the sound task."""

    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        for number, shard in enumerate(super().evaluate(model, ctx, seed)):
            yield self.change(shard, number, seed)

    def change(self, shard: Shard, number: int, seed: int) -> Shard:
        raise NotImplementedError


@dataclass(frozen=True)
class InfiniteErrors(Changed):
    """Divides by nothing."""

    def change(self, shard: Shard, number: int, seed: int) -> Shard:
        return replace(shard, errors=shard.errors / 0 + np.nan)


@dataclass(frozen=True)
class OneMetricShort(Changed):
    """Has other metrics in a later shard."""

    def change(self, shard: Shard, number: int, seed: int) -> Shard:
        return replace(shard, metrics={}) if number else shard


@dataclass(frozen=True)
class CountsTwice(Changed):
    """Every shard holds the same numbers."""

    def change(self, shard: Shard, number: int, seed: int) -> Shard:
        return replace(shard, ids=np.arange(len(shard.ids)))


@dataclass(frozen=True)
class SeededExamples(Changed):
    """Other examples with another seed."""

    def change(self, shard: Shard, number: int, seed: int) -> Shard:
        return replace(shard, ids=shard.ids + 100 * seed)


@dataclass(frozen=True)
class FixedOrder(Sound):
    """Asks in the order of the numbers whatever the seed."""

    def order(self, seed: int) -> np.ndarray:
        return np.arange(self.examples)


@dataclass(frozen=True)
class OtherSuite(Sound):
    """A longer suite has other examples."""

    @property
    def scenes_seed(self) -> int:
        return self.examples


@dataclass(frozen=True)
class LooksAtTheShard(Changed):
    """Scores against the mean of a shard."""

    def change(self, shard: Shard, number: int, seed: int) -> Shard:
        nll = shard.metrics["nll"]
        return replace(shard, metrics={"nll": nll - nll.mean()})


@dataclass(frozen=True)
class DrawsGlobally(Changed):
    """Adds noise from torch's global generator."""

    def change(self, shard: Shard, number: int, seed: int) -> Shard:
        torch.rand(1)
        return shard


@dataclass(frozen=True)
class SeedsTheWorld(Changed):
    """Seeds NumPy's global generator."""

    def change(self, shard: Shard, number: int, seed: int) -> Shard:
        np.random.seed(0)
        return shard


class OtherCosts(Sound):
    """Changes what is measured."""

    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        return {**super().measure(model, ctx), **self.more(model)}

    def more(self, model: Model) -> dict[str, float]:
        raise NotImplementedError


@dataclass(frozen=True)
class NamelessCost(OtherCosts):
    """A cost without a name."""

    def more(self, model: Model) -> dict[str, float]:
        return {"": 1.0}


@dataclass(frozen=True)
class InfiniteCost(OtherCosts):
    """A ratio over nothing."""

    def more(self, model: Model) -> dict[str, float]:
        return {"flops": float("inf")}


@dataclass(frozen=True)
class CostOfTheHour(OtherCosts):
    """Counts its own calls."""

    def more(self, model: Model) -> dict[str, float]:
        calls.append(1)
        return {"flops": float(len(calls))}


@dataclass(frozen=True)
class LeavesAMark(OtherCosts):
    """Leaves an attribute in the model."""

    def more(self, model: Model) -> dict[str, float]:
        model.module.config.marked = getattr(model.module.config, "marked", 0) + 1
        return {}


calls: list[int] = []
BREACHES = [
    (Undocumented, suite.check_declaration, "knob extra has no documentation"),
    (AsksForWhatAlwaysActs, suite.check_declaration, "it asks for attention"),
    (TakesAnyModel, suite.check_impossible_models, "a model without visual_tokens is accepted"),
    (NamesHalf, suite.check_impossible_models, "does not name vocabulary"),
    (InfiniteErrors, suite.check_scores, "shard 0: errors holds"),
    (OneMetricShort, suite.check_scores, r"shard 1 has metrics \[\]"),
    (CountsTwice, suite.check_order, "examples come twice"),
    (SeededExamples, suite.check_order, "seeds 0 and 1 score other examples"),
    (FixedOrder, suite.check_order, "the seed does not change the order"),
    (OtherSuite, suite.check_prefix, "in a longer suite"),
    (LooksAtTheShard, suite.check_batching, "with shard = 1 the nll"),
    (DrawsGlobally, suite.check_deterministic, "global random state of torch"),
    (SeedsTheWorld, suite.check_deterministic, "global random state of numpy"),
    (NamelessCost, suite.check_measure, "a cost without a name"),
    (InfiniteCost, suite.check_measure, "flops = inf"),
    (CostOfTheHour, suite.check_measure, "flops = 1.0, then 2.0"),
    (LeavesAMark, suite.check_measure, "left behind: config"),
]


@pytest.mark.parametrize(("broken", "check", "finding"), BREACHES)
def test_broken_promises_are_found(broken: type[Task], check: suite.Check, finding: str) -> None:
    probe = task_probe(Reading)
    check(Sound, probe)
    with pytest.raises(AssertionError, match=finding):
        check(broken, probe)


def test_the_sound_task_behind_the_broken_ones_passes(probe: TaskProbe) -> None:
    check_task(Sound, probe)


def test_a_task_of_no_known_kind_needs_a_probe() -> None:
    @dataclass(frozen=True)
    class Strange(Task):
        """Of no kind."""

        name: ClassVar[str] = "strange"

        def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
            yield from ()

        def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
            return {}

    with pytest.raises(AssertionError, match="give check_task a TaskProbe"):
        check_task(Strange)
