"""What a model is to the rest of isoflop: a reference, a size N, hook points, and how its weights come to be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from torch import Tensor, nn

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hook import Hook, names_of
from isoflop.core.knobs import check_knobs, knob_specs
from isoflop.core.registry import Registry
from isoflop.core.stage import Stage, StageContext
from isoflop.models.hooks.occupant import Occupant, tensor_bytes
from isoflop.models.training.taught import Taught, TaughtT, one_per_hook

if TYPE_CHECKING:
    from isoflop.models.training.teaching import Course

OccupantT = TypeVar("OccupantT", bound=Occupant)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading its weights.

    Attributes:
        ref: the reference as written in a sweep: ``tiny-llava/d24`` or ``hf:<repo or local path>``.
        family: name of the family that loads it.
        version: changes whenever the same reference would give other weights (recipe, revision, file hash).
        n_params: N, the number of non-embedding parameters of the language model (vision tower and projector
            excluded; input and output embeddings excluded).
        hooks: places that it offers to methods (``isoflop.models.hooks``).
        offers: what tasks and methods may need besides: ``tokenizer``, ``labelled-images``, ``vocabulary:<name>``, …
        geometry: sizes that methods check against: ``grid`` (patches per side), ``visual_tokens``, ``hidden``, ``layers``…
        dense_bits: what an element of a weight or of a cache counts where nothing compresses it. Families trained here
            compute in float32, because CPUs do, and count 16 bits, as they would be served; checkpoints count what
            they are loaded in.
        options: the sweep's options for this model, checked, as sorted (name, value) pairs.
    """

    ref: str
    family: str
    version: str
    n_params: int
    hooks: frozenset[Hook[Any]]
    geometry: Mapping[str, Any] = field(default_factory=dict)
    dense_bits: int = 16
    options: tuple[tuple[str, Any], ...] = ()
    offers: frozenset[str] = frozenset()

    def check_offers(self, asker: str, hooks: Iterable[Hook[Any]], needs: Iterable[str]) -> None:
        """Raise Infeasible when ``asker`` ("method quecc") wants a hook, or something else, that the model does not offer."""
        missing = [*names_of(set(hooks) - self.hooks), *sorted(set(needs) - self.offers)]
        if missing:
            offered = ", ".join([*names_of(self.hooks), *sorted(self.offers)]) or "nothing"
            raise Infeasible(
                f"{asker} needs {', '.join(missing)}, which model {self.ref} does not offer (it offers: {offered})"
            )


class Model(ABC):
    """A loaded model, held warm by a worker. Methods change it only by occupying hooks, which restores it exactly.

    Attributes:
        info: its description.
        module: the Hugging Face model, in evaluation mode.
    """

    info: ModelInfo
    module: nn.Module
    _occupants: dict[Hook[Any], Occupant]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """With all hooks free, whatever a subclass does in its ``__init__``."""
        model = super().__new__(cls)
        model._occupants = {}
        return model

    @property
    def occupied(self) -> tuple[Hook[Any], ...]:
        """The hooks that are taken."""
        return tuple(self._occupants)

    def occupant(self, hook: Hook[OccupantT]) -> OccupantT | None:
        """What sits in a hook now, or None."""
        return cast("OccupantT | None", self._occupants.get(hook))

    @contextmanager
    def occupy(self, hook: Hook[OccupantT], occupant: OccupantT) -> Iterator[OccupantT]:
        """Inside the ``with`` block ``occupant`` sits in ``hook``; afterwards the model is what it was.

        Raises:
            Infeasible: the model does not offer the hook, it is taken, or a parameter is held in two compressed forms.
        """
        if hook not in self.info.hooks:
            raise Infeasible(
                f"model {self.info.ref} does not offer {hook.name} (it offers: {', '.join(names_of(self.info.hooks)) or 'nothing'})"
            )
        if hook in self._occupants:
            raise Infeasible(f"model {self.info.ref}: {hook.name} is taken already; a trial has one method there")
        self._occupants[hook] = occupant
        try:
            with hook.installed(self, occupant), occupant.at_work(self):
                self._refuse_twice_stored(hook)
                yield occupant
        finally:
            del self._occupants[hook]

    @property
    def stored(self) -> dict[str, float]:
        """Bytes of the parameters that occupants hold in forms of their own, by name in ``module``."""
        return {name: size for occupant in self._occupants.values() for name, size in occupant.stored.items()}

    def _refuse_twice_stored(self, hook: Hook[Any]) -> None:
        for other, occupant in self._occupants.items():
            twice = [] if other == hook else sorted(occupant.stored.keys() & self._occupants[hook].stored.keys())
            if twice:
                raise Infeasible(f"{twice[0]} is compressed twice: by what sits in {other.name} and in {hook.name}")

    def calibration(self, ctx: StageContext, examples: int, seed: int) -> Iterator[Any]:
        """Batches of training examples (never test examples), about ``examples`` rows in all, for ``supervised``.

        Methods must be applied that took part in the model's training (``Method.trains_model``).
        """
        raise NotImplementedError(f"model {self.info.ref} has no calibration examples")

    def supervised(self, batch: Any) -> tuple[Tensor, Tensor]:
        """A forward pass as the model is now: logits (S, classes) and targets (S,) of every scored position.

        Gradients flow when they are enabled.
        """
        raise NotImplementedError(f"model {self.info.ref} has no supervised forward pass")

    def weight_bytes(self) -> float:
        """Bytes of all weights and buffers as they would be stored, those of compressed ones as their methods hold them."""
        named = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        stored = self.stored
        dense = {name: t for name, t in named.items() if name not in stored}
        distinct = {id(t): t for t in dense.values()}.values()
        return sum(tensor_bytes(t, self.info.dense_bits) for t in distinct) + sum(stored.values())

    def served_bytes(self) -> float:
        """``weight_bytes``, and the bytes of what occupants hold besides the model."""
        return self.weight_bytes() + sum(o.held_bytes(self.info.dense_bits) for o in self._occupants.values())

    def resident_bytes(self) -> int:
        """Bytes of the model's parameters and buffers, and of its occupants' tensors, as they lie in memory; each once."""
        own = [t for o in self._occupants.values() for t in o.tensors()]
        tensors = {id(t): t for t in [*self.module.parameters(), *self.module.buffers(), *own]}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def dense_weight_bytes(self) -> float:
        """Bytes of all weights and buffers where nothing is compressed."""
        distinct = {id(t): t for t in [*self.module.parameters(), *self.module.buffers()]}.values()
        return sum(tensor_bytes(t, self.info.dense_bits) for t in distinct)


@dataclass(frozen=True)
class Checkpoint:
    """The value of a weights stage: a folder in ``save_pretrained`` form, with a trained compressor beside it.

    Attributes:
        folder: holds ``config.json`` and ``model.safetensors``, and/or weights of methods beside them.
        log: figures of the training (steps, final loss, seconds), for people.
    """

    folder: Any
    log: Mapping[str, Any] = field(default_factory=dict)

    def state(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of ``<name>.safetensors`` (``compressor``, ``projector``, a method's name), or None when there is no such file."""
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else None


class ModelFamily(ABC):
    """Everything that is loaded in the same way: a tiny family trained here, or Hugging Face checkpoints.

    Class attributes:
        trainable: hooks with whose occupants in place the family trains its models.
    """

    name: ClassVar[str]
    trainable: ClassVar[frozenset[Hook[Any]]] = frozenset()

    @abstractmethod
    def members(self) -> list[str]:
        """References that can be listed (``tiny-llava/d24`` …); empty for open-ended families."""

    @abstractmethod
    def info(self, ref: str, options: Mapping[str, Any]) -> ModelInfo:
        """Describe ``ref`` without loading weights. Raises UserError for a reference that does not exist."""

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` as they enter a job's id: equal for options that give the same model.

        Override it to leave defaults out, so that writing one down runs nothing again (see :func:`without_defaults`).
        """
        return dict(options)

    def weights(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int) -> Stage | None:
        """The stage that trains the weights, or None when they lie on disk already.

        ``methods`` are the trial's methods; those of ``trained_with`` take part in the training.
        """
        return None

    def trained_with(self, info: ModelInfo, methods: tuple[TaughtT, ...]) -> tuple[TaughtT, ...]:
        """Those of a trial's methods that ``weights`` trains the model with; what calibrates on it applies them first.

        Raises:
            Infeasible: a method with ``trains_model`` takes a hook that the family cannot train with, or that another has.
        """
        taking = tuple(method for method in methods if method.trains_model)
        for method in taking:
            stuck = names_of(set(method.hooks) - self.trainable)
            if stuck:
                works = ", ".join(names_of(self.trainable & info.hooks)) or "no hook"
                raise Infeasible(
                    f"method {method.name} takes part in training at {', '.join(stuck)}, and models of the family "
                    f"{self.name} are trained with methods at: {works}"
                )
        one_per_hook(taking)
        return taking

    def course_stages(self, info: ModelInfo, methods: tuple[Taught, ...]) -> tuple[Stage, ...]:
        """Stages that ``course`` asks for."""
        return ()

    def course(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int, ctx: StageContext) -> Course:
        """How a member is trained with ``methods`` in place; for families with ``trainable`` hooks."""
        raise NotImplementedError(f"models of the family {self.name} are not trained with methods in place")

    def calibration_stages(self, info: ModelInfo, methods: tuple[Taught, ...]) -> tuple[Stage, ...]:
        """Stages that ``Model.calibration`` asks for; ``methods`` are those that took part in the training."""
        return ()

    def series(self, info: ModelInfo, weights: Stage | None) -> tuple[tuple[ModelInfo, Stage | None], ...]:
        """The checkpoints of the training that a model is one of, the last one last; by default the model alone.

        Args:
            weights: the model's own, as ``weights()`` gave them.
        """
        return ((info, weights),)

    @abstractmethod
    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> Model:
        """The model on ``ctx.device`` in evaluation mode."""


def without_defaults(cls: type, options: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The options, in their types, that differ from the defaults of ``cls``, a dataclass with knobs.

    Args:
        kind: what to call the owner in a UserError ("model tiny-llava/d24").
    """
    specs = knob_specs(cls)
    checked = check_knobs(cls, options, kind)
    return {name: checked[name] for name in options if checked[name] != specs[name].default}


def split_ref(ref: str) -> tuple[str, dict[str, Any]]:
    """A reference without the options that are written into it: ``tiny-lm/text-d64?act=relu&at=64``.

    Options that are part of the name tell members of a sweep apart that differ in nothing else.

    Raises:
        UserError: something behind the question mark is no ``name=value``, or a name stands twice.
    """
    plain, mark, text = ref.partition("?")
    options: dict[str, Any] = {}
    for part in text.split("&") if mark else ():
        name, equals, value = part.partition("=")
        if not name or not equals or not value or name in options:
            raise UserError(f"model {ref}: {part!r} is no option of its own; allowed: {plain}?name=value&name=value")
        options[name] = _scalar(value)
    return plain, options


def _scalar(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


FAMILIES: Registry[ModelFamily] = Registry("model family", ("isoflop.models",), group="isoflop.models")


def family_of(ref: str, where: str = "") -> ModelFamily:
    """The family that a reference belongs to: the part before ``:`` or ``/``."""
    name = ref.split(":", 1)[0] if ref.startswith("hf:") else ref.split("/", 1)[0]
    return FAMILIES.get(name, where)
