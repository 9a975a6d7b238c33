"""The contract of a compression method: knobs, hooks, ``prepare``, ``occupants``, ``footprint``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from isoflop.core.errors import UserError
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import KnobSpec, KnobValue, check_knobs, knob_specs, without_newer
from isoflop.core.registry import Registry
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint, Model, ModelInfo
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.training.taught import InTraining, Teacher, in_its_hooks

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


ADDITIVE_COSTS = frozenset({"method_params", "method_bytes", "training_seconds"})
"""Keys of footprints that the methods of a composition share: parameters, bytes of everything that a method keeps, what trainings took."""


@dataclass(frozen=True)
class Axes:
    """What a configuration plans; None where it plans nothing of the kind. Overheads are measured later, in rows.

    Attributes:
        visual_tokens: V of each decoder layer of a vision-language model, the one that enters it first, or one number for all.
        bits: per weight, or per element of the cache, without scales and masks.
        bytes: per example, of codecs.
        ratio: dense over planned cost, in the unit of the method's family.
    """

    visual_tokens: tuple[float, ...] | float | None = None
    bits: float | None = None
    bytes: float | None = None
    ratio: float | None = None

    @property
    def V(self) -> float | None:
        """Visual tokens that enter the decoder, which is what rows call V."""
        return self.visual_tokens[0] if isinstance(self.visual_tokens, tuple) else self.visual_tokens

    @property
    def layer_visual_tokens(self) -> float | None:
        """Mean over the decoder's layers, where they differ."""
        return sum(self.visual_tokens) / len(self.visual_tokens) if isinstance(self.visual_tokens, tuple) else None

    def named(self) -> dict[str, float]:
        """What is planned, by the names that laws and rows use."""
        found = {
            "V": self.V, "layer_visual_tokens": self.layer_visual_tokens,
            "bits": self.bits, "bytes": self.bytes, "ratio": self.ratio,
        }  # fmt: skip
        return {name: float(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Method:
    """Base class of methods: a frozen dataclass whose ``Knob`` fields are the method's hyper-parameters.

    Class attributes:
        name: set by registration.
        family: the family's name; set by the family base class, which also owns the hooks' algorithms.
        version: part of every job id; raise it when the same knobs would compute something else.
        paper: reference, e.g. "arXiv 2411.03312".
        hooks: the places in the model that the method takes, each for itself: a trial has one method per hook, or two of
            which one can act on what the other leaves (``over``). Methods of a trial are applied in the order of their
            first hooks.
        sharing: which pairs may share a hook, in words, behind "a trial has one method there, or …".
        needs: what the model must offer besides its hooks (``ModelInfo.offers``).
        ratio_of: what ``ratio`` compares, dense over compressed, in a few words ("visual tokens").
        ratio_bytes: keys of a footprint, dense and compressed, where that is bytes which the task measures for a whole answer;
            tables and reports then compare these (:mod:`isoflop.sweep.compression`).
        trains_model: takes part in training a model family that is trained here. A family that cannot train with one
            of its hooks occupied refuses it at plan (``ModelFamily.trainable``).
        calibrates: ``prepare`` reads the model's calibration examples, so that a sweep's ``calibration`` is part of its jobs.
        learns_behind: hooks whose methods, of the same trial, are in place when this one's preparation runs (``prepare_behind``).
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = ""
    hooks: ClassVar[tuple[Hook[Any], ...]] = ()
    sharing: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    ratio_of: ClassVar[str] = ""
    ratio_bytes: ClassVar[tuple[str, str] | None] = None
    trains_model: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    learns_behind: ClassVar[frozenset[Hook[Any]]] = frozenset()

    def knobs(self) -> dict[str, KnobValue]:
        """All knob values, defaults included."""
        return {name: getattr(self, name) for name in knob_specs(type(self))}

    def as_field(self) -> tuple[str, str, tuple[tuple[str, KnobValue], ...]]:
        """What names this method in the key of a stage that holds it: name, version and every knob (newer ones if they differ)."""
        return self.name, self.version, tuple(sorted(without_newer(type(self), self.knobs()).items()))

    @classmethod
    def order(cls) -> int:
        """Of application within a trial: that of the first hook."""
        return min((hook.order for hook in cls.hooks), default=0)

    def as_trained(self) -> Method:
        """The configuration that takes part in training a model, and that other methods calibrate behind.

        Equal for all values of a knob that acts at inference only, so that one training serves them all.
        """
        return self

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the method's own weights, where they are trained."""
        return 1e-3

    @property
    def teacher(self) -> Teacher | None:
        """Whom the training of a model with the method in place follows besides the targets; nobody by default."""
        return None

    @property
    def special_training(self) -> bool:
        """Whether a training must know more of the method than its occupants and weights: teacher, extra loss, what learns."""
        cls = type(self)
        return self.teacher is not None or cls.extra_loss is not Method.extra_loss or cls.trains is not Method.trains

    def untrained(self, info: Any, seed: int) -> nn.Module | None:
        """The method's own weights as they are before training, or None where it has none; ``build`` under a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("compressor", self.name, seed))
            return self.build(info)

    def build(self, info: Any) -> nn.Module | None:
        """A freshly initialised module with the method's weights, or None. Randomness comes from torch's global state."""
        return None

    def trains(self, parameter: str) -> bool:
        """Whether a parameter of the model, by its name in the module, learns while the method takes part in its training."""
        return True

    def at_step(self, step: int, seed: int) -> Self:
        """What acts in one step of the training; elastic methods draw their budget here."""
        return self

    def budgets(self, step: int, steps: int, seed: int) -> Sequence[tuple[float, Self]]:
        """All that acts in one step of the training: configurations with their weights in the loss.

        One by default. Nested and Matryoshka losses give several; a schedule over the training gives another one as
        ``step`` of ``steps`` goes on.
        """
        return ((1.0, self.at_step(step, seed)),)

    def extra_loss(self, model: Model, occupants: Mapping[Hook[Any], Occupant]) -> Tensor | None:
        """Added to the loss of a training behind a pass with the method's occupants in place; None by default."""
        return None

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

    def axes(self, info: ModelInfo) -> Axes:
        """What this configuration plans on a model, known before anything runs; law search, plans and costs read it.

        Raises:
            Infeasible: it cannot work on the model.
        """
        return Axes()

    def check(self, info: ModelInfo) -> None:
        """Raise Infeasible when this configuration cannot work on the model; names the knob and what would work."""
        info.check_offers(f"method {self.name}", self.hooks, self.needs)

    def idle(self, info: ModelInfo) -> bool:
        """Whether the method has nothing to act on in the model and is the same as none; then it takes part in no training."""
        return False

    def check_prompt(self, tokens: int, task: str) -> None:
        """Raise Infeasible when this configuration would keep nothing of prompts of ``tokens`` tokens in ``task``."""

    def tokens_before(self, info: ModelInfo) -> int:
        """Positions that the method takes before every input, whatever it is; 0 for most."""
        return 0

    def check_room(self, info: ModelInfo, tokens: int, task: str) -> None:
        """Raise Infeasible when the model has no room for what the method adds to prompts of ``tokens`` tokens in ``task``."""

    def check_beside(self, others: Sequence[Method], info: ModelInfo) -> None:
        """Raise Infeasible when this method cannot work together with another one of the trial, which takes other hooks.

        Each method of a trial is asked about the others, so that one of a pair may say it for both.
        """

    def over(self, other: Method) -> Method | None:
        """One method that does what ``other`` does and then, on what that leaves, this; None where they cannot share a hook.

        Asked only of methods of a trial that take the same hook, in either order.
        """
        return None

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage that trains or calibrates this method for a model, or None when nothing is needed.

        By default that of the model, where the method took part in its training.

        Args:
            weights: the stage that trains the model, or None for a checkpoint.
            trained_with: methods of the trial with ``trains_model``: what calibrates on the model applies them first
                (see ``isoflop.methods.calibration``). Other methods of a composition are not seen here, so that
                one calibration serves every combination.
        """
        trained = weights is not None and any(method.name == self.name for method in trained_with)
        return weights if trained else None

    def prepare_behind(
        self,
        info: ModelInfo,
        weights: Stage | None,
        seed: int,
        trained_with: tuple[Method, ...],
        behind: tuple[tuple[Method, Stage | None], ...],
    ) -> Stage | None:
        """``prepare`` for a method that learns through what others of the trial have made of the model; by default it does not.

        Args:
            behind: the trial's methods in the hooks of ``learns_behind``, with their stages, in the order of application.
        """
        return self.prepare(info, weights, seed, trained_with)

    def module_of(self, model: Model, prepared: Any) -> nn.Module | None:
        """The method's own weights for ``occupants``; None where it has none.

        Args:
            prepared: a ``Checkpoint`` with ``<name>.safetensors``, a module, ``InTraining``, or None.

        Raises:
            ValueError: it has weights, and they are not given.
        """
        if isinstance(prepared, InTraining):
            return prepared.module
        module = prepared if isinstance(prepared, nn.Module) else self.untrained(model.info, 0)
        if module is not None and not isinstance(prepared, nn.Module):
            state = prepared.state(self.name) if isinstance(prepared, Checkpoint) else None
            if state is None:
                raise ValueError(f"method {self.name} has weights: apply() needs the value of its prepare() stage")
            module.load_state_dict(state)
        return (
            None if module is None else module.to(next(model.module.parameters()).device).eval().requires_grad_(False)
        )

    def occupants(self, model: Model, prepared: Any) -> Mapping[Hook[Any], Occupant]:
        """What sits in the method's hooks while it is applied; occupants of several hooks may share what they know.

        Args:
            model: as the methods before have left it; not to be changed here, but by what occupants do when they are in
                place (``Occupant.at_work``).
            prepared: the value of the ``prepare`` stage, or None.
        """
        raise NotImplementedError(
            f"method {self.name} puts nothing into {', '.join(map(str, self.hooks)) or 'any hook'}"
        )

    @contextmanager
    def apply(self, model: Model, prepared: Any) -> Iterator[None]:
        """Compress ``model`` inside the ``with`` block: its hooks are occupied, and free again afterwards.

        Args:
            prepared: the value of the ``prepare`` stage, or None.
        """
        self.check(model.info)
        with in_its_hooks(self, model, prepared):
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


@dataclass(frozen=True, eq=False)
class Regardless:
    """A method as a field of a stage whose result is the same for all values of some of its knobs; equal for all of them."""

    method: Method
    knobs: tuple[str, ...]

    def as_field(self) -> tuple[str, str, tuple[tuple[str, KnobValue], ...]]:
        """Name, version and the other knobs."""
        name, version, values = self.method.as_field()
        return name, version, tuple(pair for pair in values if pair[0] not in self.knobs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Regardless) and self.as_field() == other.as_field()

    def __hash__(self) -> int:
        return hash(self.as_field())


METHODS: Registry[type[Method]] = Registry("method", ("isoflop.methods",))


def build(name: str, knobs: Mapping[str, Any], where: str = "") -> Method:
    """The method called ``name`` with checked knobs; a UserError names the nearest method or knob otherwise."""
    cls = METHODS.get(name, where)
    _check_class(cls, where)
    return cls(**check_knobs(cls, knobs, f"method {name}", where))


def _check_class(cls: type[Method], where: str) -> None:
    """Refuse classes that would go wrong later without saying why."""
    what = f"{where}: method {cls.name}" if where else f"method {cls.name}"
    if "__dataclass_fields__" not in vars(cls):
        raise UserError(
            f"{what}: class {cls.__name__} is no dataclass; write @dataclass(frozen=True) below @METHODS.register"
        )
    for name in ("learning_rate", "teacher", "special_training"):
        if callable(getattr(cls, name)):
            raise UserError(f"{what}: {name} is a function; write @property above it")
    if cls.occupants is Method.occupants and cls.apply is Method.apply:
        raise UserError(f"{what}: class {cls.__name__} does not say what sits in its hooks; give it `occupants`")


def in_turn(methods: Sequence[Method]) -> tuple[Method, ...]:
    """A trial's methods, where two that can act one after the other in the same hook are one (``Method.over``)."""
    left = list(methods)
    for first in methods:
        for then in methods:
            if first in left and then in left and first is not then and set(first.hooks) & set(then.hooks):
                both = then.over(first)
                if both is not None:
                    left[left.index(first)] = both
                    left.remove(then)
    return tuple(left)


def method_knobs(name: str) -> dict[str, KnobSpec]:
    """The knobs of a registered method."""
    return knob_specs(METHODS.get(name))
