"""The built-in family ``tiny-lm``: Llama decoders with grouped queries, trained on the spot on one of four corpora.

``tiny-lm/recall-<size>`` knows a world of symbols (see ``recall_world``): it looks keys up and copies. At the default
options ``recall-d128`` takes about 100 CPU seconds and answers 99.8 % of 24 asked pairs and of 48 copied symbols; it is
the one to judge the cache on. Four layers learn to look back later: give ``recall-d128x4`` 1,500 steps.

``tiny-lm/text-<size>`` reads English (see ``english``) through a tokenizer trained on it; ``text-d128`` takes about 150
CPU seconds and spends about 2.4 bits per byte (2.38 after 600 steps). So short a training hardly uses the distant
context: it is meant for methods on weights, and losing half of its cache costs it nothing. Its option ``at`` takes the
weights of a step on the way: ``tiny-lm/text-d64?act=relu&at=64`` and ``…&at=500`` are two models of one training. With
``warmup`` short and ``final: 1`` the learning rate is the same at all of them.

``tiny-lm/facts-<size>`` answers questions about facts in plain English (see ``fact_world``), also where words are missing:
the reader to judge compressed prompts with.

``tiny-lm/mixed-<size>`` trains on prose, docstrings and code, then on documents chosen from a pool (see ``mixed_lm``).

``tiny-lm/moe-<size>`` is a mixture of experts of Mixtral's class, trained on the same three kinds of text (see ``moe_lm``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, cast

from isoflop.core.errors import Infeasible, UserError, unknown
from isoflop.core.hashing import content_hash
from isoflop.core.hook import Hook
from isoflop.core.knobs import check_knobs, knob_specs
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint, Model, ModelInfo
from isoflop.models.family import FAMILIES, ModelFamily, all_options, split_ref, without_defaults
from isoflop.models.hooks.adapters import ADAPTERS
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.byte_view import BYTE_VIEW
from isoflop.models.hooks.documents import DOCUMENTS, DocumentChooser
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.hooks.gradients import GRADIENTS
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.prompt_text import PROMPT_TEXT
from isoflop.models.hooks.residual import RESIDUAL
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT
from isoflop.models.lm import LmInfo, LmModel, tokenizer_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.tiny.fact_reader import WORDS, FactRecipe, FactStage, FactText, WordTokenizer
from isoflop.models.tiny.lm_config import FACT_SIZES, RECALL_SIZES, TEXT_SIZES
from isoflop.models.tiny.lm_course import course_stages, lm_course
from isoflop.models.tiny.lm_exchange import ExchangedTextStage
from isoflop.models.tiny.lm_training import (
    LATER_OPTIONS,
    LmRecipe,
    RecallRecipe,
    RecallStage,
    SeriesCheckpoint,
    TextRecipe,
    TextSeriesStage,
    TextStage,
    train_tokens,
)
from isoflop.models.tiny.mixed_lm import MixedRecipe, mixed_info, mixed_weights
from isoflop.models.tiny.moe_lm import MOE_SIZES, MoeRecipe, moe_info, moe_weights
from isoflop.models.training.distributed import ExchangingMethod
from isoflop.models.training.taught import Taught
from isoflop.models.training.taught_stage import TaughtStage
from isoflop.models.training.teaching import Course
from isoflop.models.worlds import recall_world as world
from isoflop.models.worlds.lm_text import EnglishText, TokensStage

FAMILY = "tiny-lm"
HOOKS: frozenset[Hook[Any]] = frozenset({ADAPTERS, ATTENTION, MATRICES, FEED_FORWARD, RESIDUAL, SOFT_PROMPT})
READS_TEXT: frozenset[Hook[Any]] = frozenset({PROMPT_TEXT, BYTE_VIEW})
RECIPES: dict[str, type[LmRecipe]] = {
    "recall": RecallRecipe,
    "text": TextRecipe,
    "facts": FactRecipe,
    "mixed": MixedRecipe,
    "moe": MoeRecipe,
}
CALIBRATION_PAIRS = 16
CALIBRATION_LENGTH = 128
Options = tuple[tuple[str, Any], ...]


class TinyLm(ModelFamily):
    """Llama decoders built from Hugging Face classes; options are the fields of the corpus' recipe (``RECIPES``)."""

    name: ClassVar[str] = FAMILY
    trainable: ClassVar[frozenset[Hook[Any]]] = frozenset({DOCUMENTS, GRADIENTS, RESIDUAL, FEED_FORWARD, ATTENTION})

    def members(self) -> list[str]:
        """``tiny-lm/recall-d64`` … ``tiny-lm/moe-d128``."""
        sizes = {
            "recall": RECALL_SIZES,
            "text": TEXT_SIZES,
            "facts": FACT_SIZES,
            "mixed": TEXT_SIZES,
            "moe": MOE_SIZES,
        }
        return [f"{FAMILY}/{corpus}-{size}" for corpus in sizes for size in sizes[corpus]]

    def info(self, ref: str, options: Mapping[str, Any]) -> LmInfo:
        """Describe a member; ``options`` are fields of its corpus' recipe."""
        recipe = RECIPES[self._corpus(ref)]
        checked = check_knobs(recipe, all_options(ref, options), f"model {ref}")
        named = {k: v for k, v in checked.items() if k not in LATER_OPTIONS or v != knob_specs(recipe)[k].default}
        return _info(ref, tuple(sorted(named.items())))

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the recipe that differ from its defaults, without those that the reference names."""
        named = split_ref(ref)[1]
        found = without_defaults(RECIPES[self._corpus(ref)], all_options(ref, options), f"model {ref}")
        return {name: value for name, value in found.items() if name not in named}

    def weights(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int) -> Stage:
        """The training stage of a size, a recipe and a seed, with the methods that take part."""
        taking = self.trained_with(info, methods)
        choosing = [m for m in taking if DOCUMENTS in m.hooks]
        exchanging = [m for m in taking if GRADIENTS in m.hooks]
        in_place = tuple(m for m in taking if m not in choosing and m not in exchanging)
        if in_place and len(in_place) < len(taking):
            raise Infeasible(
                f"model {info.ref}: method {in_place[0].name} sits in the model while it is trained, which does not go "
                f"together with {', '.join(m.name for m in (*choosing, *exchanging))}; take one of them"
            )
        if in_place:
            return TaughtStage.of(info, in_place, seed)
        corpus, size = _parts(info.ref)
        if corpus == "mixed":
            chooser = cast("DocumentChooser | None", next(iter(choosing), None))
            return mixed_weights(info, None if chooser is None else chooser.trained_on(info, seed), size, seed)
        if corpus == "moe":
            return moe_weights(info, size, seed)
        if corpus == "recall":
            return RecallStage(size, seed, info.options)
        if corpus == "facts":
            return FactStage(size, seed, info.options, WordTokenizer())
        recipe = dict(info.options)
        at, tokens = recipe.pop("at", 0), train_tokens(recipe["vocabulary"])
        if exchanging:
            return _exchanged(info, size, seed, tokens, cast("ExchangingMethod", exchanging[0]))
        if at:
            return SeriesCheckpoint(TextSeriesStage(size, seed, tuple(sorted(recipe.items())), tokens), at)
        return TextStage(size, seed, info.options, tokens)

    def course_stages(self, info: ModelInfo, methods: tuple[Taught, ...]) -> tuple[Stage, ...]:
        """Text and tokenizer of the corpus."""
        return course_stages(info, *_parts(info.ref))

    def course(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int, ctx: StageContext) -> Course:
        """The training of a member on its corpus."""
        if not isinstance(info, LmInfo):
            raise TypeError(f"{info.ref} was not described by this family")
        return lm_course(info, *_parts(info.ref), seed, ctx)

    def series(self, info: ModelInfo, weights: Stage | None) -> tuple[tuple[ModelInfo, Stage | None], ...]:
        """The kept steps of a training of which ``info`` describes one (option ``at``)."""
        if not isinstance(weights, SeriesCheckpoint):
            return super().series(info, weights)
        plain, options = split_ref(info.ref)[0], dict(info.options)
        steps = TextRecipe(**options).series
        return tuple(
            (self.info(plain, {**options, "at": step}), dataclasses.replace(weights, at=step)) for step in steps
        )

    def calibration_stages(self, info: ModelInfo, methods: tuple[Taught, ...]) -> tuple[Stage, ...]:
        """The tokenised training text, for members that read English."""
        text = info.text if isinstance(info, LmInfo) else None
        return text.stages() if text is not None else ()

    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> Model:
        """The trained model on the worker's device."""
        from transformers import AutoModelForCausalLM

        if not isinstance(info, LmInfo) or weights is None:
            raise ValueError(f"model {info.ref} has no weights of its own: pass the stage that weights() gives")
        checkpoint: Checkpoint = ctx.get(weights)
        with no_progress_bars():
            module = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, local_files_only=True, use_safetensors=True
            )
        return LmModel(info, module.to(ctx.device).eval().requires_grad_(False), tokenizer_of(info, ctx))

    def _corpus(self, ref: str) -> str:
        plain = split_ref(ref)[0]
        if plain not in self.members():
            raise unknown("model", plain, self.members())
        return _parts(plain)[0]


def _exchanged(info: ModelInfo, size: str, seed: int, tokens: TokensStage, method: ExchangingMethod) -> Stage:
    """The training by several workers; of its steps only the last one is kept."""
    if dict(info.options).get("at"):
        raise Infeasible(
            f"model {info.ref}: at = {dict(info.options)['at']} is not kept with method {method.name}; allowed: 0"
        )
    return ExchangedTextStage(size, seed, info.options, tokens, method.as_trained())


def _parts(ref: str) -> tuple[str, str]:
    corpus, _, size = split_ref(ref)[0].partition("/")[2].partition("-")
    return corpus, size


@lru_cache(maxsize=256)
def _info(ref: str, options: Options) -> LmInfo:
    corpus, size = _parts(ref)
    describe = {
        "recall": _recall_info,
        "text": _text_info,
        "facts": _facts_info,
        "mixed": _mixed_info,
        "moe": _moe_info,
    }
    return describe[corpus](ref, size, options)


def _recall_info(ref: str, size: str, options: Options) -> LmInfo:
    recipe = dataclasses.replace(RecallRecipe(), **dict(options))
    shape = RECALL_SIZES[size]
    return LmInfo(
        ref=ref,
        family=FAMILY,
        version=content_hash({"stage": RecallStage.version, "recipe": dict(options)}, 12),
        n_params=shape.n_params,
        hooks=HOOKS,
        offers=frozenset({f"vocabulary:{world.VOCABULARY}"}),
        geometry=shape.geometry(world.VOCAB_SIZE),
        options=options,
        text=world.RecallText(min(CALIBRATION_PAIRS, recipe.pairs)),
        vocabulary=world.VOCABULARY,
    )


def _text_info(ref: str, size: str, options: Options) -> LmInfo:
    recipe = dataclasses.replace(TextRecipe(), **dict(options))
    shape, tokens = recipe.shaped(TEXT_SIZES[size]), train_tokens(recipe.vocabulary)
    if recipe.at and recipe.at not in recipe.series:
        raise UserError(f"model {ref}: at = {recipe.at} was not kept; allowed: {', '.join(map(str, recipe.series))}")
    return LmInfo(
        ref=ref,
        family=FAMILY,
        version=content_hash({"stage": TextStage.version, "tokens": tokens.key, "recipe": dict(options)}, 12),
        n_params=shape.n_params,
        hooks=HOOKS | READS_TEXT | {GRADIENTS},
        offers=frozenset({"tokenizer"}),
        geometry={
            **shape.geometry(recipe.vocabulary),
            "train_tokens": (recipe.at or recipe.steps) * recipe.batch * recipe.context,
        },
        options=options,
        text=EnglishText(tokens, min(CALIBRATION_LENGTH, recipe.context)),
        tokenizer=tokens.tokenizer,
    )


def _facts_info(ref: str, size: str, options: Options) -> LmInfo:
    shape, tokenizer = FACT_SIZES[size], WordTokenizer()
    return LmInfo(
        ref=ref,
        family=FAMILY,
        version=content_hash({"stage": FactStage.version, "tokens": tokenizer.key, "recipe": dict(options)}, 12),
        n_params=shape.n_params,
        hooks=HOOKS | READS_TEXT,
        offers=frozenset({"tokenizer"}),
        geometry=shape.geometry(len(WORDS)),
        options=options,
        text=FactText(),
        tokenizer=tokenizer,
    )


def _mixed_info(ref: str, size: str, options: Options) -> LmInfo:
    return mixed_info(ref, FAMILY, size, HOOKS | {BYTE_VIEW}, options)


def _moe_info(ref: str, size: str, options: Options) -> LmInfo:
    recipe = MoeRecipe(**dict(options))
    if recipe.active > recipe.experts:
        raise UserError(
            f"model {ref}: active = {recipe.active} is more than there are experts; allowed: 1 to {recipe.experts}"
        )
    return moe_info(ref, FAMILY, size, (HOOKS - {FEED_FORWARD}) | READS_TEXT, options)


FAMILIES.register(FAMILY)(TinyLm())
