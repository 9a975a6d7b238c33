"""The built-in family ``tiny-llava``: LLaVA-style models of 14 thousand to 0.6 million parameters, trained on the spot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, cast

from isoflop.core.errors import unknown
from isoflop.core.hook import Hook
from isoflop.core.knobs import check_knobs
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint, Model, ModelInfo
from isoflop.models.family import FAMILIES, ModelFamily, without_defaults
from isoflop.models.features import FeatureTable, LayerKey, vision_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.hooks.residual import RESIDUAL
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS, AllTokens, TaughtCompressor
from isoflop.models.lm import tokenizer_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.tiny.easy_vqa import EASY_VQA, EasyVqaRecipe, easy_vqa_course, easy_vqa_info
from isoflop.models.tiny.llava_config import SIZES
from isoflop.models.tiny.llava_course import llava_course
from isoflop.models.tiny.llava_training import FAMILY, CellStage, Recipe, tiny_info
from isoflop.models.training.taught import Taught, TaughtT
from isoflop.models.training.taught_stage import TaughtStage
from isoflop.models.training.teaching import Course
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmInfo
from isoflop.models.worlds.easy_vqa import EasyVqaLessons, content, questions


class TinyLlava(ModelFamily):
    """LLaVA-style models built from Hugging Face classes and trained by the recipe in ``Recipe``.

    N counts the decoder layers; embeddings, final norm, head, projector and tower are left out.
    """

    name: ClassVar[str] = FAMILY
    trainable: ClassVar[frozenset[Hook[Any]]] = frozenset(
        {VISUAL_TOKENS, DECODER_LAYERS, RESIDUAL, FEED_FORWARD, ATTENTION}
    )

    def members(self) -> list[str]:
        """``tiny-llava/d24`` … ``tiny-llava/d128``, the same with a Qwen2-type decoder (``…-qwen``), and ``tiny-llava/easy-vqa-d64``."""
        return [f"{FAMILY}/{name}" for name in (*SIZES, *EASY_VQA)]

    def info(self, ref: str, options: Mapping[str, Any]) -> VlmInfo:
        """Describe a member; ``options`` are fields of ``Recipe``, or of ``EasyVqaRecipe``."""
        size = ref.partition("/")[2]
        if ref not in self.members():
            raise unknown("model", ref, self.members())
        checked = tuple(sorted(check_knobs(_recipe_of(ref), options, f"model {ref}").items()))
        return easy_vqa_info(size, checked, content()) if size in EASY_VQA else _info(size, checked)

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the recipe that differ from its defaults."""
        return without_defaults(_recipe_of(ref), options, f"model {ref}")

    def weights(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int) -> Stage:
        """The training stage of a cell: size, methods that take part (unless ``joint`` is off), seed.

        Raises:
            UserError: the training data have not been fetched.
        """
        vlm = _own(info)
        if isinstance(vlm.lessons, EasyVqaLessons):
            questions(vlm.lessons.content)
        taking = self.trained_with(vlm, methods)
        for one in taking:  # as it will be used: what is trained may stand for other values of knobs, too
            one.check(vlm)
        taking = tuple(method for method in taking if method.name != AllTokens.name)  # which does nothing
        if (
            _on_easy_vqa(vlm)
            or len(taking) > 1
            or any(m.hooks != (VISUAL_TOKENS,) or m.special_training for m in taking)
        ):
            return TaughtStage.of(vlm, taking, seed)
        method = cast("TaughtCompressor", taking[0].as_trained() if taking else AllTokens())
        return CellStage(vlm.ref.partition("/")[2], method, seed, vlm.options, vlm.tower, _features(vlm, (method,)))

    def trained_with(self, info: ModelInfo, methods: tuple[TaughtT, ...]) -> tuple[TaughtT, ...]:
        """Those that take part, unless ``joint`` is off."""
        return super().trained_with(info, methods) if _own(info).joint else ()

    def course_stages(self, info: ModelInfo, methods: tuple[Taught, ...]) -> tuple[Stage, ...]:
        """The tower, training features of the layers that are read with the methods in place, and the tokenizer, if any."""
        vlm = _own(info)
        return (vlm.tower, *_features(vlm, methods), *(() if vlm.tokenizer is None else (vlm.tokenizer,)))

    def course(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int, ctx: StageContext) -> Course:
        """The training of a member."""
        vlm = _own(info)
        course = easy_vqa_course if _on_easy_vqa(vlm) else llava_course
        return course(vlm, methods, _features(vlm, methods), seed, ctx)

    def calibration_stages(self, info: ModelInfo, methods: tuple[Taught, ...]) -> tuple[Stage, ...]:
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
        return VlmModel(vlm, module, vision_of(module.model.vision_tower, checkpoint.folder), tokenizer_of(vlm, ctx))


def _recipe_of(ref: str) -> type[Recipe | EasyVqaRecipe]:
    return EasyVqaRecipe if ref.partition("/")[2] in EASY_VQA else Recipe


def _on_easy_vqa(info: VlmInfo) -> bool:
    return isinstance(info.lessons, EasyVqaLessons)


@lru_cache(maxsize=256)
def _info(size: str, options: tuple[tuple[str, Any], ...]) -> VlmInfo:
    return tiny_info(size, dataclasses.replace(Recipe(), **dict(options)))


def _features(info: VlmInfo, methods: tuple[Taught, ...]) -> tuple[FeatureTable, ...]:
    """Training features of the layer that feeds the projector, and of those that the methods read besides."""
    lessons = info.known_lessons
    if lessons is None:
        raise TypeError(f"{info.ref} was not described by this family")
    layers: list[LayerKey] = [info.feature_layer]
    for method in methods:
        if VISUAL_TOKENS in method.hooks:
            layers += [n for n in cast("TaughtCompressor", method).layers(info) if n not in layers]
    return tuple(stage for layer in layers for stage in lessons.tables(info.tower, layer))


def _own(info: ModelInfo) -> VlmInfo:
    if not isinstance(info, VlmInfo):
        raise TypeError(f"{info.ref} was not described by this family")
    return info


FAMILIES.register(FAMILY)(TinyLlava())
