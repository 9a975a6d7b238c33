"""What the configurations of a sweep plan, axis by axis: read off its methods (``Method.axes``), never off names of knobs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoflop.core.errors import UserError
from isoflop.methods.base import Method, build, in_turn
from isoflop.models.base import ModelInfo
from isoflop.models.family import family_of
from isoflop.search import Config, Param
from isoflop.search.law.axes import AxisSpec
from isoflop.sweep.resolved import Sweep

_TRIED = 256  # points of a branch that are looked at for one that works
_RUNGS = 17  # of a range
_VISUAL = ("V", "layer_visual_tokens")


def axes_of(info: ModelInfo, methods: Iterable[Method]) -> dict[str, float]:
    """What methods together plan on a model, by axis.

    They are asked in the order of their hooks: what one leaves of the visual tokens is what the next one starts from.
    Ratios and bits of several methods are in units of their own, and are left out.

    Raises:
        Infeasible: one of them cannot work on the model.
    """
    found: list[dict[str, float]] = []
    now = info  # with the tokens that the methods before have left
    for method in sorted(in_turn(list(methods)), key=lambda method: method.order()):
        planned = method.axes(now).named()
        method.check(info)
        if "V" in planned and "visual_tokens" in info.geometry:
            now = dataclasses.replace(now, geometry={**now.geometry, "visual_tokens": round(planned["V"])})
        found.append(planned)
    visual = {name: value for planned in found for name, value in planned.items() if name in _VISUAL}
    return found[0] if len(found) == 1 else visual


class Planned:
    """What the configurations of a sweep plan, each looked up once: searches ask for thousands, again and again."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._known: dict[tuple[tuple[str, object], ...], dict[str, float]] = {}

    def of(self, config: Config) -> dict[str, float]:
        """Axes of a configuration; none of one that cannot work."""
        key = tuple(sorted(config.items()))
        if key not in self._known:
            try:
                self._known[key] = planned_by(self._sweep, config)
            except UserError:
                self._known[key] = {}
        return self._known[key]


@dataclass(frozen=True)
class PlannedAxis:
    """One axis of a sweep's configurations; nan where a configuration does not plan it."""

    planned: Planned
    axis: str

    def __call__(self, config: Mapping[str, Any]) -> float:
        return self.planned.of(dict(config)).get(self.axis, math.nan)


def planned_by(sweep: Sweep, config: Config) -> dict[str, float]:
    """What a configuration of a sweep plans, by axis.

    Raises:
        Infeasible: it cannot work.
    """
    ref = str(config["model"])
    options = next(m.options for m in sweep.spec.models if m.ref == ref)
    methods = [build(method.name, dict(method.knobs)) for method in sweep.methods_of(config)]
    return axes_of(family_of(ref).info(ref, options), methods)


def planned_axes(sweep: Sweep, sizes: Mapping[str, float]) -> dict[str, AxisSpec]:
    """Readers of configurations: N, and what any branch of the space plans.

    Args:
        sizes: model -> N.
    """
    planned = Planned(sweep)
    names = sorted({name for config in _examples(sweep) for name in planned.of(config)})
    sizes_of: dict[str, AxisSpec] = {"N": {"model": dict(sizes)}}
    return {**sizes_of, **{name: PlannedAxis(planned, name) for name in names}}


def _examples(sweep: Sweep) -> Iterator[Config]:
    """Of every branch, the first point that works on one of the models."""
    for branch in sweep.space.branches:
        points = itertools.product(sweep.space.models, *(_values(param) for param in branch.params))
        for model, *point in itertools.islice(points, _TRIED * len(sweep.space.models)):
            knobs = dict(zip((param.name for param in branch.params), point, strict=True))
            config: Config = {"model": model, "method": branch.label, **knobs}
            try:
                planned_by(sweep, config)
            except UserError:
                continue
            yield config
            break


def _values(param: Param) -> tuple[Any, ...]:
    """Values of a parameter that stand for all of them."""
    if param.values is not None:
        return param.values
    assert param.low is not None
    assert param.high is not None
    if param.step is not None:
        rungs = min(_RUNGS - 1, round((param.high - param.low) / param.step))
        return tuple(
            param.spelled(value) for value in (*(param.low + n * param.step for n in range(rungs)), param.high)
        )
    between = np.linspace(param.low, param.high, _RUNGS)
    return tuple(dict.fromkeys(round(x) for x in between)) if param.integer else tuple(between.tolist())
