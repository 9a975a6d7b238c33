"""The contract of a task as code: ``check_task("reading")`` reports every promise that is broken.

For authors of tasks, inside this project or outside::

    from isoflop.testing import TaskProbe, check_task

    def test_my_task():
        check_task("my-task", TaskProbe(model, ctx, {"examples": 12, "shard": 5}))

A task whose base class is built in needs no probe. Each check is a plain function of the class and the probe; ``task_checks``
gives them one by one, for a test id each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from isoflop.core.errors import Infeasible
from isoflop.core.hook import names_of
from isoflop.core.knobs import KnobValue, knob_specs
from isoflop.costs.names import MEASURED, is_measured
from isoflop.tasks.base import TASKS, Shard, Task
from isoflop.testing.declarations import declared, declares_hooks, refuses_wrong_knobs
from isoflop.testing.global_state import random_state_untouched
from isoflop.testing.refusals import refused
from isoflop.testing.snapshot import Snapshot
from isoflop.testing.suites import Case, Shared, cases_of, run_all
from isoflop.testing.task_probes import TaskProbe, task_probe

TOLERANCE = 1e-4
"""Scores of an example may differ by this much with what it is run together with, relative to the largest score."""
CLOCKED = frozenset({"seconds", "peak_bytes"})
"""Measured on the machine, so that no two readings agree."""

Check = Callable[[type[Task], TaskProbe], None]
Scores = dict[str, np.ndarray]


def check_task(
    task: str | type[Task], probe: TaskProbe | None = None, expected_failures: Mapping[str, str] | None = None
) -> None:
    """Run every check on a task.

    Args:
        task: name or class.
        probe: what to run on; by default what is known for its base class.
        expected_failures: reasons by the name of checks that are known to fail.

    Raises:
        AssertionError: promises are broken; a line for each names task, check and finding.
        UserError: there is no such task, no probe for it, or no such check.
    """
    run_all(f"task {_class(task).name}", task_checks(task, probe, expected_failures))


def task_checks(
    task: str | type[Task],
    probe: TaskProbe | Shared[TaskProbe] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[Case]:
    """The checks of a task, as pairs of an id and a call that raises; nothing is run or loaded before a call."""
    cls = _class(task)
    made = Shared(lambda: task_probe(cls)) if probe is None else probe
    shared = made if isinstance(made, Shared) else Shared.of(made)
    return cases_of(CHECKS, lambda: (cls, shared.get()), expected_failures, shared.renew)


def check_declaration(cls: type[Task], probe: TaskProbe) -> None:
    """A frozen dataclass with name, version and quantity, whose fields are all knobs; hooks are hooks, and it may ask for them."""
    declared(cls)
    declares_hooks(cls, "hooks", "asks")
    assert cls.quantity, "it does not say what it minimises"
    assert math.isnan(cls.chance) or cls.chance >= 0, f"chance = {cls.chance} is no error"
    idle = [hook.name for hook in cls.asks if not hook.asked]
    assert not idle, f"it asks for {', '.join(idle)}, where occupants act in every pass"


def check_knob_errors(cls: type[Task], probe: TaskProbe) -> None:
    """An option of the wrong type or out of range, and an unknown one, are refused in one line that names it."""
    refuses_wrong_knobs(cls, "task")


def check_impossible_models(cls: type[Task], probe: TaskProbe) -> None:
    """A model without what the task needs is refused in one line that names all of it; the probe's own model is not."""
    task = probe.task(cls)
    task.check(probe.model.info)
    bare = dataclasses.replace(probe.model.info, hooks=frozenset(), offers=frozenset())
    for word in [*names_of(cls.hooks), *sorted(cls.needs)]:
        refused(lambda: task.check(bare), Infeasible, word, f"a model without {word}")


def check_scores(cls: type[Task], probe: TaskProbe) -> None:
    """At least one shard; in each, ids, finite errors and finite metrics of one length; every shard has the same, declared metrics."""
    shards = _shards(cls, probe)
    assert shards, "evaluate() yields no shard"
    for number, shard in enumerate(shards):
        columns = {"errors": shard.errors, **shard.metrics}
        for name, values in columns.items():
            assert np.shape(values) == np.shape(shard.ids), (
                f"shard {number}: {name} {np.shape(values)} of {np.shape(shard.ids)} ids"
            )
            assert np.isfinite(values).all(), f"shard {number}: {name} holds {values}"
        assert shard.metrics.keys() == shards[0].metrics.keys(), f"shard {number} has metrics {sorted(shard.metrics)}"
    names = probe.task(cls).reported()
    strange = [] if names is None else sorted(set(shards[0].metrics) - set(names) - set(MEASURED))
    assert not strange, f"metrics {strange} are not among {cls.__name__}.metrics, {names}"


def check_order(cls: type[Task], probe: TaskProbe) -> None:
    """Every example comes once, and all seeds give the same examples, in an order of their own where order means something."""
    orders = {seed: np.concatenate([s.ids for s in _shards(cls, probe, seed)]).tolist() for seed in (0, 1, 2)}
    for seed, ids in orders.items():
        assert len(set(ids)) == len(ids), f"seed {seed}: examples come twice: {ids}"
        assert sorted(ids) == sorted(orders[0]), f"seeds 0 and {seed} score other examples"
    if len(orders[0]) > 3 and not probe.timed:
        assert orders[0] != orders[1] or orders[0] != orders[2], "the seed does not change the order"


def check_prefix(cls: type[Task], probe: TaskProbe) -> None:
    """A shorter suite is a prefix of a longer one: its examples are there under the same numbers, with the same scores."""
    option = next((name for name in ("examples", "limit") if name in knob_specs(cls)), None)
    if option is None:
        return
    longer = _scores(cls, probe)
    count = len(longer["ids"])
    shorter = _scores(cls, probe, **{option: max(1, count // 2)})
    assert len(shorter["ids"]) == max(1, count // 2), f"{option} = {max(1, count // 2)} gives {len(shorter['ids'])}"
    strangers = sorted(set(shorter["ids"].tolist()) - set(longer["ids"].tolist()))
    assert not strangers, f"examples {strangers} of a shorter suite are not in a longer one"
    rows = np.isin(longer["ids"], shorter["ids"])
    _same({name: column[rows] for name, column in longer.items()}, shorter, probe, "in a longer suite")


def check_batching(cls: type[Task], probe: TaskProbe) -> None:
    """An example's scores do not depend on the shard that it comes in, on its neighbours or on the order."""
    base = _scores(cls, probe)
    if "shard" in knob_specs(cls):
        for shard in (1, len(base["ids"])):
            _same(base, _scores(cls, probe, shard=shard), probe, f"with shard = {shard}")
    _same(base, _scores(cls, probe, seed=1), probe, "in another order")


def check_deterministic(cls: type[Task], probe: TaskProbe) -> None:
    """The same seed gives the same scores; nobody's global random state is touched, and the model is left as it was."""
    _scores(cls, probe)  # first, because Hugging Face installs hooks of its own on a model's first pass
    before = Snapshot(probe.model)
    with random_state_untouched("evaluate()"):
        first = _scores(cls, probe)
    before.compare(probe.model)
    second = _scores(cls, probe)
    if not probe.timed:
        for name, column in first.items():
            assert np.array_equal(column, second[name]), f"two runs with the same seed differ in {name}"


def check_measure(cls: type[Task], probe: TaskProbe) -> None:
    """``measure`` gives finite numbers by name, the same every time but for clocks, and leaves model and random state alone."""
    task = probe.task(cls)
    with probe.applied():
        if probe.method is not None:
            list(task.evaluate(probe.model, probe.ctx, 0))
        first = task.measure(probe.model, probe.ctx)
        before = Snapshot(probe.model)
        with random_state_untouched("measure()"):
            second = task.measure(probe.model, probe.ctx)
        before.compare(probe.model)
    assert first, "measure() says nothing"
    assert first.keys() == second.keys(), (
        f"measure() gives other keys each time: {sorted(first.keys() ^ second.keys())}"
    )
    strange = [name for name in first if cls.measure.__module__.startswith("isoflop.") and not is_measured(name)]
    assert not strange, f"measure() gives {strange}, which isoflop.costs.names does not know"
    for name, value in first.items():
        assert isinstance(name, str), f"measure() names a cost {name!r}"
        assert name, "measure() gives a cost without a name"
        assert type(value) in (int, float), f"measure() {name} is a {type(value).__name__}"
        assert math.isfinite(value), f"measure() {name} = {value}"
        assert value >= 0, f"measure() {name} = {value} is negative"
        assert name in CLOCKED or value == second[name], f"measure() {name} = {value}, then {second[name]}"


CHECKS: tuple[Check, ...] = (
    check_declaration,
    check_knob_errors,
    check_impossible_models,
    check_scores,
    check_order,
    check_prefix,
    check_batching,
    check_deterministic,
    check_measure,
)


def _class(task: str | type[Task]) -> type[Task]:
    return TASKS.get(task) if isinstance(task, str) else task


def _shards(cls: type[Task], probe: TaskProbe, seed: int = 0, **changes: KnobValue) -> list[Shard]:
    with probe.applied():
        return list(probe.task(cls, **changes).evaluate(probe.model, probe.ctx, seed))


def _scores(cls: type[Task], probe: TaskProbe, seed: int = 0, **changes: KnobValue) -> Scores:
    """Ids, errors and metrics, ascending by id."""
    shards = _shards(cls, probe, seed, **changes)
    columns = {"ids": [s.ids for s in shards], "errors": [s.errors for s in shards]}
    columns |= {name: [s.metrics[name] for s in shards] for name in shards[0].metrics}
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.argsort(whole["ids"], kind="stable")
    return {name: column[order] for name, column in whole.items()}


def _same(a: Scores, b: Scores, probe: TaskProbe, how: str) -> None:
    assert np.array_equal(a["ids"], b["ids"]), f"{how} other examples are scored"
    for name in () if probe.timed else a:
        scale = max(float(np.abs(a[name]).max()), 1e-12)
        difference = float(np.abs(a[name] - b[name]).max()) / scale
        assert difference <= TOLERANCE, f"{how} the {name} of an example differ by {difference:.1e} of the largest"
