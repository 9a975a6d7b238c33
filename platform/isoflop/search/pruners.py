"""Optuna's pruners by the names that a sweep gives them, with their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

import optuna

from isoflop.core.errors import UserError
from isoflop.core.knobs import Knob
from isoflop.search.options import Where, check_options, nowhere
from isoflop.search.quiet import hushed


@dataclass(frozen=True)
class Pruning:
    """What stops hopeless jobs; its knobs are the options of Optuna's class."""

    pruner: ClassVar[type[optuna.pruners.BasePruner]] = optuna.pruners.NopPruner


@dataclass(frozen=True)
class MedianPruning(Pruning):
    """Stops what is worse than the median of earlier trials at the same step."""

    pruner = optuna.pruners.MedianPruner
    n_startup_trials: Annotated[int, Knob(low=0, doc="trials before anything is stopped")] = 5
    n_warmup_steps: Annotated[int, Knob(low=0, doc="steps of a trial before it is stopped")] = 0
    interval_steps: Annotated[int, Knob(low=1, doc="steps between looks")] = 1
    n_min_trials: Annotated[int, Knob(low=1, doc="trials that have reached a step before it is judged")] = 1


@dataclass(frozen=True)
class HyperbandPruning(Pruning):
    """Successive halving in several brackets."""

    pruner = optuna.pruners.HyperbandPruner
    min_resource: Annotated[int, Knob(low=1, doc="steps of the shortest rung")] = 1
    max_resource: Annotated[
        int | None, Knob(low=1, doc="steps of a whole trial; by default as the first trials have")
    ] = None
    reduction_factor: Annotated[int, Knob(low=2, doc="one of so many goes on")] = 3
    bootstrap_count: Annotated[int, Knob(low=0, doc="trials that a rung must have seen")] = 0


@dataclass(frozen=True)
class WilcoxonPruning(Pruning):
    """Stops what the signed-rank test finds worse than the best trial, example for example."""

    pruner = optuna.pruners.WilcoxonPruner
    p_threshold: Annotated[float, Knob(low=0.0, high=1.0, doc="of the test")] = 0.1
    n_startup_steps: Annotated[int, Knob(low=0, doc="steps before the first test")] = 2


PRUNERS: dict[str, type[Pruning]] = {
    "none": Pruning,
    "median": MedianPruning,
    "hyperband": HyperbandPruning,
    "wilcoxon": WilcoxonPruning,
}


@hushed()
def make_pruner(name: str, options: Mapping[str, Any], where: Where = nowhere) -> optuna.pruners.BasePruner:
    """Optuna's own pruner by its short name.

    Raises:
        UserError: an option that it does not take, or a value that it does not take.
    """
    kind = PRUNERS[name]
    given = kind(**check_options(kind, options, f"pruner {name}", "pruner_options", where, kind.pruner))
    try:
        return kind.pruner(**changed(given))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where('pruner_options')}: {name}: {error}") from None


def changed(given: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as they are by default: the rest is left to Optuna."""
    plain = type(given)()
    return {name: value for name, value in asdict(given).items() if value != getattr(plain, name)}
