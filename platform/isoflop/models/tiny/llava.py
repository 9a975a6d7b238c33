"""The built-in family ``tiny-llava``: LLaVA-style models of 14 thousand to 0.6 million parameters, trained on the spot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from isoflop.core.errors import Infeasible, unknown
from isoflop.core.hashing import content_hash
from isoflop.core.knobs import check_knobs
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import FAMILIES, Model, ModelFamily, ModelInfo, without_defaults
from isoflop.models.features import FeaturesStage, LayerKey, TinyTowerStage, vision_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.tiny.llava_config import SIZES
from isoflop.models.tiny.llava_training import CellStage, Recipe, method_spec, recipe_fields
from isoflop.models.tiny.vision import KINDS
from isoflop.models.vlm import HOOKS, Checkpoint, VlmInfo, VlmModel
from isoflop.models.worlds import digit_world as world

if TYPE_CHECKING:
    from isoflop.methods.base import Method

FAMILY = "tiny-llava"


def tiny_info(size: str, recipe: Recipe) -> VlmInfo:
    """Describe a member under a recipe."""
    shape, kind = SIZES[size], KINDS[recipe.tower]
    fields = recipe_fields(recipe)
    return VlmInfo(
        ref=f"{FAMILY}/{size}",
        family=FAMILY,
        version=content_hash({"stage": CellStage.version, "tower": TinyTowerStage.version, "recipe": dict(fields)}, 12),
        n_params=shape.n_params,
        hooks=HOOKS,
        offers=frozenset(
            {f"vocabulary:{world.VOCABULARY}"} | ({world.SPARSE_SCENES} if recipe.tower == "cls" else set())
        ),
        geometry=shape.geometry(recipe.tower),
        tower=TinyTowerStage(steps=recipe.tower_steps, tower=recipe.tower),
        feature_layer=kind.feature_layer,
        vocabulary=world.VOCABULARY,
        lessons=recipe.lessons,
        joint=recipe.joint,
        options=fields,
    )


class TinyLlava(ModelFamily):
    """LLaVA-style models built from Hugging Face classes and trained by the recipe in ``Recipe``.

    N counts the decoder layers; embeddings, final norm, head, projector and tower are left out.
    """

    name: ClassVar[str] = FAMILY

    def members(self) -> list[str]:
        """``tiny-llava/d24`` … ``tiny-llava/d128``, and the same with a Qwen2-type decoder (``…-qwen``)."""
        return [f"{FAMILY}/{size}" for size in SIZES]

    def info(self, ref: str, options: Mapping[str, Any]) -> VlmInfo:
        """Describe a member; ``options`` are fields of ``Recipe``."""
        size = ref.partition("/")[2]
        if size not in SIZES:
            raise unknown("model", ref, self.members())
        return _info(size, tuple(sorted(check_knobs(Recipe, options, f"model {ref}").items())))

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ``Recipe`` that differ from its defaults."""
        return without_defaults(Recipe, options, f"model {ref}")

    def weights(self, info: ModelInfo, methods: tuple[Method, ...], seed: int) -> Stage:
        """The training stage of a cell: size, visual-token method (unless ``joint`` is off), seed."""
        from isoflop.methods.base import build
        from isoflop.methods.visual_tokens.base import VisualTokenMethod

        vlm = _own(info)
        taking_part = [m for m in methods if m.trains_model]
        visual = [m for m in taking_part if isinstance(m, VisualTokenMethod) and vlm.joint]
        other = [m.name for m in taking_part if not isinstance(m, VisualTokenMethod)]
        if other:
            raise Infeasible(
                f"model {info.ref}: methods that take part in its training must be visual-token methods, not {', '.join(other)}"
            )
        if len(visual) > 1:
            raise Infeasible(
                f"model {info.ref}: a trial takes one visual-token method, not {len(visual)}: {', '.join(m.name for m in visual)}"
            )
        method = visual[0] if visual else build("none", {})
        if not isinstance(method, VisualTokenMethod):
            raise TypeError("the method 'none' must be a visual-token method")
        method.check(vlm)
        features = _features(vlm, (method,))
        return CellStage(vlm.ref.partition("/")[2], method_spec(method), seed, vlm.options, vlm.tower, features)

    def trained_with(self, info: ModelInfo, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        """The visual-token method, unless ``joint`` is off."""
        return super().trained_with(info, methods) if _own(info).joint else ()

    def calibration_stages(self, info: ModelInfo, methods: tuple[Method, ...]) -> tuple[Stage, ...]:
        """Training features of the layers that the model reads with the methods in place."""
        return _features(_own(info), methods)

    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> Model:
        """The trained model on the worker's device."""
        from transformers import LlavaForConditionalGeneration

        vlm = _own(info)
        if weights is None:
            raise ValueError(f"model {info.ref} has no weights of its own: pass the stage that weights() gives")
        checkpoint: Checkpoint = ctx.get(weights)
        with no_progress_bars():
            module = LlavaForConditionalGeneration.from_pretrained(
                checkpoint.folder, local_files_only=True, use_safetensors=True
            )
        module = module.to(ctx.device).eval().requires_grad_(False)
        return VlmModel(vlm, module, vision_of(module.model.vision_tower, checkpoint.folder))


@lru_cache(maxsize=256)
def _info(size: str, options: tuple[tuple[str, Any], ...]) -> VlmInfo:
    return tiny_info(size, dataclasses.replace(Recipe(), **dict(options)))


def _features(info: VlmInfo, methods: tuple[Method, ...]) -> tuple[FeaturesStage, ...]:
    """Training features of the layer that feeds the projector, and of those that the methods read besides."""
    from isoflop.methods.visual_tokens.base import VisualTokenMethod

    lessons = info.known_lessons
    if lessons is None:
        raise TypeError(f"{info.ref} was not described by this family")
    layers: list[LayerKey] = [info.feature_layer]
    for method in methods:
        if isinstance(method, VisualTokenMethod):
            layers += [n for n in method.layers(info) if n not in layers]
    return tuple(stage for layer in layers for stage in lessons.tables(info.tower, layer))


def _own(info: ModelInfo) -> VlmInfo:
    if not isinstance(info, VlmInfo):
        raise TypeError(f"{info.ref} was not described by this family")
    return info


FAMILIES.register(FAMILY)(TinyLlava())
