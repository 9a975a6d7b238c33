"""The members of the tiny LLaVA family that are trained on easy-VQA, data made by others: sizes, recipe, training.

They read words, where the others read the raw symbols of the digit scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

from isoflop.core.hashing import content_hash
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.features import FeatureTable
from isoflop.models.tiny.easy_vqa_tower import (
    FEATURE_LAYER,
    GRID,
    LAYERS,
    EasyVqaTowerStage,
    easy_vqa_tower_config,
)
from isoflop.models.tiny.llava_config import TinySize, config_of
from isoflop.models.tiny.llava_course import course_of
from isoflop.models.tiny.llava_training import FAMILY, untrained_of
from isoflop.models.training.taught import Taught
from isoflop.models.training.taught_stage import TaughtStage
from isoflop.models.training.teaching import Course
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import HOOKS, VlmInfo
from isoflop.models.worlds import easy_vqa as world

if TYPE_CHECKING:
    from transformers import LlavaConfig

EASY_VQA = {"easy-vqa-d64": TinySize(64, 2, 4, 176)}
POSITIONS = 128


@dataclass(frozen=True)
class EasyVqaRecipe:
    """How a member is trained on easy-VQA; the fields are options of the model in a sweep."""

    steps: Annotated[int, Knob(low=1, high=100_000, doc="optimiser steps")] = 800
    batch: Annotated[int, Knob(low=2, high=4096, doc="questions per step")] = 64
    lr: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="learning rate of matrices at width 64")] = 1.5e-3
    vector_lr: Annotated[
        float, Knob(low=1e-6, high=1.0, log=True, doc="learning rate of vectors, of the projector's input and the head")
    ] = 3e-3
    embedding_lr: Annotated[
        float, Knob(low=1e-6, high=100.0, log=True, doc="learning rate of token embeddings, times the width")
    ] = 1.4
    warmup: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the steps with a rising learning rate")] = 0.1
    final: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the learning rate left at the end")] = 0.02
    clip: Annotated[float, Knob(low=1e-6, doc="gradient norm")] = 1.0
    tower_steps: Annotated[int, Knob(low=1, high=100_000, doc="optimiser steps of the vision tower")] = 1000


@lru_cache(maxsize=64)
def easy_vqa_info(size: str, options: tuple[tuple[str, Any], ...], content: str) -> VlmInfo:
    """Describe a member.

    Args:
        content: of the training data; empty while they are not at hand, when the member can be described but not trained.
    """
    recipe, shape = EasyVqaRecipe(**dict(options)), EASY_VQA[size]
    tower = EasyVqaTowerStage(content, recipe.tower_steps)
    named = {"stage": TaughtStage.version, "tower": tower.version, "recipe": dict(options), "data": content}
    return VlmInfo(
        ref=f"{FAMILY}/{size}",
        family=FAMILY,
        version=content_hash(named, 12),
        n_params=shape.n_params,
        hooks=HOOKS,
        offers=frozenset({"tokenizer"}),
        geometry={
            **shape.geometry(),
            "grid": GRID,
            "visual_tokens": GRID**2,
            "vision_layers": LAYERS,
            "vocab_size": world.VOCAB_SIZE,
            "image_token": world.IMAGE,
        },
        tower=tower,
        feature_layer=FEATURE_LAYER,
        lessons=world.EasyVqaLessons(content),
        options=options,
        tokenizer=world.EasyVqaWords(content),
    )


def easy_vqa_config(size: str) -> LlavaConfig:
    """The Hugging Face config of a member."""
    return config_of(
        EASY_VQA[size],
        easy_vqa_tower_config(),
        vocab_size=world.VOCAB_SIZE,
        image_token=world.IMAGE,
        positions=POSITIONS,
        patches=GRID**2,
        feature_layer=FEATURE_LAYER,
    )


def easy_vqa_course(
    info: VlmInfo, methods: Sequence[Taught], features: Sequence[FeatureTable], seed: int, ctx: StageContext
) -> Course:
    """The training of a member on the training questions; its tower stays as it is."""
    vision = ctx.get(info.tower)
    module = untrained_of(easy_vqa_config(info.ref.partition("/")[2]), vision, seed)
    return course_of(VlmModel(info, module, vision), EasyVqaRecipe(**dict(info.options)), methods, features, seed, ctx)
