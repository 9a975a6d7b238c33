"""The course of the tiny vision-language models: how a member is trained with methods in the tower's place, between decoder
layers and in the attention.

Through the general forward pass of the model, so that whatever sits in a hook acts; a cell with one compressor alone goes
through a faster one (``CellTrainer``).

Shape suffixes: B batch, P patches, D vision width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch

from isoflop.core.stage import StageContext
from isoflop.models.features import FeatureTable
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS, Looking, TaughtCompressor
from isoflop.models.tiny.llava_training import Bank, Recipe, bank_of, llava_groups, save_cell, untrained_llava
from isoflop.models.training.loop import Rates, Schedule, record_training
from isoflop.models.training.taught import Taught
from isoflop.models.training.teaching import Course, Pupil
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch, VlmInfo
from isoflop.models.worlds.lessons import Lesson


class CourseRecipe(Schedule, Rates, Protocol):
    """What a course reads of a member's recipe."""

    @property
    def batch(self) -> int:
        """Examples per step."""


def llava_course(
    info: VlmInfo, methods: Sequence[Taught], features: Sequence[FeatureTable], seed: int, ctx: StageContext
) -> Course:
    """The training of a member on both tasks.

    Args:
        features: of the layers that the methods read.
    """
    recipe = Recipe(**dict(info.options))
    vision = ctx.get(info.tower)
    module = untrained_llava(info.ref.partition("/")[2], recipe, vision, seed)
    return course_of(VlmModel(info, module, vision), recipe, methods, features, seed, ctx)


def course_of(
    model: VlmModel,
    recipe: CourseRecipe,
    methods: Sequence[Taught],
    features: Sequence[FeatureTable],
    seed: int,
    ctx: StageContext,
) -> Course:
    """The training of a model with initial weights on the lessons of its description."""
    started = time.process_time()
    module, info = model.module, model.info
    compressors = [cast("TaughtCompressor", m) for m in methods if VISUAL_TOKENS in m.hooks]
    bank = bank_of(ctx, features, info, standardise=all(m.commutes for m in compressors))

    def save(folder: Path, losses: list[float]) -> None:
        save_cell(folder, module, None, model.vision.image_size)
        record_training(folder, losses, started)

    return Course(
        model,
        recipe,
        llava_groups(module, info.geometry["width"], recipe),
        _lessons(model, bank, recipe, seed),
        save,
        prime=lambda pupils: _fit_inputs(model, bank, pupils),
        finish=lambda: bank.fold(module.model.multi_modal_projector.linear_1),
    )


def _lessons(model: VlmModel, bank: Bank, recipe: CourseRecipe, seed: int) -> Iterator[VlmBatch]:
    lessons = model.info.known_lessons
    if lessons is None:
        raise TypeError(f"{model.info.ref} has no lessons")
    for lesson in lessons.steps(recipe.steps, recipe.batch, seed):
        yield model.lesson(lesson, bank.rows(lesson.rows_B))


@torch.no_grad()
def _fit_inputs(model: VlmModel, bank: Bank, pupils: Sequence[Pupil]) -> None:
    """Show compressors every eighth training image with a blank question."""
    rows = torch.arange(0, len(bank.x[model.info.feature_layer]), 8)
    batch = model.lesson(Lesson(rows, torch.zeros(len(rows), 1, dtype=torch.long), rows), bank.rows(rows))
    for pupil in pupils:
        if pupil.module is not None and VISUAL_TOKENS in pupil.method.hooks:
            method = cast("TaughtCompressor", pupil.method)
            looking = Looking(method.layers(model.info))
            with model.occupy(VISUAL_TOKENS, looking):
                model.compress(batch)
            assert looking.seen is not None
            method.fit_inputs(pupil.module, looking.seen)
