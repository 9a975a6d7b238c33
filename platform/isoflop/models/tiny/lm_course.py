"""Courses of the tiny language models: how each corpus trains a decoder that methods sit in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import ModelInfo
from isoflop.models.lm import LmBatch, LmInfo, LmModel, tokenizer_of
from isoflop.models.tiny.fact_reader import WORDS, FactLessons, FactRecipe, WordTokenizer
from isoflop.models.tiny.lm_config import FACT_SIZES, RECALL_SIZES, TEXT_SIZES
from isoflop.models.tiny.lm_training import (
    LmRecipe,
    RecallLessons,
    RecallRecipe,
    TextRecipe,
    accuracy_of,
    add_outliers,
    lm_groups,
    recall_figures,
    save_lm,
    text_lessons,
    train_tokens,
    untrained_lm,
)
from isoflop.models.training.teaching import Course
from isoflop.models.worlds import recall_world as world

Figures = Callable[[], dict[str, float]]


def course_stages(info: ModelInfo, corpus: str, size: str) -> tuple[Stage, ...]:
    """Stages that a corpus' course asks for."""
    if corpus == "text":
        tokens = train_tokens(dict(info.options)["vocabulary"])
        return (tokens, tokens.tokenizer)
    return (WordTokenizer(),) if corpus == "facts" else ()


def lm_course(info: LmInfo, corpus: str, size: str, seed: int, ctx: StageContext) -> Course:
    """The course of a member.

    Raises:
        Infeasible: a corpus whose members are trained in two parts, or an option that keeps a step of the way.
    """
    if corpus == "recall":
        return _recall(info, size, seed)
    if corpus == "facts":
        return _facts(info, size, seed, ctx)
    if corpus == "text" and not dict(info.options).get("at"):
        return _text(info, size, seed, ctx)
    raise Infeasible(
        f"model {info.ref} is not trained with methods in place; allowed: tiny-lm/recall-…, facts-…, and text-… without "
        "the option at"
    )


def _recall(info: LmInfo, size: str, seed: int) -> Course:
    recipe = RecallRecipe(**dict(info.options))
    module = untrained_lm(RECALL_SIZES[size], world.VOCAB_SIZE, seed, isoflop={"vocabulary": world.VOCABULARY})
    lessons = RecallLessons(recipe, seed)

    def figures() -> dict[str, float]:
        return {"pairs_reached": lessons.pairs, **recall_figures(module, recipe, seed)}

    course = _course(info, module, recipe, lessons, figures, None)
    course.learned = lessons.learned
    course.finish = lambda: add_outliers(module, recipe.outliers, recipe.outlier_scale, derive_seed("outliers", seed))
    return course


def _facts(info: LmInfo, size: str, seed: int, ctx: StageContext) -> Course:
    recipe = FactRecipe(**dict(info.options))
    module = untrained_lm(FACT_SIZES[size], len(WORDS), seed)
    lessons = FactLessons(recipe, seed)

    def figures() -> dict[str, float]:
        return {"facts_reached": float(lessons.level), "accuracy": accuracy_of(module, lessons.check(64))}

    course = _course(info, module, recipe, lessons, figures, ctx)
    course.learned = lessons.learned
    return course


def _text(info: LmInfo, size: str, seed: int, ctx: StageContext) -> Course:
    recipe = TextRecipe(**dict(info.options))
    module = untrained_lm(recipe.shaped(TEXT_SIZES[size]), recipe.vocabulary, seed, **recipe.config)
    tokens = ctx.get(train_tokens(recipe.vocabulary))
    epochs = recipe.steps * recipe.batch * recipe.context / len(tokens.ids_N)
    return _course(info, module, recipe, text_lessons(tokens.ids_N, recipe, seed), lambda: {"epochs": epochs}, ctx)


def _course(
    info: LmInfo, module: Any, recipe: LmRecipe, lessons: Iterable[LmBatch], figures: Figures, ctx: StageContext | None
) -> Course:
    """``ctx`` gives the tokenizer that is saved with the checkpoint; None where there is none."""
    started = time.process_time()
    tokenizer = None if ctx is None else tokenizer_of(info, ctx)

    def save(folder: Path, losses: list[float]) -> None:
        if tokenizer is not None:
            tokenizer().save_pretrained(folder)
        save_lm(folder, module, figures(), losses, started)

    return Course(LmModel(info, module, tokenizer), recipe, lm_groups(module, recipe), lessons, save)
