"""The contract of a compression method as code: ``check_method("quecc")`` reports every promise that is broken.

For authors of methods, inside this project or outside::

    from isoflop.testing import check_method

    def test_my_method():
        check_method("my-method")

A method whose family is built in needs nothing else. A new family overrides ``Method.probe`` in its base class and
returns an ``isoflop.methods.probe.Probe``: a small untrained model, a few examples, and the measured cost that the
ratio knob changes. Each check is a plain function of the class and the probe and can be called by itself;
``method_checks`` gives them one by one, for a test id each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import knob_specs
from isoflop.costs.names import is_measured
from isoflop.methods.base import METHODS, Method
from isoflop.methods.probe import Probe
from isoflop.testing.configurations import (
    at_default,
    candidates,
    feasible,
    ladder,
    ratio_knob,
    with_knobs,
)
from isoflop.testing.declarations import declared, declares_hooks, refuses_wrong_knobs
from isoflop.testing.refusals import refused
from isoflop.testing.snapshot import Snapshot, fingerprint
from isoflop.testing.suites import Case, Shared, cases_of, run_all

Check = Callable[[type[Method], Probe], None]


def check_method(
    method: str | type[Method], probe: Probe | None = None, expected_failures: Mapping[str, str] | None = None
) -> None:
    """Run every check on a method.

    Args:
        method: name or class.
        probe: what to run on; by default what the method's family gives.
        expected_failures: reasons by the name of checks that are known to fail.

    Raises:
        AssertionError: promises are broken; a line for each names method, check and finding.
        UserError: there is no such method, or no such check.
    """
    run_all(f"method {_class(method).name}", method_checks(method, probe, expected_failures))


def method_checks(
    method: str | type[Method],
    probe: Probe | Shared[Probe] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[Case]:
    """The checks of a method, as pairs of an id and a call that raises; nothing is run or loaded before a call.

    Args:
        probe: what to run on, which all of them share; by default what the method's family gives, made by the first call
            and anew after a check that failed.
    """
    cls = _class(method)
    shared = probe if isinstance(probe, Shared) else Shared(cls.probe) if probe is None else Shared.of(probe)
    return cases_of(CHECKS, lambda: (cls, shared.get()), expected_failures, shared.renew)


def check_declaration(cls: type[Method], probe: Probe) -> None:
    """A frozen dataclass with name, family and version, whose fields are all knobs with default and documentation."""
    declared(cls)
    declares_hooks(cls, "hooks")
    assert cls.family, "it has no family"
    specs = knob_specs(cls)
    assert sum(spec.knob.ratio for spec in specs.values()) <= 1, "more than one knob claims to set the ratio"
    named = {name: spec.default for name, spec in specs.items() if not spec.knob.newer}
    assert dict(cls().as_field()[2]) == named, (
        "as_field() does not hold every knob, newer ones where they are not at their defaults"
    )
    for name, spec in specs.items():
        other = next((value for value in candidates(spec) if value != spec.default), spec.default)
        assert name in named or (name, other) in cls(**{name: other}).as_field()[2], (
            f"as_field() leaves out {name} = {other}"
        )


def check_knob_errors(cls: type[Method], probe: Probe) -> None:
    """A value of the wrong type or out of range, and an unknown knob, are refused in one line that names the knob."""
    refuses_wrong_knobs(cls, "method")


def check_impossible_knobs(cls: type[Method], probe: Probe) -> None:
    """A configuration the model rules out raises Infeasible naming the knob; so does a model without the hook."""
    ratio = ratio_knob(cls)
    if ratio is not None:
        for value in candidates(ratio):
            method = with_knobs(cls, {ratio.name: value})
            if feasible(method, probe):
                continue
            refused(partial(method.check, probe.model.info), Infeasible, ratio.name, f"{ratio.name} = {value!r}")
            refused(partial(_enter, method, probe), Infeasible, ratio.name, f"applying {ratio.name} = {value!r}")
    if cls.needs or cls.hooks:
        bare = dataclasses.replace(probe.model.info, hooks=frozenset(), offers=frozenset())
        if at_default(cls, probe).idle(bare):
            return
        refused(partial(at_default(cls, probe).check, bare), Infeasible, cls.name, "a model without the hook")


def check_identity(cls: type[Method], probe: Probe) -> None:
    """At ratio 1, and where a method has nothing to do (``Probe.untouched``), the outputs are those of the bare model.

    Bit for bit, or within ``Probe.tolerance`` where the family replaces an operator by one that adds up in another order.
    """
    method, default = cls.identity(probe.model.info), at_default(cls, probe)
    cases = [(method, range(probe.examples))] if method is not None else []
    for case, rows in [*cases, (default, probe.untouched(default))]:
        if not rows:
            continue
        bare = probe.outputs(rows)
        outputs = _outputs(case, probe, rows)
        if probe.exact:
            assert torch.equal(outputs, bare), f"{case} changes the outputs"
        else:
            difference = float((outputs - bare).abs().max() / bare.abs().max())
            assert difference <= probe.tolerance, f"{case} changes the outputs by {difference:.1e} of the largest"


def check_monotone_cost(cls: type[Method], probe: Probe) -> None:
    """Along the ratio knob the measured cost moves in one direction, and over the whole range it moves."""
    ratio = ratio_knob(cls)
    if ratio is None:
        return
    rungs = ladder(cls, probe)
    assert len(rungs) > 1, f"only {len(rungs)} value of {ratio.name} works on the probe's model"
    costs = []
    for method in rungs:
        with method.apply(probe.model, probe.prepared(method, 0)):
            costs.append(probe.cost())
    steps = [b - a for a, b in pairwise(costs)]
    assert all(s >= 0 for s in steps) or all(s <= 0 for s in steps), f"costs along {ratio.name} go up and down: {costs}"
    assert costs[0] != costs[-1], f"costs along {ratio.name} never change: {costs}"


def check_footprint(cls: type[Method], probe: Probe) -> None:
    """``footprint`` gives finite numbers by name, and its ``ratio`` is the measured cost without the method over that with it."""
    bare = probe.cost()
    for method in ladder(cls, probe) or [at_default(cls, probe)]:
        with method.apply(probe.model, probe.prepared(method, 0)):
            cost = probe.cost()  # a pass first: what a method measures, it measures on the last one
            costs = method.footprint(probe.model, probe.ctx)
        for name, value in costs.items():
            assert isinstance(value, (int, float)), f"footprint {name} is a {type(value).__name__}"
            assert math.isfinite(value), f"footprint {name} = {value}"
        if cls.footprint.__module__.startswith("isoflop."):
            strange = [name for name in costs if not is_measured(name)]
            assert not strange, f"footprint gives {strange}, which isoflop.costs.names does not know"
        if "ratio" in costs:
            assert math.isclose(costs["ratio"], bare / cost, rel_tol=1e-6), (
                f"{method} claims ratio {costs['ratio']:g}; measured are {bare:g} without and {cost:g} with it"
            )


def check_absolute_cost(cls: type[Method], probe: Probe) -> None:
    """The family's meter reads what its probe has worked out by hand (``Probe.absolute``), of some methods of the family."""
    costs = probe.absolute()
    assert costs, f"the probe of family {cls.family} gives no absolute cost: override Probe.absolute"
    for cost in costs:
        with cost.method.apply(probe.model, probe.prepared(cost.method, 0)):
            found = probe.read(cost.method, cost.what)
        assert math.isclose(found, cost.value, rel_tol=1e-9), (
            f"{cost.method}: {cost.what} is {found:g}, by hand it is {cost.value:g}"
        )


def check_family(cls: type[Method], probe: Probe) -> None:
    """What the family promises besides, see ``Probe.verify``; stored bytes and served values of weight methods."""
    for method in ladder(cls, probe) or [at_default(cls, probe)]:
        prepared = probe.prepared(method, 0)
        with method.apply(probe.model, prepared):
            probe.verify(method, prepared)


def check_restored(cls: type[Method], probe: Probe) -> None:
    """After ``apply`` the model is bit for bit what it was, also when the block raises."""
    method = at_default(cls, probe)
    rows = range(probe.examples)
    outputs = probe.outputs(rows)  # first, because Hugging Face installs hooks of its own on a model's first pass
    before = Snapshot(probe.model)
    _outputs(method, probe, rows)
    before.compare(probe.model)
    try:
        with method.apply(probe.model, probe.prepared(method, 0)):
            probe.outputs(rows)
            raise _Interruption
    except _Interruption:
        pass
    before.compare(probe.model)
    assert torch.equal(probe.outputs(rows), outputs), "the outputs differ after apply"


def check_deterministic(cls: type[Method], probe: Probe) -> None:
    """The same seed gives the same outputs, whatever torch's global random state; that state is left alone.

    What the method prepares is computed anew for both runs.
    """
    method = at_default(cls, probe)
    rows = range(probe.examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        probe.forget()
        first = _outputs(method, probe, rows)
        state = torch.random.get_rng_state()
        torch.manual_seed(2)
        probe.forget()
        expected = torch.random.get_rng_state()
        second = _outputs(method, probe, rows)
        assert torch.equal(torch.random.get_rng_state(), expected), "it draws from torch's global random state"
        torch.random.set_rng_state(state)
    assert torch.equal(first, second), "two runs with the same seed differ"


def check_batching(cls: type[Method], probe: Probe) -> None:
    """A batch of one gives what a batch of many gives, in any order."""
    method = at_default(cls, probe)
    rows = list(range(probe.examples))
    together = _outputs(method, probe, rows)
    alone = torch.cat([_outputs(method, probe, [row]) for row in rows])
    reverse = _outputs(method, probe, rows[::-1]).flip(0)
    scale = float(together.abs().max())
    for name, other in (("alone", alone), ("in reverse order", reverse)):
        difference = float((together - other).abs().max()) / scale
        assert difference <= probe.tolerance, f"examples run {name} differ by {difference:.1e} of the largest output"


def check_knobs_honoured(cls: type[Method], probe: Probe) -> None:
    """Every knob changes outputs, cost or footprint, what is prepared, or what is trained (``Probe.trained``)."""
    for spec in knob_specs(cls).values():
        settings = probe.settings(spec.name) or [{spec.name: value} for value in candidates(spec)]
        effects = []
        for method in (with_knobs(cls, dict(setting)) for setting in settings):
            if not feasible(method, probe):
                continue
            effects.append(_effect(method, probe))
            if any(_differ(effects[0], effect) for effect in effects[1:]):
                break
        else:
            tried = ", ".join(str(setting[spec.name]) for setting in settings)
            raise AssertionError(f"knob {spec.name} has no effect between {tried}")


def check_trace(cls: type[Method], probe: Probe) -> None:
    """What the method tells of its inner steps is named series of plain finite numbers."""
    method = at_default(cls, probe)
    for name, values in method.trace(probe.prepared(method, 0)).items():
        assert isinstance(name, str), f"trace() names a series {name!r}"
        odd = [value for value in values if type(value) not in (int, float) or not math.isfinite(value)]
        assert not odd, f"trace() gives {odd[0]!r} in series {name}: a plain finite number is wanted"


CHECKS: tuple[Check, ...] = (
    check_declaration,
    check_knob_errors,
    check_impossible_knobs,
    check_identity,
    check_monotone_cost,
    check_footprint,
    check_absolute_cost,
    check_family,
    check_restored,
    check_deterministic,
    check_batching,
    check_knobs_honoured,
    check_trace,
)


def _class(method: str | type[Method]) -> type[Method]:
    return METHODS.get(method) if isinstance(method, str) else method


class _Interruption(Exception):
    pass


def _enter(method: Method, probe: Probe) -> None:
    with method.apply(probe.model, None):
        pass


def _outputs(method: Method, probe: Probe, rows: Iterable[int]) -> Tensor:
    with method.apply(probe.model, probe.prepared(method, 0)):
        return probe.outputs(list(rows))


def _effect(method: Method, probe: Probe) -> tuple[Any, ...]:
    prepared = probe.prepared(method, 0)
    with method.apply(probe.model, prepared):
        outputs = probe.outputs(range(probe.examples))
        footprint = method.footprint(probe.model, probe.ctx)
        return outputs, footprint, probe.cost(), fingerprint(prepared), fingerprint(probe.trained(method, prepared))


def _differ(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return not torch.equal(a[0], b[0]) or a[1:] != b[1:]
