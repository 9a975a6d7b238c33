"""``tiny-lm/mixed-<size>``: a decoder first trained on text of three domains, then on documents chosen from a pool.

The first training, on text of all domains, is one stage for every selection and every target. The second sees
``steps`` · ``batch`` · ``context`` tokens of the pool, or of what a data-selection method keeps of it, however much that
is. What is measured is held-out text of the ``target`` domain.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from isoflop.core.hashing import content_hash
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint, ModelInfo
from isoflop.models.hooks.documents import DOCUMENTS, DocumentSelection, SelectionSource
from isoflop.models.lm import LmBatch, LmInfo
from isoflop.models.quiet import no_progress_bars
from isoflop.models.tiny.lm_config import TEXT_SIZES
from isoflop.models.tiny.lm_training import LmRecipe, TextRecipe, TextStage, save_lm, train_lm, untrained_lm
from isoflop.models.training.loop import Keeper
from isoflop.models.worlds.lm_text import EnglishText, Tokens, TokensStage, TrainedTokenizer
from isoflop.models.worlds.text_domains import DOMAINS, DomainsStage
from isoflop.models.worlds.text_pool import TrainingPool, pool_lessons

CALIBRATION_LENGTH = 128
Fields = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class MixedRecipe(LmRecipe):
    """A first training on all domains, then one on documents of the pool at ``tuning`` times its learning rates."""

    steps: Annotated[int, Knob(low=1, high=1_000_000, doc="optimiser steps on the selection")] = 100
    batch: Annotated[int, Knob(low=1, high=4096, doc="windows per step")] = 16
    context: Annotated[int, Knob(low=8, high=1024, doc="tokens of a window", unit="tokens")] = 128
    vocabulary: Annotated[int, Knob(low=300, high=20_000, doc="tokens of the tokenizer")] = 512
    first_steps: Annotated[
        int, Knob(low=0, high=1_000_000, doc="steps of the first training; 0: the selection is all that is seen")
    ] = 400
    tuning: Annotated[
        float,
        Knob(low=1e-4, high=1.0, log=True, doc="learning rates on the selection over those of the first training"),
    ] = 0.3
    target: Annotated[str, Knob(choices=DOMAINS, doc="domain that is wanted: of the examples and of the test text")] = (
        "code"
    )
    pool: Annotated[int, Knob(low=4, high=100_000, doc="pieces of each domain in the pool")] = 250
    examples: Annotated[int, Knob(low=1, high=10_000, doc="target examples that methods may look at")] = 50
    piece: Annotated[int, Knob(low=16, high=4800, doc="characters of a piece of the pool")] = 600
    spread: Annotated[
        float, Knob(low=0.0, high=0.9, doc="pieces are (1 ± spread) times as long; 0: all of one length")
    ] = 0.0


CORPUS_FIELDS = frozenset({"target", "pool", "examples", "piece", "spread"})
"""Fields of the recipe that the stages' texts carry."""


@dataclass(frozen=True)
class SelectedTextStage(Stage):
    """A decoder trained on documents of a pool, in ``save_pretrained`` form, with its tokenizer.

    Args:
        recipe: of this training, without what the other fields carry.
        first: the stage whose weights it starts from; None starts from initial weights.
        pool: the pool in the model's tokens.
        selection: what is kept of it; None for everything.
    """

    kind: ClassVar[str] = "selected-text-lm"

    size: str
    seed: int
    recipe: Fields
    first: TextStage | None
    pool: TokensStage
    selection: SelectionSource | None

    def deps(self) -> tuple[Stage, ...]:
        """The first training, the pool and its tokenizer, the selection."""
        found = (self.first, self.pool, self.pool.tokenizer, self.selection)
        return tuple(stage for stage in found if stage is not None)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, save; ``training.json`` tells how often the kept documents were seen."""
        started = time.process_time()
        recipe = MixedRecipe(**dict(self.recipe))
        tokenizer, tokens = ctx.get(self.pool.tokenizer), ctx.get(self.pool)
        module = self._start(ctx, recipe.vocabulary)
        kept_K = self._kept(ctx, tokens)
        rates = {name: getattr(recipe, name) * recipe.tuning for name in ("lr", "vector_lr", "embedding_lr")}
        rows = pool_lessons(tokens, kept_K, recipe.steps, recipe.batch, recipe.context, self.seed)
        batches = (LmBatch(*pair) for pair in rows)
        keeper = Keeper(ctx.scratch(self))
        losses = train_lm(module, dataclasses.replace(recipe, **rates), batches, keeper=keeper)
        tokenizer.save_pretrained(folder)
        kept = float(np.diff(tokens.starts)[kept_K].sum())
        figures = {"kept_tokens": kept, "epochs": recipe.steps * recipe.batch * recipe.context / kept}
        save_lm(folder, module, figures, losses, started)

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))

    def _start(self, ctx: StageContext, vocabulary: int) -> Any:
        from transformers import LlamaForCausalLM

        if self.first is None:
            return untrained_lm(TEXT_SIZES[self.size], vocabulary, self.seed)
        checkpoint: Checkpoint = ctx.get(self.first)
        with no_progress_bars():
            return LlamaForCausalLM.from_pretrained(checkpoint.folder, local_files_only=True, use_safetensors=True)

    def _kept(self, ctx: StageContext, tokens: Tokens) -> np.ndarray:
        if self.selection is None:
            return np.arange(len(tokens.starts) - 1)
        selection: DocumentSelection = ctx.get(self.selection)
        return selection.kept_K


def mixed_info(ref: str, family: str, size: str, hooks: frozenset[Hook[Any]], options: Fields) -> LmInfo:
    """Describe a member."""
    recipe = MixedRecipe(**dict(options))
    shape, train = TEXT_SIZES[size], _tokens(recipe, "train")
    versions = {"stage": SelectedTextStage.version, "first": TextStage.version, "tokens": train.key}
    return LmInfo(
        ref=ref,
        family=family,
        version=content_hash({**versions, "recipe": dict(options)}, 12),
        n_params=shape.n_params,
        hooks=hooks | {DOCUMENTS},
        offers=frozenset({"tokenizer"}),
        geometry={
            **shape.geometry(recipe.vocabulary),
            "pool_documents": len(DOMAINS) * recipe.pool,
            "target_documents": recipe.examples,
        },
        options=options,
        text=EnglishText(train, min(CALIBRATION_LENGTH, recipe.context)),
        tokenizer=train.tokenizer,
        test=_tokens(recipe, f"test-{recipe.target}"),
        pool=TrainingPool(_corpus(recipe), _tokens(recipe, "pool"), recipe.target),
    )


def mixed_weights(info: ModelInfo, selection: SelectionSource | None, size: str, seed: int) -> SelectedTextStage:
    """The stage of the second training, on what is selected, or on the whole pool."""
    recipe = MixedRecipe(**dict(info.options))
    first = None
    if recipe.first_steps:
        shared = {f.name for f in dataclasses.fields(TextRecipe)} & {f.name for f in dataclasses.fields(recipe)}
        fields = {**{name: getattr(recipe, name) for name in shared}, "steps": recipe.first_steps}
        first = TextStage(size, seed, tuple(sorted(fields.items())), _tokens(recipe, "train"))
    own = tuple(pair for pair in info.options if pair[0] not in CORPUS_FIELDS | {"first_steps"})
    return SelectedTextStage(size, seed, own, first, _tokens(recipe, "pool"), selection)


def _corpus(recipe: MixedRecipe) -> DomainsStage:
    return DomainsStage.here(recipe.pool, recipe.examples, recipe.piece, recipe.spread)


def _tokens(recipe: MixedRecipe, split: str) -> TokensStage:
    corpus = _corpus(recipe)
    return TokensStage(corpus, TrainedTokenizer(corpus, recipe.vocabulary), split)
