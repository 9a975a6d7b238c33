"""The contract of a compression method as code: ``check_method("quecc")`` raises on the first broken promise.

For authors of methods, inside this project or outside::

    from isoflop.testing import check_method

    def test_my_method():
        check_method("my-method")

A method whose family is built in needs nothing else. A new family overrides ``Method.probe`` in its base class and
returns an ``isoflop.methods.probe.Probe``: a small untrained model, a few examples, and the measured cost that the
ratio knob changes. Each check is a plain function of the class and the probe and can be called by itself.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.knobs import KnobSpec, KnobValue, knob_specs
from isoflop.methods.base import METHODS, Method, build
from isoflop.methods.probe import Probe

TOLERANCE = 1e-5
"""Batches of different sizes may differ by this much, relative to the largest output."""

Check = Callable[[type[Method], Probe], None]


def check_method(method: str | type[Method], probe: Probe | None = None) -> None:
    """Run every check on a registered method.

    Args:
        method: name or class.
        probe: what to run on; by default what the method's family gives.

    Raises:
        AssertionError: a promise is broken; the message names method, check and finding.
    """
    cls = METHODS.get(method) if isinstance(method, str) else method
    used = probe if probe is not None else cls.probe()
    for check in CHECKS:
        try:
            check(cls, used)
        except AssertionError as error:
            raise AssertionError(f"method {cls.name}: {check.__name__}: {error}") from error


def check_declaration(cls: type[Method], probe: Probe) -> None:
    """A frozen dataclass with name, family and version, whose fields are all knobs with default and documentation."""
    assert dataclasses.is_dataclass(cls), "the class is no dataclass"
    assert getattr(cls, "__dataclass_params__").frozen, "the dataclass is not frozen"  # noqa: B009
    assert cls.name, "it has no name: register it"
    assert cls.family, "it has no family"
    assert cls.version, "it has no version"
    assert (cls.__doc__ or "").strip(), "it has no docstring"
    unwritten = [n for n in dir(cls) if getattr(getattr(cls, n, None), "__isabstractmethod__", False)]
    assert not unwritten, f"its family leaves {', '.join(unwritten)} to it, which it does not define"
    bare = [
        n
        for n, value in vars(cls).items()
        if isinstance(value, (bool, int, float, str))
        and not n.startswith("_")
        and n not in inspect.get_annotations(cls)
        and not any(hasattr(base, n) for base in cls.__mro__[1:])
    ]
    assert not bare, f"{', '.join(bare)} has no annotation, so that it is no knob"
    specs = knob_specs(cls)
    strangers = {f.name for f in dataclasses.fields(cls)} - set(specs)
    assert not strangers, f"fields without a Knob annotation: {', '.join(sorted(strangers))}"
    for spec in specs.values():
        assert spec.knob.doc, f"knob {spec.name} has no documentation"
        assert not spec.required, f"knob {spec.name} has no default"
        spec.check(spec.default)
    assert sum(spec.knob.ratio for spec in specs.values()) <= 1, "more than one knob claims to set the ratio"
    assert dict(cls().as_field()[2]) == {name: spec.default for name, spec in specs.items()}, (
        "as_field() does not hold every knob"
    )


def check_knob_errors(cls: type[Method], probe: Probe) -> None:
    """A value of the wrong type or out of range, and an unknown knob, are refused in one line that names the knob."""
    for spec in knob_specs(cls).values():
        for wrong in _wrong_values(spec):
            _refused(partial(build, cls.name, {spec.name: wrong}), UserError, spec.name, f"{spec.name} = {wrong!r}")
    _refused(partial(build, cls.name, {"no-such-knob": 1}), UserError, "no-such-knob", "an unknown knob")


def check_impossible_knobs(cls: type[Method], probe: Probe) -> None:
    """A configuration the model rules out raises Infeasible naming the knob; so does a model without the hook point."""
    ratio = _ratio_knob(cls)
    if ratio is not None:
        for value in _candidates(ratio):
            method = _with(cls, {ratio.name: value})
            if _feasible(method, probe):
                continue
            _refused(partial(method.check, probe.model.info), Infeasible, ratio.name, f"{ratio.name} = {value!r}")
            _refused(partial(_enter, method, probe), Infeasible, ratio.name, f"applying {ratio.name} = {value!r}")
    if cls.needs or cls.hooks:
        bare = dataclasses.replace(probe.model.info, hooks=frozenset(), offers=frozenset())
        _refused(partial(_default(cls, probe).check, bare), Infeasible, cls.name, "a model without the hook point")


def check_identity(cls: type[Method], probe: Probe) -> None:
    """At ratio 1, and where a method has nothing to do (``Probe.untouched``), the outputs are those of the bare model.

    Bit for bit, or within ``TOLERANCE`` where the family replaces an operator by one that adds up in another order.
    """
    method, default = cls.identity(probe.model.info), _default(cls, probe)
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
            assert difference <= TOLERANCE, f"{case} changes the outputs by {difference:.1e} of the largest"


def check_monotone_cost(cls: type[Method], probe: Probe) -> None:
    """Along the ratio knob the measured cost moves in one direction, and over the whole range it moves."""
    ratio = _ratio_knob(cls)
    if ratio is None:
        return
    ladder = _ladder(cls, probe)
    assert len(ladder) > 1, f"only {len(ladder)} value of {ratio.name} works on the probe's model"
    costs = []
    for method in ladder:
        with method.apply(probe.model, probe.prepared(method, 0)):
            costs.append(probe.cost())
    steps = [b - a for a, b in pairwise(costs)]
    assert all(s >= 0 for s in steps) or all(s <= 0 for s in steps), f"costs along {ratio.name} go up and down: {costs}"
    assert costs[0] != costs[-1], f"costs along {ratio.name} never change: {costs}"


def check_footprint(cls: type[Method], probe: Probe) -> None:
    """``footprint`` gives finite numbers by name, and its ``ratio`` is the measured cost without the method over that with it."""
    bare = probe.cost()
    for method in _ladder(cls, probe) or [_default(cls, probe)]:
        with method.apply(probe.model, probe.prepared(method, 0)):
            cost = probe.cost()  # a pass first: what a method measures, it measures on the last one
            costs = method.footprint(probe.model, probe.ctx)
        for name, value in costs.items():
            assert isinstance(value, (int, float)), f"footprint {name} is a {type(value).__name__}"
            assert math.isfinite(value), f"footprint {name} = {value}"
        if "ratio" in costs:
            assert math.isclose(costs["ratio"], bare / cost, rel_tol=1e-6), (
                f"{method} claims ratio {costs['ratio']:g}; measured are {bare:g} without and {cost:g} with it"
            )


def check_family(cls: type[Method], probe: Probe) -> None:
    """What the family promises besides, see ``Probe.verify``; stored bytes and served values of weight methods."""
    for method in _ladder(cls, probe) or [_default(cls, probe)]:
        prepared = probe.prepared(method, 0)
        with method.apply(probe.model, prepared):
            probe.verify(method, prepared)


def check_restored(cls: type[Method], probe: Probe) -> None:
    """After ``apply`` the model is bit for bit what it was, also when the block raises."""
    method = _default(cls, probe)
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
    method = _default(cls, probe)
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
    method = _default(cls, probe)
    rows = list(range(probe.examples))
    together = _outputs(method, probe, rows)
    alone = torch.cat([_outputs(method, probe, [row]) for row in rows])
    reverse = _outputs(method, probe, rows[::-1]).flip(0)
    scale = float(together.abs().max())
    for name, other in (("alone", alone), ("in reverse order", reverse)):
        difference = float((together - other).abs().max()) / scale
        assert difference <= TOLERANCE, f"examples run {name} differ by {difference:.1e} of the largest output"


def check_knobs_honoured(cls: type[Method], probe: Probe) -> None:
    """Every knob changes outputs, cost or footprint, what is prepared, or what is trained (``Probe.trained``)."""
    for spec in knob_specs(cls).values():
        settings = probe.settings(spec.name) or [{spec.name: value} for value in _candidates(spec)]
        effects = []
        for method in (_with(cls, dict(setting)) for setting in settings):
            if not _feasible(method, probe):
                continue
            effects.append(_effect(method, probe))
            if any(_differ(effects[0], effect) for effect in effects[1:]):
                break
        else:
            tried = ", ".join(str(setting[spec.name]) for setting in settings)
            raise AssertionError(f"knob {spec.name} has no effect between {tried}")


def check_trace(cls: type[Method], probe: Probe) -> None:
    """What the method tells of its inner steps is named series of plain finite numbers."""
    method = _default(cls, probe)
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
    check_family,
    check_restored,
    check_deterministic,
    check_batching,
    check_knobs_honoured,
    check_trace,
)


def fingerprint(value: Any) -> str:
    """A hash of the contents of tensors, modules, dataclasses and containers.

    A method that is part of a prepared value does not count: it holds every knob, used or not.
    """
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Method):
        return
    yield type(value).__name__.encode()
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, nn.Module):
        yield from _parts(value.state_dict())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield repr(value).encode()
    elif hasattr(value, "__dict__"):
        yield from _parts(vars(value))


class Snapshot:
    """Everything a method could leave behind in a model: tensors, hooks, replaced methods, settings, attributes."""

    def __init__(self, model: Any) -> None:
        self._tensors = {name: tensor.clone() for name, tensor in _tensors(model.module).items()}
        self._structure = _structure(model)

    def compare(self, model: Any) -> None:
        """Raise AssertionError when the model differs from the snapshot."""
        tensors = _tensors(model.module)
        assert tensors.keys() == self._tensors.keys(), (
            f"parameters or buffers came or went: {sorted(tensors.keys() ^ self._tensors.keys())}"
        )
        for name, tensor in tensors.items():
            assert torch.equal(tensor, self._tensors[name]), f"tensor {name} changed"
        now = _structure(model)
        changed = [
            key for key in sorted(now.keys() | self._structure.keys()) if now.get(key) != self._structure.get(key)
        ]
        assert not changed, f"left behind: {', '.join(changed[:5])}"


_TABLES = frozenset(vars(nn.Module()))
"""Attributes that every module has: parameters, buffers, hooks and parts, which are compared by themselves."""


class _Interruption(Exception):
    pass


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _structure(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {f"model.{k}": id(v) for k, v in vars(model).items()}
    found["occupied hooks"] = model.occupied
    for name, part in model.module.named_modules():
        found[f"type of {name}"] = type(part)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found[f"{kind} of {name}"] = tuple(getattr(part, kind))
        found[f"training flag of {name}"] = part.training
        own = {k: v for k, v in vars(part).items() if k not in _TABLES}
        found[f"own attributes of {name}"] = tuple(sorted(own))
        found[f"values of {name}"] = {k: v for k, v in own.items() if isinstance(v, (bool, int, float, str))}
        found[f"own forward of {name}"] = id(vars(part).get("forward"))
    found["requires_grad"] = tuple(p.requires_grad for p in model.module.parameters())
    config = getattr(model.module, "config", None)
    if config is not None:
        found["config"] = copy.deepcopy(config.to_dict())
        found["attention implementation"] = getattr(config, "_attn_implementation", None)
    return found


def _ratio_knob(cls: type[Method]) -> KnobSpec | None:
    return next((spec for spec in knob_specs(cls).values() if spec.knob.ratio), None)


def _ladder(cls: type[Method], probe: Probe) -> list[Method]:
    """The method at every value of its ratio knob that works on the probe's model; empty without such a knob."""
    ratio = _ratio_knob(cls)
    if ratio is None:
        return []
    return [m for m in (_with(cls, {ratio.name: v}) for v in _candidates(ratio)) if _feasible(m, probe)]


def _candidates(spec: KnobSpec) -> list[KnobValue]:
    """Values to try: every choice, small whole numbers, or points along a range; ascending."""
    knob = spec.knob
    if knob.choices is not None:
        return list(knob.choices)
    if spec.type is bool:
        return [False, True]
    if spec.many:
        return [spec.default]
    if spec.type is str:
        return [spec.default, f"{spec.default}-other"]
    low = float(knob.low) if knob.low is not None else float(spec.default) - 1
    high = float(knob.high) if knob.high is not None else float(spec.default) + 1
    if spec.knob.step is not None:
        count = int((high - low) / spec.knob.step + 1e-9)
        return [spec.grid_value(n) for n in range(min(count, 40) + 1)]
    if spec.type is int:
        near = range(int(low), int(min(high, low + 40)) + 1)
        return sorted({*near, int(spec.default), int(high)})
    return sorted({low, low + (high - low) / 4, (low + high) / 2, high, float(spec.default)})


def _wrong_values(spec: KnobSpec) -> Iterable[Any]:
    """What a knob must refuse; of a list also each of these as an item."""
    if spec.many:
        yield from ("nonsense", 1, {"a": 1})
        yield from ([wrong] for wrong in _wrong_items(spec))
    else:
        yield from _wrong_items(spec)


def _wrong_items(spec: KnobSpec) -> Iterable[Any]:
    if spec.type is not str:
        yield "nonsense"
        yield [1]
        yield float("nan")
    if spec.knob.choices is not None:
        yield "no-such-choice" if spec.type is str else -12345
    if spec.knob.low is not None:
        yield spec.type(spec.knob.low - 1) if spec.type is int else spec.knob.low - 1.0
    if spec.knob.high is not None:
        yield spec.type(spec.knob.high + 1) if spec.type is int else spec.knob.high + 1.0


def _with(cls: type[Method], knobs: dict[str, KnobValue]) -> Method:
    return cls(**knobs)


def _default(cls: type[Method], probe: Probe) -> Method:
    """The method at its defaults, or at the first feasible value of its ratio knob."""
    method = cls()
    ratio = _ratio_knob(cls)
    if _feasible(method, probe) or ratio is None:
        return method
    return next(m for m in (_with(cls, {ratio.name: v}) for v in _candidates(ratio)) if _feasible(m, probe))


def _feasible(method: Method, probe: Probe) -> bool:
    try:
        method.check(probe.model.info)
    except Infeasible:
        return False
    return True


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


def _refused(call: Callable[[], Any], kind: type[UserError], word: str, what: str) -> None:
    message: str | None = None
    try:
        call()
    except kind as error:
        message = str(error)
    assert message is not None, f"{what} is accepted"
    assert word in message, f"the refusal of {what} does not name {word}: {message}"
    assert "\n" not in message, f"the refusal of {what} is longer than one line"
