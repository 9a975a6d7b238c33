"""Visual-token methods: a compressor between the vision tower and the projector.

The base class owns what sits in the hook ``visual_tokens``. A method says how many tokens it leaves and how it computes them; a method with
weights also builds a module. In the tiny family the model is trained with the compressor in the loop. On a Hugging
Face checkpoint, and on a tiny model with ``joint: false``, a method without weights is applied as it is, and one with
weights is trained together with the projector while the language model stays frozen.

Shape suffixes: B batch, P patches, V visual tokens, D vision width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Axes, Method
from isoflop.methods.vision_language import vlm_info, vlm_model
from isoflop.models.base import Checkpoint, Model, ModelInfo
from isoflop.models.features import LayerKey
from isoflop.models.hooks.occupant import Occupant, tensor_bytes
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS, CompressedTokens, Compression, VisualInput
from isoflop.models.training.taught import InTraining
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmInfo

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class VisualTokenMethod(Method):
    """Base class of compressors that replace the P patch features of an image by V tokens before the projector.

    Life cycle on a model: ``check`` refuses impossible knobs; ``prepare`` names the stage that trains the weights, if
    there are any; ``apply`` puts the compressor in place for the length of a ``with`` block.

    Class attributes:
        commutes: the result does not change when the features are shifted and scaled per channel before instead of
            after; true for selections and averages.
        wants_raster: needs all P patches in their places, so that nothing may leave the image in the tower.
        wants_square: needs views with a square grid, the same in every image.
        wants_attention: reads the attention in the tower.
    """

    family: ClassVar[str] = "visual-tokens"
    ratio_of: ClassVar[str] = "visual tokens"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (VISUAL_TOKENS,)
    trains_model: ClassVar[bool] = True
    commutes: ClassVar[bool] = True
    wants_raster: ClassVar[bool] = True
    wants_square: ClassVar[bool] = True
    wants_attention: ClassVar[bool] = False

    @abstractmethod
    def tokens_left(self, grid: int) -> int:
        """V for an image of ``grid`` x ``grid`` patches. Raises Infeasible, naming the knob and what would work."""

    def at_most_all(self, knob: str, count: int, grid: int) -> int:
        """``count``, unless the image has fewer patches."""
        if count > grid * grid:
            raise Infeasible(
                f"method {self.name}: {knob} = {count} exceeds the {grid * grid} patches of a {grid}x{grid} grid; "
                f"allowed: 1 … {grid * grid}"
            )
        return count

    def left_of(self, grid: int, patches: int, square: bool) -> int:
        """V for so many patches, of which ``grid`` x ``grid`` is the largest square.

        Args:
            square: all images have this grid; a picture in a shape of its own that has fewer patches keeps them all.
        """
        try:
            return self.tokens_left(grid)
        except Infeasible:
            if square:
                raise
            return patches

    def _planned(self, vlm: VlmInfo) -> int:
        return self.left_of(vlm.geometry["grid"], vlm.geometry["visual_tokens"], vlm.square)

    @property
    def special_training(self) -> bool:
        """Also of methods whose occupant is more than ``compress``."""
        return super().special_training or type(self).occupants is not VisualTokenMethod.occupants

    @abstractmethod
    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        """Compress a batch; ``module`` is what ``build`` returned. Gradients flow when they are enabled."""

    def projector(self, module: nn.Module | None) -> nn.Module | None:
        """The part of ``module`` that takes the place of the model's projector; None where the model's stays.

        ``module`` is None where the method has not been built.
        """
        return None

    def layers(self, info: VlmInfo) -> tuple[LayerKey, ...]:
        """What ``compress`` reads of the tower besides the features that feed the projector: ``VisualInput.hidden``."""
        return ()

    def fit_inputs(self, module: nn.Module, view: VisualInput) -> None:
        """Set what ``module`` derives from data (input statistics) from a sample of the training images."""

    def axes(self, info: ModelInfo) -> Axes:
        """V, the same in every layer, and what it would be with every patch over V, of an image as large as one view."""
        vlm = vlm_info(info)
        left = vlm.tokens_of_image(self._planned(vlm))
        return Axes(visual_tokens=float(left), ratio=vlm.tokens_of_image() / left)

    def check(self, info: ModelInfo) -> None:
        """Refuse models without the hook, and knobs that the patch grid rules out."""
        super().check(info)
        vlm = vlm_info(info)
        if not vlm.square and self.wants_attention:
            raise Infeasible(
                f"method {self.name} reads the attention in the vision tower, and that of {info.ref} keeps queries, keys and values in one "
                "matrix; allowed: towers with matrices for each (CLIP, SigLIP, InternVL, Idefics3)"
            )
        if not vlm.square and self.wants_square:
            raise Infeasible(
                f"method {self.name} needs images with a square grid of patches, and {info.ref} takes every picture in its own shape; "
                "allowed: methods that keep patches wherever they are (none, random)"
            )
        self._planned(vlm)

    def check_beside(self, others: Sequence[Method], info: ModelInfo) -> None:
        """Refuse methods that act between the blocks of the tower, where patches merge or go, beside one that needs them all."""
        inside = [other.name for other in others if VISION_BLOCKS in other.hooks]
        if inside and self.wants_raster:
            raise Infeasible(
                f"method {self.name} needs every patch of the image in its place, and method {inside[0]} lets patches go in the "
                f"vision tower ({VISION_BLOCKS}); allowed beside it: none, or no method on visual tokens"
            )

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The model's own training stage if the method took part in it, a stage that trains the method, or None."""
        self.check(info)
        vlm = vlm_info(info)
        if weights is not None and self.trains_model and vlm.joint:
            return weights
        if self.untrained(vlm, 0) is None:
            return None
        if type(self).occupants is not VisualTokenMethod.occupants:
            raise Infeasible(
                f"method {self.name} has an occupant of its own at {VISUAL_TOKENS}: its weights are trained together with a "
                f"model (tiny-llava with joint: true), not for {vlm.ref} as it is"
            )
        from isoflop.models.training.frozen import CompressorStage

        return CompressorStage.of(vlm, self, seed, weights)

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The compressor.

        Args:
            prepared: a ``Checkpoint`` with the trained weights, a module, or None for a method without weights.
        """
        return {VISUAL_TOKENS: self._in_place(vlm_model(model), prepared)}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """``ratio`` = P / V, and parameters and bytes of the compressor's own weights."""
        vlm = vlm_model(model)
        patches = vlm.info.geometry["visual_tokens"]
        compression = vlm.occupant(VISUAL_TOKENS)
        module = compression.module if compression is not None else None
        tensors = [] if module is None else [*module.parameters(), *module.buffers()]
        return {
            "ratio": patches / self._planned(vlm.info),
            "method_params": float(sum(t.numel() for t in tensors)),
            "method_bytes": sum(tensor_bytes(t, vlm.info.dense_bits) for t in tensors),
        }

    @classmethod
    def probe(cls) -> Probe:
        """An untrained tiny model on which the conformance suite runs."""
        from isoflop.methods.visual_tokens.probe import VisualTokenProbe

        return VisualTokenProbe()

    def _in_place(self, model: VlmModel, prepared: Any) -> InPlace:
        module, projector = None, None
        if isinstance(prepared, InTraining):
            module = prepared.module
            return InPlace(self, module, self.projector(module), self.layers(model.info))
        if isinstance(prepared, Checkpoint):
            module = self._load(model, prepared)
            projector = None if self.projector(module) is not None else _load_projector(model, prepared)
        elif isinstance(prepared, nn.Module):
            module = prepared
        if module is None and self.untrained(model.info, 0) is not None:
            raise ValueError(f"method {self.name} has weights: apply() needs the value of its prepare() stage")
        if module is not None:
            module = module.to(model.device, model.dtype).eval().requires_grad_(False)
            projector = self.projector(module) or projector
        unused = projector_names(model) if self.projector(module) is not None else []
        return InPlace(self, module, projector, self.layers(model.info), tuple(unused))

    def _load(self, model: VlmModel, checkpoint: Checkpoint) -> nn.Module | None:
        own = checkpoint.state("compressor")  # trained with nothing else in place
        state = checkpoint.state(self.name) if own is None else own
        module = self.untrained(model.info, 0)
        if module is not None and state is not None:
            module.load_state_dict(state)
        return module


@dataclass(eq=False)
class InPlace(Compression):
    """A compressor in place.

    Attributes:
        unused: parameters of the model that nobody needs to store because of it.
    """

    method: VisualTokenMethod
    module: nn.Module | None
    projector: nn.Module | None
    layers: tuple[LayerKey, ...]
    unused: tuple[str, ...] = ()

    @property
    def stored(self) -> dict[str, float]:
        """Nothing for the projector in whose place the method's own stands."""
        return dict.fromkeys(self.unused, 0.0)

    def __call__(self, view: VisualInput) -> CompressedTokens:
        """Compress a batch."""
        return self.method.compress(view, self.module)


def projector_names(model: VlmModel) -> list[str]:
    """Parameters of the model's projector; nobody needs to store them where a method brings its own."""
    own = {id(p) for p in model.side.projector.parameters()}
    return [name for name, p in model.module.named_parameters() if id(p) in own]


def _load_projector(model: VlmModel, checkpoint: Checkpoint) -> nn.Module | None:
    from copy import deepcopy

    state = checkpoint.state("projector")
    if state is None:
        return None
    projector = deepcopy(model.side.projector)
    projector.load_state_dict(state)
    return projector.eval().requires_grad_(False)
