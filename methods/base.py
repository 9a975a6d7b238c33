"""The contract of a compression method: knobs, ``prepare``, ``apply``, ``footprint``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import KnobSpec, KnobValue, check_knobs, knob_specs
from isoflop.core.registry import Registry
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Model, ModelInfo

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


ADDITIVE_COSTS = frozenset({"method_params", "method_bytes"})
"""Keys of footprints that the methods of a composition share: parameters, and bytes of everything that a method keeps."""


@dataclass(frozen=True)
class Method:
    """Base class of methods: a frozen dataclass whose ``Knob`` fields are the method's hyper-parameters.

    Class attributes:
        name: set by registration.
        family: the family's name; set by the family base class, which also owns the hook point.
        version: part of every job id; raise it when the same knobs would compute something else.
        paper: reference, e.g. "arXiv 2411.03312".
        needs: hook points and capabilities that the model must offer (``ModelInfo.hooks``).
        order: methods of one trial are applied in ascending order: weights 0, tokens inside the vision tower 5,
            visual tokens 10, tokens between decoder layers 20, neurons of the feed-forward blocks 25, KV cache and
            attention 30.
        trains_model: takes part in training a model family that is trained here.
        asked_by_task: acts, or is measured, only where the task asks for what stands in its slot (``Task.asks``).
        slot: the place in the model that the method takes for itself; a trial has at most one method per slot; ""
            where methods of a family can be applied together.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    order: ClassVar[int] = 0
    trains_model: ClassVar[bool] = False
    asked_by_task: ClassVar[bool] = False
    slot: ClassVar[str] = ""

    def knobs(self) -> dict[str, KnobValue]:
        """All knob values, defaults included."""
        return {name: getattr(self, name) for name in knob_specs(type(self))}

    def spec(self) -> dict[str, Any]:
        """What names this method in a job id: name, version and every knob."""
        return {"name": self.name, "version": self.version, "knobs": self.knobs()}

    def as_trained(self) -> Method:
        """The configuration that takes part in training a model, and that other methods calibrate behind.

        Equal for all values of a knob that acts at inference only, so that one training serves them all.
        """
        return self

    @classmethod
    def identity(cls, info: ModelInfo) -> Method | None:
        """The configuration that leaves the model's outputs exactly as they are (ratio 1), or None where there is none."""
        return None

    @classmethod
    def probe(cls) -> Probe:
        """What the conformance suite (``isoflop.testing.check_method``) runs the method on; given by the family's base class."""
        raise NotImplementedError(
            f"family {cls.family!r} of method {cls.name!r} gives no probe: override Method.probe in its base class"
        )

    def check(self, info: ModelInfo) -> None:
        """Raise Infeasible when this configuration cannot work on the model; names the knob and what would work."""
        missing = self.needs - info.hooks
        if missing:
            raise Infeasible(
                f"method {self.name} needs {', '.join(sorted(missing))}, which model {info.ref} does not offer (it offers: {', '.join(sorted(info.hooks)) or 'nothing'})"
            )

    def check_prompt(self, tokens: int, task: str) -> None:
        """Raise Infeasible when this configuration would keep nothing of prompts of ``tokens`` tokens in ``task``."""

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage that trains or calibrates this method for a model, or None when nothing is needed.

        Args:
            weights: the stage that trains the model, or None for a checkpoint.
            trained_with: methods of the trial with ``trains_model``: what calibrates on the model applies them first
                (see ``isoflop.methods.calibration``). Other methods of a composition are not seen here, so that
                one calibration serves every combination.
        """
        return None

    @contextmanager
    def apply(self, model: Model, prepared: Any) -> Iterator[None]:
        """Compress ``model`` inside the ``with`` block and leave it exactly as it was.

        Args:
            prepared: the value of the ``prepare`` stage, or None.
        """
        raise NotImplementedError
        yield

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Costs only the method knows of (bytes of scales, indices, masks; extra parameters), measured while applied.

        In a composition the keys in ``ADDITIVE_COSTS`` are summed over the methods; of every other key a trial may hold
        one, and none that the task measures (``flops``, ``seconds`` …). ``ratio`` is the cost without the method over
        the cost with it. In a composition each family's ratio has a name of its own (``ratio_kv_cache`` …), and the
        row's ratio is that of all bytes (weights and cache), dense over compressed.
        """
        return {}

    def trace(self, prepared: Any) -> Mapping[str, Sequence[float]]:
        """What went on inside ``prepare``, for whoever watches: named series, one value per inner step, counted from 0.

        Steps are a search's generations, a training's updates … Rows keep an even selection of a long series (see
        ``isoflop.ledger.schema``), and MLflow shows each series as the metric ``trace/<name>``.

        Args:
            prepared: the value of the ``prepare`` stage, or None.
        """
        return {}


METHODS: Registry[type[Method]] = Registry("method", ("isoflop.methods",))


def build(name: str, knobs: Mapping[str, Any], where: str = "") -> Method:
    """The method called ``name`` with checked knobs; a UserError names the nearest method or knob otherwise."""
    cls = METHODS.get(name, where)
    return cls(**check_knobs(cls, knobs, f"method {name}", where))


def method_knobs(name: str) -> dict[str, KnobSpec]:
    """The knobs of a registered method."""
    return knob_specs(METHODS.get(name))
