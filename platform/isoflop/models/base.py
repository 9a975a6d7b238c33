"""What a model is to the rest of isoflop: a reference, a size N, hooks, and how its weights come to be."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook, names_of
from isoflop.core.stage import StageContext
from isoflop.models.hooks.occupant import Occupant, tensor_bytes

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
        lacks: why it does not offer other places, by their names.
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
    lacks: tuple[tuple[str, str], ...] = ()

    @property
    def has_loss(self) -> bool:
        """Whether ``Model.supervised`` gives logits with their targets, so that a loss can be measured."""
        return True

    @property
    def uncalibrated(self) -> str:
        """Why there are no examples to calibrate on; empty where there are some."""
        return ""

    def check_calibration(self) -> None:
        """Raise Infeasible where ``Model.calibration`` would: so that it is known before anything runs."""
        if self.uncalibrated:
            raise Infeasible(f"model {self.ref} has no calibration examples: {self.uncalibrated}")

    def check_loss(self, asker: str) -> None:
        """Raise Infeasible when ``asker`` ("method evopress") measures a loss, and the model has none."""
        if not self.has_loss:
            raise Infeasible(
                f"{asker} goes by the loss on calibration text, and model {self.ref} has no head that predicts tokens; allowed: "
                "language models, encoders with the architecture …ForMaskedLM, or a method that needs no loss"
            )

    def check_offers(self, asker: str, hooks: Iterable[Hook[Any]], needs: Iterable[str]) -> None:
        """Raise Infeasible when ``asker`` ("method quecc") wants a hook, or something else, that the model does not offer."""
        missing = [*names_of(set(hooks) - self.hooks), *sorted(set(needs) - self.offers)]
        if missing:
            offered = ", ".join([*names_of(self.hooks), *sorted(self.offers)]) or "nothing"
            raise Infeasible(
                f"{asker} needs {', '.join(missing)}, which model {self.ref} does not offer{self.why_not(missing)} (it offers: {offered})"
            )

    def why_not(self, names: Iterable[str]) -> str:
        """``: its …``, the reasons why places are not offered, where there are any."""
        found = dict.fromkeys(reason for name, reason in self.lacks if name in names)
        return f": {'; '.join(found)}" if found else ""


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
    def devices(self) -> list[torch.device]:
        """Where the weights lie, the device of the first ones first: more than one where the model is spread."""
        return list(dict.fromkeys(parameter.device for parameter in self.module.parameters()))

    @property
    def occupied(self) -> tuple[Hook[Any], ...]:
        """The hooks that are taken."""
        return tuple(self._occupants)

    def occupant(self, hook: Hook[OccupantT]) -> OccupantT | None:
        """What sits in a hook now, or None."""
        return cast("OccupantT | None", self._occupants.get(hook))

    @contextmanager
    def occupy(self, hook: Hook[OccupantT], occupant: OccupantT, own: bool = False) -> Iterator[OccupantT]:
        """Inside the ``with`` block ``occupant`` sits in ``hook``; afterwards the model is what it was.

        Args:
            own: it is the model's own, which knows what it may do there.

        Raises:
            Infeasible: the model does not offer the hook, it is taken, or a parameter is held in two compressed forms.
        """
        if hook not in self.info.hooks and not own:
            raise Infeasible(
                f"model {self.info.ref} does not offer {hook.name}{self.info.why_not([hook.name])} "
                f"(it offers: {', '.join(names_of(self.info.hooks)) or 'nothing'})"
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
