"""Which axes of a law the configurations of a sweep plan, where its YAML does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from isoflop.search import Config, SearchSpace
from isoflop.search.law.axes import AxisSpec

_TOKENS = ("k", "tokens")  # knobs that are taken to count visual tokens


def axes_of(trial: Config) -> dict[str, float]:
    """What a configuration plans: axis -> value, of every axis beside the model's size."""
    counts = [v for name, v in sorted(trial.items()) if name.rsplit(".", 1)[-1] in _TOKENS]
    found = [float(v) for v in counts if isinstance(v, (int, float))]
    return {"V": found[0]} if found else {}


@dataclass(frozen=True)
class PlannedAxis:
    """One axis of :func:`axes_of`; nan where a configuration does not plan it."""

    axis: str

    def __call__(self, config: Mapping[str, object]) -> float:
        return axes_of(dict(config)).get(self.axis, float("nan"))  # type: ignore[arg-type]


def planned_axes(space: SearchSpace, sizes: Mapping[str, float]) -> dict[str, AxisSpec]:
    """Readers for a law's axes: N, and what any configuration of the space plans.

    Args:
        sizes: model -> N.
    """
    knobs = {p.name for branch in space.branches for p in branch.params}
    names = axes_of(dict.fromkeys(knobs, 1.0))
    return {"N": {"model": dict(sizes)}, **{name: PlannedAxis(name) for name in names}}
