"""The built-in family ``tiny-bert``: text classifiers of BERT's architecture, 25 to 448 thousand parameters in their blocks, trained on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch

from isoflop.core.errors import unknown
from isoflop.core.hashing import content_hash
from isoflop.core.knobs import check_knobs
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint, Model, ModelInfo
from isoflop.models.checkpoints.encoder import HOOKS, count_blocks
from isoflop.models.family import FAMILIES, ModelFamily, without_defaults
from isoflop.models.hooks.matrices import matrix_shapes
from isoflop.models.lm import tokenizer_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.sentence import Sentence
from isoflop.models.text_classifier import CLASSIFIER, LABELLED_TEXTS, ClassifierInfo, TextClassifier
from isoflop.models.tiny.bert_training import (
    LENGTH,
    SIZES,
    VOCABULARY,
    Recipe,
    ReviewTokenizer,
    TinyBertStage,
    bert_config,
)
from isoflop.models.training.taught import Taught
from isoflop.models.worlds import reviews as world

FAMILY = "tiny-bert"


class TinyBert(ModelFamily):
    """``BertForSequenceClassification`` in three sizes, trained by ``Recipe`` to tell how many stars a review gives.

    N counts the transformer blocks; embeddings, pooler and classifier are left out. There is no pre-training: weights learn from
    the labels alone.
    """

    name: ClassVar[str] = FAMILY

    def members(self) -> list[str]:
        """``tiny-bert/d32``, ``d64`` and ``d96``."""
        return [f"{FAMILY}/{size}" for size in SIZES]

    def info(self, ref: str, options: Mapping[str, Any]) -> ClassifierInfo:
        """Describe a member; ``options`` are fields of ``Recipe``."""
        size = ref.partition("/")[2]
        if size not in SIZES:
            raise unknown("model", ref, self.members())
        return _info(size, tuple(sorted(check_knobs(Recipe, options, f"model {ref}").items())))

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ``Recipe`` that differ from its defaults."""
        return without_defaults(Recipe, options, f"model {ref}")

    def weights(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int) -> Stage:
        """The training stage: size, recipe, seed and reviews."""
        self.trained_with(info, methods)  # refuses what would take part
        return TinyBertStage(info.ref.partition("/")[2], seed, info.options, world.VERSION, ReviewTokenizer())

    def calibration_stages(self, info: ModelInfo, methods: tuple[Taught, ...]) -> tuple[Stage, ...]:
        """The tokenizer, and a user's own text."""
        own = _own(info)
        return (ReviewTokenizer(), *(own.text.stages() if own.text is not None else ()))

    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> Model:
        """The trained model on the worker's device."""
        from transformers import BertForSequenceClassification

        if weights is None:
            raise ValueError(f"model {info.ref} has no weights of its own: pass the stage that weights() gives")
        checkpoint: Checkpoint = ctx.get(weights)
        with no_progress_bars():
            module = BertForSequenceClassification.from_pretrained(
                checkpoint.folder, local_files_only=True, use_safetensors=True
            )
        tokenizer = tokenizer_of(info, ctx)
        assert tokenizer is not None
        return TextClassifier(_own(info), module.to(ctx.device).eval().requires_grad_(False), tokenizer)


@lru_cache(maxsize=256)
def _info(size: str, options: tuple[tuple[str, Any], ...]) -> ClassifierInfo:
    from transformers import BertForSequenceClassification

    shape, tokenizer = SIZES[size], ReviewTokenizer()
    with torch.device("meta"):
        skeleton = BertForSequenceClassification(bert_config(shape))
    stage = {"stage": TinyBertStage.version, "tokens": tokenizer.key, "reviews": world.VERSION}
    return ClassifierInfo(
        ref=f"{FAMILY}/{size}",
        family=FAMILY,
        version=content_hash({**stage, "recipe": dict(options)}, 12),
        n_params=count_blocks(skeleton),
        hooks=HOOKS,
        offers=frozenset({LABELLED_TEXTS, "tokenizer"}),
        geometry={
            "width": shape.width,
            "layers": shape.layers,
            "heads": shape.heads,
            "vocab_size": VOCABULARY,
            "positions": LENGTH,
            "classes": len(world.STARS),
            "matrices": matrix_shapes(skeleton),
        },
        options=options,
        text=None,
        tokenizer=tokenizer,
        head=CLASSIFIER,
        sentence=Sentence(),
        tokens_at_most=LENGTH,
        labels=world.STARS,
    )


def _own(info: ModelInfo) -> ClassifierInfo:
    if not isinstance(info, ClassifierInfo):
        raise TypeError(f"{info.ref} was not described by this family")
    return info


FAMILIES.register(FAMILY)(TinyBert())
