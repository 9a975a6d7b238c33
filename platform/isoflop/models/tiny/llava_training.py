"""Joint training of a tiny vision-language model with its compressor, and the stage that keeps the result.

One cell is (language-model size, visual-token method with its knobs, seed): one multi-task model trained 1:1 on reading
and recall, shared by the jobs of both tasks. The recipe's learning rates follow the width, so that the sizes compare.

Shape suffixes: S steps, B batch, Q question tokens, P patches, D vision width, V visual tokens, d language width.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.hashing import content_hash, derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint
from isoflop.models.features import FeatureTable, LayerKey, TowerSource, Vision
from isoflop.models.hooks.visual_tokens import TaughtCompressor, VisualInput
from isoflop.models.quiet import no_progress_bars
from isoflop.models.tiny.llava_config import SIZES, initialise, llava_config
from isoflop.models.tiny.vision import KINDS, TinyTowerStage, save_preprocessing
from isoflop.models.training.last_position import LastPosition
from isoflop.models.training.loop import Keeper, Rates, fit, rate_groups, record_training
from isoflop.models.vlm_info import HOOKS, VlmInfo
from isoflop.models.worlds import digit_world as world
from isoflop.models.worlds.lessons import Lesson, Lessons

if TYPE_CHECKING:
    from transformers import LlavaConfig

FAMILY = "tiny-llava"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a tiny model is trained; the fields are options of the model in a sweep.

    The learning rate of a matrix goes as 1/width, that of the head starting from ``vector_lr``; vectors and the
    projector's input layer have the same rate at every width; token embeddings have ``embedding_lr``/width. The last
    two decide when a narrow model learns to attend to a place: with the matrix rate on embeddings, or with half of
    ``vector_lr``, it does so late or never at some seeds and reads many tokens badly, which looks like an effect of size.
    """

    steps: Annotated[int, Knob(low=1, high=100_000, doc="optimiser steps")] = 900
    batch: Annotated[int, Knob(low=2, high=4096, doc="examples per step, half of each task")] = 32
    lr: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="learning rate of matrices at width 64")] = 1.5e-3
    vector_lr: Annotated[
        float,
        Knob(
            low=1e-6,
            high=1.0,
            log=True,
            doc="learning rate of vectors and the projector's input layer, and of the head at width 64",
        ),
    ] = 3e-3
    embedding_lr: Annotated[
        float, Knob(low=1e-6, high=100.0, log=True, doc="learning rate of token embeddings, times the width")
    ] = 1.4
    warmup: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the steps with a rising learning rate")] = 0.1
    final: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the learning rate left at the end")] = 0.02
    clip: Annotated[float, Knob(low=1e-6, doc="gradient norm")] = 1.0
    reading_scenes: Annotated[int, Knob(low=32, high=1_000_000, doc="training scenes for reading")] = 6144
    coarse_scenes: Annotated[int, Knob(low=32, high=1_000_000, doc="training scenes for recall")] = 2048
    tower_steps: Annotated[int, Knob(low=1, high=100_000, doc="optimiser steps of the vision tower")] = 150
    tower: Annotated[
        str,
        Knob(
            choices=tuple(KINDS),
            doc="dense: one layer, patches only; cls: four layers, a class token trained on the whole image, sparse scenes",
        ),
    ] = "dense"
    joint: Annotated[
        bool,
        Knob(doc="train with the visual-token method in place; false: with all tokens, methods are applied afterwards"),
    ] = True

    @property
    def lessons(self) -> Lessons:
        """Training scenes and questions."""
        return Lessons(self.reading_scenes, self.coarse_scenes, self.reading_scenes if self.tower == "cls" else 0)


LATER = (("tower", "dense"), ("joint", True))
"""Options that came after the first results, with their defaults: left out of a model's version, so that models that do
without them keep their names."""


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


class Bank:
    """Training features of several tower layers in memory, standardised when the compressor commutes with that."""

    def __init__(self, tables: Mapping[LayerKey, list[np.ndarray]], layer: int, standardise: bool) -> None:
        self.layer = layer
        self.x = {number: torch.from_numpy(np.concatenate(parts)) for number, parts in tables.items()}
        x_ND = self.x[layer].flatten(0, 1)
        self.mean_D, self.std_D = x_ND.mean(0), x_ND.std(0)
        self.standardised = standardise
        if standardise:
            self.x[layer] = (self.x[layer] - self.mean_D) / self.std_D

    def rows(self, rows_B: Tensor) -> dict[LayerKey, Tensor]:
        """What was read of the tower for some scenes, by key."""
        return {number: table.index_select(0, rows_B) for number, table in self.x.items()}

    @torch.no_grad()
    def fold(self, linear: nn.Linear) -> None:
        """Move the standardisation into the layer that reads the features, so that the model takes raw features."""
        if self.standardised:
            linear.weight.div_(self.std_D)
            linear.bias.sub_(linear.weight @ self.mean_D)


def bank_of(ctx: StageContext, features: Sequence[FeatureTable], info: VlmInfo, standardise: bool) -> Bank:
    """The features of some stages."""
    tables: dict[LayerKey, list[np.ndarray]] = {}
    for stage in features:
        tables.setdefault(stage.layer, []).append(ctx.get(stage))
    return Bank(tables, info.feature_layer, standardise)


def untrained_llava(size: str, recipe: Recipe, vision: Vision, seed: int) -> Any:
    """A ``LlavaForConditionalGeneration`` with a trained tower, frozen, and initial weights drawn from ``seed``."""
    return untrained_of(llava_config(SIZES[size], recipe.tower), vision, seed)


def untrained_of(config: LlavaConfig, vision: Vision, seed: int) -> Any:
    """The same by its config."""
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LlavaForConditionalGeneration(config)
    module.model.vision_tower.load_state_dict(vision.tower.state_dict())
    module.model.vision_tower.requires_grad_(False)
    initialise(module, derive_seed("weights", seed))
    return module


def llava_groups(module: Any, width: int, recipe: Rates) -> list[dict[str, Any]]:
    """Parameter groups of projector and language model."""
    projector, decoder = module.model.multi_modal_projector, module.model.language_model
    return rate_groups(
        [*projector.parameters(), *decoder.parameters()],
        module.get_input_embeddings().weight,
        module.lm_head.weight,
        width,
        recipe,
        fixed=[projector.linear_1.weight],
    )


class CellTrainer:
    """Trains a Hugging Face LLaVA module with a compressor in the loop on cached tower features.

    Args:
        module: the model, initialised; its tower is not touched.
        info: its description.
        method: the compressor.
        compressor: what ``method.build`` returned.
        recipe: see ``Recipe``.
        seed: of what the method draws at each step.
    """

    def __init__(
        self,
        module: Any,
        info: VlmInfo,
        method: TaughtCompressor,
        compressor: nn.Module | None,
        recipe: Recipe,
        seed: int = 0,
    ) -> None:
        self.module, self.info, self.method, self.compressor, self.recipe = module, info, method, compressor, recipe
        self.seed = seed
        self._projector = method.projector(compressor) or module.model.multi_modal_projector
        self._last_position = LastPosition(module.model.language_model)
        self._embed = module.get_input_embeddings()
        self.groups = self._groups()

    def run(self, steps: Iterator[Lesson], bank: Bank, keeper: Keeper | None = None) -> list[float]:
        """All steps; returns the loss of every step."""
        if keeper is not None and self.compressor is not None:
            keeper.modules = [self.compressor]

        def loss(numbered: tuple[int, Lesson]) -> Tensor:
            number, lesson = numbered
            view = self.view(bank.rows(lesson.rows_B), lesson.questions_BQ, lesson.rows_B)
            return self.loss(self.method.budgets(number, self.recipe.steps, self.seed), view, lesson)

        return fit(self.groups, self.recipe, enumerate(steps), loss, keeper=keeper, seed=self.seed)

    def loss(self, budgets: Sequence[tuple[float, Any]], view: VisualInput, lesson: Lesson) -> Tensor:
        """The mean over a step's budgets of the answers' cross-entropy, by their weights."""
        parts = [
            (weight, F.cross_entropy(self.logits(method, view, lesson.questions_BQ), lesson.answers_B))
            for weight, method in budgets
        ]
        if len(parts) == 1 and parts[0][0] == 1:
            return parts[0][1]
        return torch.stack([weight * loss for weight, loss in parts]).sum()

    def logits(self, method: TaughtCompressor, view: VisualInput, questions_BQ: Tensor) -> Tensor:
        """Logits of the answer, (B, vocabulary), with gradients."""
        found = method.compress(view, self.compressor)
        question_BQd = self._embed(questions_BQ) if found.question_BQd is None else found.question_BQd
        visual_BVd = self._projector(found.tokens_BVD)
        return self.module.lm_head(self._last_position(torch.cat((visual_BVd, question_BQd), dim=1)))

    def view(self, hidden: Mapping[LayerKey, Tensor], questions_BQ: Tensor, ids_B: Tensor) -> VisualInput:
        """The compressor's input for a training batch."""
        return VisualInput(
            x_BPD=hidden[self.info.feature_layer],
            hidden=hidden,
            grid=self.info.geometry["grid"],
            question_BQ=questions_BQ,
            question_mask_BQ=None,
            ids_B=ids_B,
            encode_text=self._encode_text,
            embed_text=self._embed_text,
        )

    @torch.no_grad()
    def _encode_text(self, ids_BQ: Tensor, mask_BQ: Tensor | None) -> Tensor:
        return self.module.model.language_model(input_ids=ids_BQ, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _embed_text(self, ids_BQ: Tensor) -> Tensor:
        return self._embed(ids_BQ)

    def _groups(self) -> list[dict[str, Any]]:
        own = [] if self.compressor is None else list(self.compressor.parameters())
        rest = llava_groups(self.module, self.info.geometry["width"], self.recipe)
        return [*([{"params": own, "lr": self.method.learning_rate}] if own else []), *rest]


@dataclass(frozen=True)
class CellStage(Stage):
    """A trained tiny model in ``save_pretrained`` form, with ``compressor.safetensors`` when its method has weights.

    Trained on the CPU wherever it runs, so that the weights do not depend on the worker's device.
    """

    version: ClassVar[str] = "1"
    kind: ClassVar[str] = "cell"

    size: str
    method: TaughtCompressor
    seed: int
    recipe: tuple[tuple[str, Any], ...]
    tower: TowerSource
    features: tuple[FeatureTable, ...]

    def deps(self) -> tuple[Stage, ...]:
        """The tower and the training features."""
        return (self.tower, *self.features)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, fold the features' standardisation into the projector, save."""
        started = time.process_time()
        recipe, method = Recipe(**dict(self.recipe)), self.method
        info = tiny_info(self.size, recipe)
        module = untrained_llava(self.size, recipe, ctx.get(self.tower), self.seed)
        compressor = method.untrained(info, self.seed)
        bank = bank_of(ctx, self.features, info, standardise=method.commutes)
        trainer = CellTrainer(module, info, method, compressor, recipe, self.seed)
        if compressor is not None:
            sample = torch.arange(0, len(bank.x[info.feature_layer]), 8)
            method.fit_inputs(
                compressor, trainer.view(bank.rows(sample), torch.zeros(len(sample), 1, dtype=torch.long), sample)
            )
        lessons = recipe.lessons.steps(recipe.steps, recipe.batch, self.seed)
        losses = trainer.run(lessons, bank, Keeper(ctx.scratch(self)))
        bank.fold(module.model.multi_modal_projector.linear_1)
        save_cell(folder, module, compressor)
        record = record_training(folder, losses, started)
        log.info("trained %s with %s, seed %d: %s", self.size, method.name, self.seed, record)

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))


def recipe_fields(recipe: Recipe) -> tuple[tuple[str, Any], ...]:
    """The recipe as plain (name, value) pairs, without the options in ``LATER`` at their defaults."""
    return tuple(pair for pair in dataclasses.asdict(recipe).items() if pair not in LATER)


def save_cell(folder: Path, module: Any, compressor: nn.Module | None, side: int = world.IMAGE_SIDE) -> None:
    """Write the model in ``save_pretrained`` form, its preprocessing, and the compressor's weights.

    Args:
        side: of the images that the tower wants, in pixels.
    """
    from safetensors.torch import save_file

    with no_progress_bars():
        module.save_pretrained(folder)
    save_preprocessing(folder, side)
    if compressor is not None:
        save_file(
            {name: t.contiguous() for name, t in compressor.state_dict().items()}, folder / "compressor.safetensors"
        )
