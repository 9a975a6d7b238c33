"""From a validated spec to what can be searched and run: names looked up, knobs turned into a space, points into jobs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from isoflop.core.errors import Infeasible, UserError, unknown
from isoflop.core.hashing import content_hash
from isoflop.core.knobs import (
    LARGEST_COUNTED,
    KnobSpec,
    frozen,
    grid_value,
)
from isoflop.core.public import look_beside
from isoflop.core.yaml_source import KeyPath, Source
from isoflop.jobs import ResolvedJob
from isoflop.methods.base import METHODS, method_knobs
from isoflop.search import Branch, Config, Param, SearchSpace, Zip
from isoflop.search.space import MAX_GRID, Exclusion, Value
from isoflop.sweep import columns
from isoflop.sweep.blocks import KnobEntry, MethodEntry
from isoflop.sweep.calibrations import PARAMETER, calibrations, compared
from isoflop.sweep.named import check_models, check_tasks, task_options
from isoflop.sweep.resolved import Sweep, knob_prefix
from isoflop.sweep.searching import check_problem, find_strategy
from isoflop.sweep.spec import SweepSpec, import_modules, load_spec
from isoflop.tasks.base import task_class

_CHECKED_POINTS = 20_000  # of a grid; impossible points beyond become rows


def resolve(given: Any) -> Sweep:
    """Load and resolve a spec (path or dict). Raises UserError for anything that can be known before a job runs."""
    spec, source = load_spec(given)
    look_beside(source.folder)
    import_modules(spec, source)
    branches, methods = [], {}
    zips = _zips(spec, source)
    zipped = {path for z in zips for path in z.paths}
    for index, composition in enumerate(spec.methods):
        label = "+".join(m.name for m in composition)
        params: list[Param] = []
        for position, method in enumerate(composition):
            path: KeyPath = ("methods", index) if len(composition) == 1 else ("methods", index, position)
            params.extend(_params(method, knob_prefix(label, position), path, source, zips))
        branches.append(Branch(label, tuple(params)))
        methods[label] = tuple(m.name for m in composition)
    check_models(spec, source)
    texts = calibrations(spec, source)
    branches = compared(branches, methods, texts)
    tasks = task_options(spec, source)
    check_tasks(spec, tasks, source)
    columns.check(spec, source, {name: task_class(name)(**options) for name, options in tasks.items()})
    strategy = find_strategy(spec, source)
    space = SearchSpace(tuple(m.ref for m in spec.models), tuple(branches), zips, _excludes(spec, source, branches))
    _check_zips(spec, source, space, zipped)
    sweep = Sweep(spec, source, strategy, space, tasks, methods, texts)
    _check_grid(sweep)
    check_problem(sweep)
    return sweep


def _params(method: MethodEntry, prefix: str, path: KeyPath, source: Source, zips: tuple[Zip, ...]) -> list[Param]:
    """The choices that a sweep leaves open in one method, each after those that its ``when`` refers to."""
    params = {p.name: p for p in _declared(method, prefix, path, source, zips)}
    specs = method_knobs(method.name)
    for name in [other for p in list(params.values()) for other, _ in p.when]:
        if name not in params:  # the sweep says nothing of it, so it keeps its default
            default = specs[name.removeprefix(prefix)].default
            params[name] = Param(name, (default,), default=default)
    params = {p.name: replace(p, when=_spelled_conditions(p, params)) for p in params.values()}
    ordered: list[Param] = []
    while params:
        ready = [p for p in params.values() if not any(other in params for other, _ in p.when)]
        if not ready:
            place = source.where((*path, method.name))
            raise UserError(
                f"{place}: the when of {' and '.join(n.removeprefix(prefix) for n in params)} refer to each other"
            )
        ordered += ready
        for param in ready:
            del params[param.name]
    return ordered


def _spelled_conditions(param: Param, params: Mapping[str, Param]) -> tuple[tuple[str, tuple[Value, ...]], ...]:
    """Conditions in the spelling of the parameters that they look at."""
    return tuple((other, tuple(params[other].spelled(v) for v in allowed)) for other, allowed in param.when)


def _declared(
    method: MethodEntry, prefix: str, path: KeyPath, source: Source, zips: tuple[Zip, ...]
) -> Iterator[Param]:
    where = source.where(path)
    METHODS.get(method.name, where)
    specs = method_knobs(method.name)
    here: KeyPath = (*path, method.name)
    for name in method.knobs:
        if name not in specs:
            raise unknown(f"knob of method {method.name}", name, specs, source.where((*here, name)))
    zip_values = {p: tuple(dict.fromkeys(v for row in z.rows for q, v in row if q == p)) for z in zips for p in z.paths}
    for name, spec in specs.items():
        full = prefix + name
        entry = method.knobs.get(name)
        place = source.where((*here, name))
        if full in zip_values:
            if entry is not None:
                raise UserError(f"{place}: {full} gets its values from zip; remove one of the two")
            yield Param(full, tuple(spec.check(v, source.where(("zip",))) for v in zip_values[full]))
        elif entry is not None:
            yield _param(full, spec, entry, prefix, specs, place, method.name)
        elif spec.required:
            raise UserError(
                f"{source.where(here)}: method {method.name} needs a value for {name}; allowed: {spec.describe()}"
            )


def _param(
    full: str, spec: KnobSpec, entry: KnobEntry, prefix: str, specs: Mapping[str, KnobSpec], place: str, method: str
) -> Param:
    when = []
    for other, allowed in entry.when.items():
        if other not in specs:
            raise unknown(f"knob of method {method}", other, specs, f"{place}.when")
        listed = specs[other].values_of(allowed)
        when.append((prefix + other, tuple(specs[other].check(v, f"{place}.when") for v in listed)))
    default = None if spec.required else spec.default
    if when and default is None:
        raise UserError(f"{place}: {spec.name} has no default to take when its condition does not hold")
    common: dict[str, Any] = {"when": tuple(when), "default": default}
    if entry.values is not None:
        listed = spec.values_of(entry.values)
        values = tuple(spec.check(v, place) for v in listed)
        if len({content_hash(v) for v in values}) < len(values):
            raise UserError(f"{place}: the list names a value twice: {list(listed)}")
        return Param(full, values, **common)
    bounds = entry.low is not None or entry.high is not None or entry.step is not None or entry.log is not None
    if entry.value is not None:
        if bounds:
            raise UserError(f"{place}: give a value or a range, not both")
        return Param(full, (spec.check(entry.value, place),), **common)
    return _range(full, spec, entry, place, common)


def _range(full: str, spec: KnobSpec, entry: KnobEntry, place: str, common: dict[str, Any]) -> Param:
    """A range given in the YAML, completed by the method's own declaration."""
    if spec.type is bool and not spec.many:
        return Param(full, (False, True), **common)
    if spec.knob.choices is not None:
        return Param(full, _choices_within(spec, entry, place), **common)
    if spec.many:
        raise UserError(f"{place}: {spec.name} is a list and has no range; give one list, or a list of lists")
    if spec.type is str:
        raise UserError(f"{place}: {spec.name} is text and has no range; give a value or a list")
    knob = spec.knob
    low = entry.low if entry.low is not None else knob.low
    high = entry.high if entry.high is not None else knob.high
    if low is None or high is None:
        raise UserError(f"{place}: {spec.name} needs low and high; the method declares {spec.describe()}")
    if knob.step is not None and not (spec.type is int and knob.step == 1):
        return _stepped(full, spec, entry, (low, high), place, common)
    spec.check(low, place)
    spec.check(high, place)
    if low > high:
        raise UserError(f"{place}: the range from {low:g} to {high:g} is empty; allowed: {spec.describe()}")
    log = (knob.log and entry.step is None) if entry.log is None else entry.log
    if log and low <= 0:
        whose = "the method's own low" if entry.low is None else "low"
        raise UserError(f"{place}: a log range must begin above 0, and {whose} of {spec.name} is {low:g}; give low")
    if spec.type is int and max(-low, high) > LARGEST_COUNTED:
        raise UserError(
            f"{place}: a range of whole numbers ends at {LARGEST_COUNTED:,} (2^53), the last that samplers tell apart; "
            f"{spec.name} goes from {low:g} to {high:g}: give a narrower range or a list"
        )
    step = entry.step
    if not math.isfinite((float(high) - float(low)) / (step or 1)):
        raise UserError(f"{place}: the range from {low:g} to {high:g} is too wide; allowed: {spec.describe()}")
    if spec.type is int and step is not None and step != int(step):
        raise UserError(f"{place}: the step of {spec.name}, a whole number, cannot be {step:g}")
    return Param(full, None, low, high, step, log, spec.type is int, **common)


def _choices_within(spec: KnobSpec, entry: KnobEntry, place: str) -> tuple[Value, ...]:
    """The choices of a knob that lie between the bounds that a YAML gives."""
    low, high = entry.low, entry.high
    if (spec.many or spec.type is str) and (low, high) != (None, None):
        kind = "a list" if spec.many else "one of several words"
        raise UserError(f"{place}: {spec.name} is {kind} and has no bounds; allowed: {spec.describe()}")
    values = tuple(
        c
        for c in spec.knob.choices or ()
        if isinstance(c, (str, tuple)) or ((low is None or c >= low) and (high is None or c <= high))
    )
    if not values:
        raise UserError(f"{place}: no allowed value of {spec.name} lies in this range; allowed: {spec.describe()}")
    return values


def _stepped(
    full: str, spec: KnobSpec, entry: KnobEntry, bounds: tuple[float, float], place: str, common: dict[str, Any]
) -> Param:
    """A range over a knob with a step: its values are values of the knob's own grid, all or every n-th of them."""
    step = spec.knob.step
    assert step is not None
    if entry.log:
        raise UserError(f"{place}: {spec.name} has steps of {step:g}, and a range over steps cannot be log")
    times = 1.0 if entry.step is None else entry.step / step
    if round(times) < 1 or abs(times - round(times)) > 1e-6:
        raise UserError(
            f"{place}: the step {entry.step:g} of {spec.name} is no multiple of its own; "
            f"allowed: {spec.describe()}; nearest: {max(1, round(times)) * step:g}"
        )
    spec.check(bounds[0], place)
    origin = spec.knob.low or 0
    first = round((bounds[0] - origin) / step)
    count = math.floor((bounds[1] - origin) / step + 1e-6) - first
    last = first + count // round(times) * round(times)
    if count < 0 or (spec.knob.high is not None and bounds[1] > spec.knob.high):
        raise UserError(
            f"{place}: the range from {bounds[0]:g} to {bounds[1]:g} is empty or too wide; allowed: {spec.describe()}"
        )
    low, high = spec.grid_value(first), spec.grid_value(last)
    every = grid_value(0, step, round(times), spec.type is int)
    return Param(full, None, low, high, every, False, spec.type is int, spelling=(origin, step), **common)


def _zips(spec: SweepSpec, source: Source) -> tuple[Zip, ...]:
    """The zip blocks with their values in the knobs' types; :func:`_check_zips` says what is wrong with the rest."""
    knobs = {}
    for composition in spec.methods:
        label = "+".join(m.name for m in composition)
        for position, method in enumerate(composition):
            if method.name in METHODS:
                knobs.update({knob_prefix(label, position) + n: s for n, s in method_knobs(method.name).items()})
    out = []
    for index, block in enumerate(spec.zip):
        where = source.where(("zip", index))
        for path in (p for p in block if p not in knobs):  # a model or a method, or a name that does not exist
            if wrong := [v for v in block[path] if isinstance(v, (Mapping, list, tuple))]:
                raise UserError(
                    f"{source.where(('zip', index, path))}: {wrong[0]!r} is no value; allowed: names of a {path}"
                )
        typed = {
            path: [knobs[path].check(v, where) if path in knobs else v for v in values]
            for path, values in block.items()
        }
        rows = tuple(tuple(zip(typed, row, strict=True)) for row in zip(*typed.values(), strict=False))
        if rows:
            out.append(Zip(f"zip{index}", rows))
    return tuple(out)


def _check_zips(spec: SweepSpec, source: Source, space: SearchSpace, zipped: set[str]) -> None:
    params = {p.name: p for b in space.branches for p in b.params}
    known = {"model", "method", *params}
    for index, block in enumerate(spec.zip):
        where = source.where(("zip", index))
        if len(block) < 2:
            raise UserError(f"{where}: a zip block couples two or more parameters; this one has {len(block)}")
        lengths = {path: len(values) for path, values in block.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(
                f"{where}: lists that move together must be equally long; lengths: "
                + ", ".join(f"{p} {n}" for p, n in lengths.items())
            )
        if 0 in lengths.values():
            raise UserError(f"{where}: the lists are empty")
        for path, values in block.items():
            if path not in known:
                raise unknown("parameter", path, known, where)
            if path == PARAMETER:
                texts = params[path].values or ()
                for value in (v for v in values if v not in texts):
                    raise unknown("text of this sweep", str(value), map(str, texts), f"{where}: {path}")
            for fixed, options in (("model", space.models), ("method", tuple(b.label for b in space.branches))):
                if path != fixed:
                    continue
                for value in values:
                    if value not in options:
                        raise unknown(f"{fixed} of this sweep", value, options, f"{where}: {path}")
                if left := [o for o in options if o not in values]:
                    raise UserError(
                        f"{where}: {path} {left[0]!r} stands in no row of the block, so it would never run; add it or remove it from {path}s"
                    )
    if len(zipped) < sum(len(block) for block in spec.zip):
        raise UserError(f"{source.where(('zip',))}: a parameter stands in two zip blocks")


def _excludes(spec: SweepSpec, source: Source, branches: list[Branch]) -> tuple[Exclusion, ...]:
    params = {p.name: p for b in branches for p in b.params}
    known = {"model": tuple(m.ref for m in spec.models), "method": tuple(b.label for b in branches)}
    out = []
    for index, block in enumerate(spec.exclude):
        rule = []
        for path, values in block.items():
            where = source.where(("exclude", index, path))
            if path not in params and path not in known:
                raise unknown("parameter", path, [*known, *params], where)
            listed = _listed(values, params.get(path))
            for value in listed:
                if path in known and value not in known[path]:
                    raise unknown(f"{path} of this sweep", value, known[path], where)
                if path in params and not params[path].contains(value):
                    raise UserError(f"{where}: {path} never takes the value {value!r} in this sweep")
            rule.append((path, listed))
        if not rule:
            raise UserError(f"{source.where(('exclude', index))}: an empty block would exclude everything")
        out.append(tuple(rule))
    return tuple(out)


def _listed(values: Any, param: Param | None) -> tuple[Value, ...]:
    """What an ``exclude`` names: one value or several; of a knob that is a list, a list is one."""
    if not isinstance(values, (list, tuple)):
        return (values if param is None else param.spelled(values),)
    whole = param is not None and any(isinstance(v, tuple) for v in param.values or ())
    one = whole and not any(isinstance(v, (list, tuple)) for v in values)
    listed = (frozen(values),) if one else frozen(values)
    return listed if param is None else tuple(param.spelled(v) for v in listed)


def _check_grid(sweep: Sweep) -> None:
    """In a grid every point will run, so an impossible one is an error now; samplers meet impossible points as they go."""
    if not sweep.strategy.exhaustive:
        corners: list[Config] = []
        for branch in sweep.space.branches:
            if all(p.values is not None and len(p.values) == 1 for p in branch.params):
                corners.extend(
                    {"model": m, "method": branch.label, **{p.name: _only(p) for p in branch.params}}
                    for m in sweep.space.models
                )
        points: Any = corners
    else:
        for index, branch in enumerate(sweep.space.branches):
            for param in branch.params:
                try:
                    param.grid()
                except UserError as error:
                    raise UserError(f"{sweep.source.where(('methods', index))}: {error}") from None
        points = sweep.space.grid()
    count = 0
    for config in points:
        count += 1
        if count > MAX_GRID:
            raise UserError(
                f"{sweep.source.where(('methods',))}: the grid has more than {MAX_GRID:,} points; make it coarser or choose another search.sampler"
            )
        if count > _CHECKED_POINTS:
            continue
        for job in sweep.jobs_of(config)[: len(sweep.task_options)]:
            try:
                ResolvedJob.of(job)
            except Infeasible as error:
                place = next((i for i, b in enumerate(sweep.space.branches) if b.label == config["method"]), 0)
                raise UserError(
                    f"{sweep.source.where(('methods', place))}: {error}; leave it out with exclude: {_hint(config)}"
                ) from None
    if not count and sweep.strategy.exhaustive:
        raise UserError(f"{sweep.source.where(('exclude',))}: nothing is left to run; every combination is excluded")


def _only(param: Param) -> Value:
    assert param.values is not None
    return param.values[0]


def _hint(config: Config) -> str:
    knobs = ", ".join(f"{k}: {v}" for k, v in config.items() if k not in ("model", "method"))
    return "{" + f"model: {config['model']}, " + (knobs or f"method: {config['method']}") + "}"
