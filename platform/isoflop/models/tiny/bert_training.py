"""Sizes, initial weights and training of the tiny text classifiers, and the stages that keep tokenizer and weights."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint
from isoflop.models.quiet import no_progress_bars
from isoflop.models.text_classifier import ClassifierBatch, drawn, labelled
from isoflop.models.training.loop import Keeper, fit, record_training
from isoflop.models.worlds import reviews as world
from isoflop.models.worlds.lm_text import TokenizerSource, read_tokenizer
from isoflop.models.worlds.words import SPECIAL_TOKENS, encoder_tokenizer

if TYPE_CHECKING:
    from transformers import BertConfig

log = logging.getLogger(__name__)
WORDS = world.vocabulary()
VOCABULARY = len(SPECIAL_TOKENS) + len(WORDS)
LENGTH = 40
"""Tokens of a review at most, special ones included: no review is longer."""
WORD_STD, PLACE_STD = 0.3, 0.1
QUIET = 0.3
"""Of queries and keys, so that attention begins nearly uniform: whatever a word says then reaches the first token."""
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class TinyBertSize:
    """One member: width, layers, heads; the MLP is four times as wide as the tokens."""

    width: int
    layers: int
    heads: int


SIZES = {"d32": TinyBertSize(32, 2, 2), "d64": TinyBertSize(64, 3, 4), "d96": TinyBertSize(96, 4, 6)}


@dataclass(frozen=True)
class Recipe:
    """How a tiny text classifier is trained from scratch; the fields are options of the model in a sweep.

    AdamW with warm-up and linear decay on reviews that are drawn anew for every step, all classes equally likely.
    """

    steps: Annotated[int, Knob(low=1, high=100_000, doc="optimiser steps")] = 1000
    batch: Annotated[int, Knob(low=1, high=4096, doc="reviews per step")] = 32
    lr: Annotated[
        float, Knob(low=1e-6, high=1.0, log=True, doc="peak learning rate at width 64; falls as the root of the width")
    ] = 2e-3
    warmup: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the steps with a rising learning rate")] = 0.1
    final: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the learning rate left at the end")] = 0.02
    clip: Annotated[float, Knob(low=1e-6, doc="gradient norm")] = 1.0


def bert_config(size: TinyBertSize) -> BertConfig:
    """The Hugging Face config."""
    from transformers import BertConfig

    return BertConfig(
        architectures=["BertForSequenceClassification"],
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=LENGTH,
        type_vocab_size=1,
        num_labels=len(world.STARS),
        id2label=dict(enumerate(world.STARS)),
        label2id={name: label for label, name in enumerate(world.STARS)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def untrained_bert(size: TinyBertSize, seed: int) -> Any:
    """A ``BertForSequenceClassification`` with fresh weights. Leaves torch's global random state alone.

    Matrices N(0, 1/fan_in), queries and keys 0.3 and the classifier 0.1 of that, embeddings of words N(0, 0.09) and of places
    N(0, 0.01), biases 0, norms 1. From Hugging Face's default (0.02 everywhere) so narrow a model learns more slowly.
    """
    from transformers import BertForSequenceClassification

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        module = BertForSequenceClassification(bert_config(size))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(_std(name, parameter) * torch.randn(parameter.shape, generator=generator))
    return module


def _std(name: str, parameter: torch.Tensor) -> float:
    if "embeddings" in name:
        return WORD_STD if "word" in name else PLACE_STD
    share = QUIET if ".query." in name or ".key." in name else 0.1 if "classifier" in name else 1.0
    return share * float(parameter.shape[1]) ** -0.5


def peak_rate(size: TinyBertSize, recipe: Recipe) -> float:
    """The learning rate of a width."""
    return recipe.lr * (64 / size.width) ** 0.5


def lessons(tokenizer: Any, recipe: Recipe, seed: int) -> Iterator[ClassifierBatch]:
    """All batches in order; the same for every size of a seed."""
    rng = np.random.default_rng(derive_seed("review lessons", seed))
    for _ in range(recipe.steps):
        yield labelled(tokenizer, drawn(rng, recipe.batch), LENGTH)


@dataclass(frozen=True)
class ReviewTokenizer(TokenizerSource):
    """A tokenizer with a token for every word and mark of the reviews, and the special ones of BERT.

    Args:
        words: in the order of the ids.
    """

    kind: ClassVar[str] = "review-tokenizer"

    words: tuple[str, ...] = WORDS

    def not_byte_level(self) -> str:
        """Other words are all the same to it."""
        return "its tokens are the words of a small world"

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Save in ``save_pretrained`` form."""
        encoder_tokenizer(self.words).save_pretrained(folder)

    def load(self, ctx: StageContext, folder: Path) -> Any:
        """The tokenizer."""
        return read_tokenizer(folder)


@dataclass(frozen=True)
class TinyBertStage(Stage):
    """A trained classifier in ``save_pretrained`` form, with its tokenizer.

    Trained on the CPU wherever it runs, so that the weights do not depend on the worker's device.
    """

    kind: ClassVar[str] = "tiny-bert"

    size: str
    seed: int
    recipe: tuple[tuple[str, Any], ...]
    world: str
    tokenizer: ReviewTokenizer

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, save."""
        started = time.process_time()
        recipe, size = Recipe(**dict(self.recipe)), SIZES[self.size]
        module = untrained_bert(size, derive_seed("tiny-bert weights", self.seed)).train()
        tokenizer = ctx.get(self.tokenizer)
        cpu = torch.device("cpu")
        losses = fit(
            module.parameters(),
            recipe,
            lessons(tokenizer, recipe, self.seed),
            lambda batch: F.cross_entropy(module(**batch.inputs(cpu)).logits, batch.labels_B),
            lr=peak_rate(size, recipe),
            betas=(0.9, 0.999),
            weight_decay=WEIGHT_DECAY,
            keeper=Keeper(ctx.scratch(self)),
        )
        module.eval()
        with no_progress_bars():
            module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        log.info("trained %s, seed %d: %s", self.size, self.seed, record_training(folder, losses, started))

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))
