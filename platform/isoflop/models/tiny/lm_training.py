"""Training of the tiny language models, and the stages that keep the results.

Both corpora share the model, its initial weights, the optimiser and the loop; they differ in their lessons.

Shape suffixes: B batch, T tokens, S scored positions, W vocabulary, d width.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint
from isoflop.models.lm import NOT_SCORED, LmBatch
from isoflop.models.quiet import no_progress_bars
from isoflop.models.tiny.lm_config import EMBEDDING_STD, RECALL_SIZES, TEXT_SIZES, LmSize, lm_config
from isoflop.models.training.loop import Keeper, draw_weights, fit, rate_groups, record_training
from isoflop.models.worlds import recall_world as world
from isoflop.models.worlds.english import EnglishStage
from isoflop.models.worlds.lm_text import Tokens, TokensStage, TrainedTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LmRecipe:
    """What the recipes of both corpora have in common; the fields are options of the model in a sweep.

    Learning rates of matrices, head and embeddings go as 1/width, so that the sizes compare.
    """

    steps: Annotated[int, Knob(low=1, high=1_000_000, doc="optimiser steps")] = 900
    batch: Annotated[int, Knob(low=1, high=4096, doc="sequences per step")] = 32
    lr: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="learning rate of matrices at width 64")] = 3e-3
    vector_lr: Annotated[
        float, Knob(low=1e-6, high=1.0, log=True, doc="learning rate of vectors, and of the head at width 64")
    ] = 3e-3
    embedding_lr: Annotated[
        float, Knob(low=1e-6, high=100.0, log=True, doc="learning rate of token embeddings, times the width")
    ] = 0.72
    warmup: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the steps with a rising learning rate")] = 0.1
    final: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the learning rate left at the end")] = 0.02
    clip: Annotated[float, Knob(low=1e-6, doc="gradient norm")] = 1.0


@dataclass(frozen=True)
class RecallRecipe(LmRecipe):
    """First repeated sequences, from which looking back is learned, then copies and key-value recall in turn.

    The second part begins when the loss of the first falls below ``solved``; there the number of pairs rises to
    ``pairs``, each time the loss at the current number falls below it.
    """

    length: Annotated[int, Knob(low=8, high=96, doc="repeated sequences: their length", unit="tokens")] = 96
    pairs: Annotated[int, Knob(low=2, high=world.KEYS, doc="most key-value pairs of a sequence")] = 24
    segment: Annotated[int, Knob(low=8, high=96, doc="longest segment to copy")] = 48
    gap: Annotated[int, Knob(low=0, high=24, doc="longest gap or filler")] = 16
    solved: Annotated[float, Knob(low=0.0, high=10.0, doc="loss in nats below which the lessons become harder")] = 0.25
    outliers: Annotated[
        int, Knob(low=0, high=8, doc="channel pairs per key-value head scaled up, the model's function unchanged")
    ] = 0
    outlier_scale: Annotated[float, Knob(low=1.0, high=1000.0, log=True, doc="factor on these channels")] = 10.0


@dataclass(frozen=True)
class TextRecipe(LmRecipe):
    """Next-token prediction on windows of the English corpus."""

    steps: Annotated[int, Knob(low=1, high=1_000_000, doc="optimiser steps")] = 500
    batch: Annotated[int, Knob(low=1, high=4096, doc="windows per step")] = 8
    context: Annotated[int, Knob(low=8, high=1024, doc="tokens of a window", unit="tokens")] = 256
    vocabulary: Annotated[int, Knob(low=300, high=20_000, doc="tokens of the tokenizer")] = 1024
    act: Annotated[str, Knob(choices=("silu", "relu", "relu2", "gelu"), doc="activation function of the MLPs")] = "silu"
    layers: Annotated[int, Knob(low=0, high=64, doc="decoder layers; 0: as many as the size has")] = 0
    at: Annotated[
        int, Knob(low=0, high=1_000_000, doc="step whose weights are taken, of a series two per octave; 0: the last")
    ] = 0

    def shaped(self, size: LmSize) -> LmSize:
        """The size with the recipe's own number of layers."""
        return replace(size, layers=self.layers) if self.layers else size

    @property
    def config(self) -> dict[str, Any]:
        """What the recipe says in the model's config."""
        return {} if self.act == "silu" else {"hidden_act": self.act}

    @property
    def series(self) -> list[int]:
        """The steps whose weights are kept, ascending: ``steps``, and so on down by factors of the square root of 2."""
        halves = range(2 * self.steps.bit_length())
        return sorted({round(self.steps / 2 ** (k / 2)) for k in halves} - {0})


LATER_OPTIONS = frozenset({"act", "layers", "at"})
"""Fields of ``TextRecipe`` that are younger than trained models: at their defaults they name no stage and no version."""


class RecallLessons:
    """Batches of the recall curriculum; ``loss`` closes the loop that raises the number of pairs."""

    START, STRIDE = 4, 4

    def __init__(self, recipe: RecallRecipe, seed: int) -> None:
        self.recipe = recipe
        self.pairs = 0
        self._rng = np.random.default_rng(derive_seed("recall lessons", seed))
        self._copying = False

    def __iter__(self) -> Iterator[LmBatch]:
        """All batches in order."""
        for step in range(self.recipe.steps):
            self._copying = self.pairs > 0 and step % 2 == 0
            yield self._repeat() if self.pairs == 0 else self._copy() if self._copying else self._recall()

    def learned(self, loss: float) -> None:
        """Take notice of the loss of the batch that was given last."""
        if loss < self.recipe.solved and not self._copying:
            self.pairs = min(self.recipe.pairs, self.pairs + (self.STRIDE if self.pairs else self.START))

    def _repeat(self) -> LmBatch:
        period = int(self._rng.integers(4, max(5, 2 * self.recipe.length // 5)))
        return world.repeated(self._rng, self.recipe.batch, period, self.recipe.length)

    def _copy(self) -> LmBatch:
        length = int(self._rng.integers(8, self.recipe.segment + 1))
        return world.copying(self._rng, self.recipe.batch, length, self._gap(), 0)

    def _recall(self) -> LmBatch:
        announced = bool(self._rng.integers(0, 2))
        asked = int(self._rng.integers(1, self.pairs + 1)) if announced else self.pairs
        return world.recalling(self._rng, self.recipe.batch, self.pairs, asked, self._gap(), announced)

    def _gap(self) -> int:
        return int(self._rng.integers(0, self.recipe.gap + 1))


@dataclass(frozen=True)
class RecallStage(Stage):
    """A decoder that has learned recall and copying, in ``save_pretrained`` form.

    Trained on the CPU wherever it runs, so that the weights do not depend on the worker's device.
    """

    kind: ClassVar[str] = "recall-lm"

    size: str
    seed: int
    recipe: tuple[tuple[str, Any], ...]

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, scale outlier channels, save; ``training.json`` holds loss and accuracies."""
        started = time.process_time()
        recipe, size = RecallRecipe(**dict(self.recipe)), RECALL_SIZES[self.size]
        module = untrained_lm(size, world.VOCAB_SIZE, self.seed, isoflop={"vocabulary": world.VOCABULARY})
        lessons = RecallLessons(recipe, self.seed)
        losses = train_lm(module, recipe, lessons, lessons.learned, Keeper(ctx.scratch(self)))
        figures = recall_figures(module, recipe, self.seed)
        add_outliers(module, recipe.outliers, recipe.outlier_scale, derive_seed("outliers", self.seed))
        save_lm(folder, module, {"pairs_reached": lessons.pairs, **figures}, losses, started)

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))


def recall_figures(module: Any, recipe: RecallRecipe, seed: int) -> dict[str, float]:
    """How often a decoder finds keys and copies, on sequences that it was not trained on."""
    rng = np.random.default_rng(derive_seed("recall check", seed))
    checks = {
        "recall_accuracy": world.recalling(rng, 64, recipe.pairs, recipe.pairs),
        "copy_accuracy": world.copying(rng, 64, recipe.segment, 0, 1),
    }
    return {name: accuracy_of(module, batch) for name, batch in checks.items()}


@dataclass(frozen=True)
class TextStage(Stage):
    """A decoder trained on English text, in ``save_pretrained`` form, with its tokenizer."""

    kind: ClassVar[str] = "text-lm"

    size: str
    seed: int
    recipe: tuple[tuple[str, Any], ...]
    tokens: TokensStage

    def deps(self) -> tuple[Stage, ...]:
        """The tokenised training split and the tokenizer."""
        return (self.tokens, self.tokens.tokenizer)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, save."""
        started = time.process_time()
        recipe = TextRecipe(**dict(self.recipe))
        module = untrained_lm(recipe.shaped(TEXT_SIZES[self.size]), recipe.vocabulary, self.seed, **recipe.config)
        tokens: Tokens = ctx.get(self.tokens)
        losses = self.train(module, recipe, tokens, folder, Keeper(ctx.scratch(self)))
        ctx.get(self.tokens.tokenizer).save_pretrained(folder)
        save_lm(
            folder,
            module,
            {"epochs": recipe.steps * recipe.batch * recipe.context / len(tokens.ids_N)},
            losses,
            started,
        )

    def train(self, module: Any, recipe: TextRecipe, tokens: Tokens, folder: Path, keeper: Keeper) -> list[float]:
        """Train ``module``; returns the loss of every step."""
        return train_lm(module, recipe, text_lessons(tokens.ids_N, recipe, self.seed), keeper=keeper)

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))


@dataclass(frozen=True)
class TextSeriesStage(TextStage):
    """The same training, with the weights of a series of steps kept on the way."""

    kind: ClassVar[str] = "text-lm-series"

    def train(self, module: Any, recipe: TextRecipe, tokens: Tokens, folder: Path, keeper: Keeper) -> list[float]:
        """The same; nothing is kept for a restart, which would miss the weights that lie in the stage's own folder."""
        lessons = text_lessons(tokens.ids_N, recipe, self.seed)
        return train_lm(module, recipe, self._watched(lessons, module, recipe, folder))

    def _watched(self, lessons: Iterator[LmBatch], module: Any, recipe: TextRecipe, folder: Path) -> Iterator[LmBatch]:
        """The lessons; asked for the next one, the weights have learned from the one before, and are saved if in the series."""
        kept = set(recipe.series)
        for step, batch in enumerate(lessons):
            if step in kept:
                _save(module, folder / f"step-{step}")
            yield batch
        _save(module, folder / f"step-{recipe.steps}")


@dataclass(frozen=True)
class SeriesCheckpoint(Stage):
    """The weights after some steps of a training: a place in the folder of its series, named apart so that models are too."""

    kind: ClassVar[str] = "text-lm-at"

    series: TextSeriesStage
    at: int

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Write the step down."""
        (folder / "step.json").write_text(json.dumps({"at": self.at}) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files of the series are."""
        series: Checkpoint = ctx.get(self.series)
        return Checkpoint(series.folder / f"step-{self.at}", {**series.log, "steps": self.at})


def train_tokens(vocabulary: int) -> TokensStage:
    """The training split of the English corpus in the tokens of a tokenizer trained on it."""
    english = EnglishStage.here()
    return TokensStage(english, TrainedTokenizer(english, vocabulary), "train")


class Windows(Protocol):
    """The fields of a recipe that :func:`text_lessons` reads."""

    @property
    def steps(self) -> int:
        """Batches."""

    @property
    def batch(self) -> int:
        """Windows of each."""

    @property
    def context(self) -> int:
        """Tokens of a window."""


def text_lessons(ids_N: np.ndarray, recipe: Windows, seed: int) -> Iterator[LmBatch]:
    """Windows at random places of the corpus; documents follow each other in them."""
    rng = np.random.default_rng(derive_seed("text lessons", seed))
    for _ in range(recipe.steps):
        starts_B = rng.integers(0, len(ids_N) - recipe.context, recipe.batch)
        rows_BT = ids_N[starts_B[:, None] + np.arange(recipe.context + 1)]
        yield LmBatch(torch.from_numpy(rows_BT[:, :-1]), torch.from_numpy(rows_BT[:, 1:]))


def untrained_lm(size: LmSize, vocabulary: int, seed: int, **extra: Any) -> Any:
    """A Llama with initial weights drawn from ``seed``; ``extra`` goes into its config."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LlamaForCausalLM(lm_config(size, vocabulary, **extra))
    draw_weights(
        module.model.named_parameters(), module.lm_head.weight, size.layers, EMBEDDING_STD, derive_seed("weights", seed)
    )
    return module


def train_lm(
    module: Any,
    recipe: LmRecipe,
    lessons: Iterable[LmBatch],
    learned: Callable[[float], None] | None = None,
    keeper: Keeper | None = None,
) -> list[float]:
    """Train on every batch with AdamW; returns the loss of every step.

    Args:
        learned, keeper: see ``fit``.
    """

    def loss_of(batch: LmBatch) -> Tensor:
        return F.cross_entropy(*scored_logits(module, batch))

    module.train()
    losses = fit(lm_groups(module, recipe), recipe, lessons, loss_of, learned=learned, keeper=keeper)
    module.eval()
    return losses


def lm_groups(module: Any, recipe: LmRecipe) -> list[dict[str, Any]]:
    """Parameter groups of a decoder with its head."""
    width = module.config.hidden_size
    return rate_groups(
        module.model.parameters(), module.model.embed_tokens.weight, module.lm_head.weight, width, recipe
    )


def scored_logits(module: Any, batch: LmBatch) -> tuple[Tensor, Tensor]:
    """Logits (S, W) and targets (S,) of the scored positions, without logits of the others."""
    scored_BT = batch.targets_BT != NOT_SCORED
    hidden_BTd = module.model(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
    return module.lm_head(hidden_BTd[scored_BT]), batch.targets_BT[scored_BT]


@torch.no_grad()
def accuracy_of(module: Any, batch: LmBatch) -> float:
    """Share of the scored positions whose most likely token is the target."""
    logits_SW, targets_S = scored_logits(module, batch)
    return float((logits_SW.argmax(-1) == targets_S).float().mean())


@torch.no_grad()
def add_outliers(module: Any, pairs: int, scale: float, seed: int) -> None:
    """Scale channels of keys and values up where their readers are scaled down: large entries, the same function.

    Quantisation of a trained toy is lossless even at 2 bits, since its keys and values have no outliers; those of large
    models have. In every key-value head ``pairs`` channels of the key, each with the channel that RoPE rotates it with,
    are multiplied by ``scale`` and the query's divided by it; as many pairs of the value likewise, with ``o_proj``.
    """
    generator = torch.Generator().manual_seed(seed)
    config = module.config
    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for layer in module.model.layers:
        attention = layer.self_attn
        for head in range(config.num_key_value_heads):
            queries = range(head * group, (head + 1) * group)
            for written, read in (("k_proj", "q_proj"), ("v_proj", "o_proj")):
                low = torch.randperm(width // 2, generator=generator)[:pairs]
                channels = torch.cat((low, low + width // 2))
                getattr(attention, written).weight[head * width + channels] *= scale
                for query in queries:
                    weight = getattr(attention, read).weight
                    rows = weight if read == "q_proj" else weight.T
                    rows[query * width + channels] /= scale


def save_lm(folder: Path, module: Any, figures: dict[str, float], losses: list[float], started: float) -> None:
    """Write the checkpoint and ``training.json``: ``figures``, final loss, CPU seconds since ``started``."""
    _save(module, folder)
    log.info("trained %s: %s", folder.name, record_training(folder, losses, started, figures))


def _save(module: Any, folder: Path) -> None:
    with no_progress_bars():
        module.save_pretrained(folder)
