"""Training a compressor on a checkpoint whose language model stays frozen: the compressor and the projector learn.

Shape suffixes: B batch, Q question tokens, P patches, D vision width.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint
from isoflop.models.family import family_of
from isoflop.models.features import FeatureTable, LayerKey
from isoflop.models.hooks.visual_tokens import (
    VISUAL_TOKENS,
    AllTokens,
    CompressedTokens,
    Compression,
    TaughtCompressor,
    VisualInput,
)
from isoflop.models.tiny.llava_training import Recipe
from isoflop.models.training.loop import Keeper, fit
from isoflop.models.training.teaching import followed
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch, VlmInfo
from isoflop.models.worlds.digit_world import VOCABULARY
from isoflop.models.worlds.lessons import Lesson, Lessons

STEPS = 900
BATCH = 32


@dataclass(eq=False)
class _Learning(Compression):
    """A compressor in training."""

    method: TaughtCompressor
    module: nn.Module | None
    projector: nn.Module | None
    layers: tuple[LayerKey, ...]
    seen: VisualInput | None = None

    def __call__(self, view: VisualInput) -> CompressedTokens:
        self.seen = view
        return self.method.compress(view, self.module)

    @torch.no_grad()
    def told(self, model: VlmModel, batch: VlmBatch) -> Tensor:
        """What the checkpoint says with all tokens through its own projector, (B, W)."""
        kept = self.method, self.projector
        self.method, self.projector = AllTokens(), None
        try:
            return model.supervised(batch)[0]
        finally:
            self.method, self.projector = kept


@dataclass(frozen=True)
class CompressorStage(Stage):
    """``compressor.safetensors`` and ``projector.safetensors``, trained on the digit scenes for one checkpoint.

    AdamW at the method's learning rate with warm-up and linear decay; the projector starts from the checkpoint's.
    """

    kind: ClassVar[str] = "compressor"

    ref: str
    checkpoint: str
    options: tuple[tuple[str, Any], ...]
    method: TaughtCompressor
    seed: int
    lessons: tuple[tuple[str, Any], ...]
    features: tuple[FeatureTable, ...]
    weights: Stage | None = None
    steps: int = STEPS
    batch: int = BATCH

    @classmethod
    def of(cls, info: VlmInfo, method: TaughtCompressor, seed: int, weights: Stage | None = None) -> CompressorStage:
        """The stage of a method on a checkpoint, or on the model that ``weights`` trains with all tokens.

        Raises:
            Infeasible: there are no training scenes for the model.
        """
        lessons = info.known_lessons
        if not isinstance(lessons, Lessons):
            raise Infeasible(
                f"method {method.name} must be trained for {info.ref}, and there are training scenes only for checkpoints that declare the vocabulary {VOCABULARY}"
            )
        layers: list[LayerKey] = [info.feature_layer, *(n for n in method.layers(info) if n != info.feature_layer)]
        features = tuple(stage for n in layers for stage in lessons.tables(info.tower, n))
        return cls(info.ref, info.version, info.options, method.as_trained(), seed, lessons.fields(), features, weights)

    def deps(self) -> tuple[Stage, ...]:
        """Training features, and the model's weights if they are trained here."""
        return (*self.features, *(() if self.weights is None else (self.weights,)))

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, save."""
        from safetensors.torch import save_file

        family = family_of(self.ref)
        options = dict(self.options)
        if "dtype" in options:  # float32, whatever the type at evaluation: small steps vanish in 16 bits
            options["dtype"] = "float32"
        model = family.load(family.info(self.ref, options), self.weights, ctx)
        method = self.method
        if not isinstance(model, VlmModel):
            raise TypeError(f"{self.ref} is no vision-language model")
        module = method.untrained(model.info, self.seed)
        if module is None:
            raise TypeError(f"method {method.name} has no weights to train")
        module = module.to(model.device)
        parts = {"compressor": module}
        projector = method.projector(module)
        if projector is None:
            projector = deepcopy(model.side.projector).requires_grad_(True)
            parts["projector"] = projector
        losses = self._train(ctx, model, method, module, projector)
        for name, trained in parts.items():
            save_file(
                {key: t.contiguous().cpu() for key, t in trained.state_dict().items()}, folder / f"{name}.safetensors"
            )
        tail = losses[-max(1, len(losses) // 10) :]
        (folder / "training.json").write_text(
            json.dumps({"steps": len(losses), "final_loss": sum(tail) / len(tail)}) + "\n"
        )

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))

    def _train(
        self, ctx: StageContext, model: VlmModel, method: TaughtCompressor, module: nn.Module, projector: nn.Module
    ) -> list[float]:
        recipe = Recipe(steps=self.steps, batch=self.batch, lr=method.learning_rate)
        learning = _Learning(method, module, projector, method.layers(model.info))
        tables: dict[LayerKey, list[Tensor]] = {}
        for stage in self.features:
            tables.setdefault(stage.layer, []).append(torch.from_numpy(ctx.get(stage).copy()))
        hidden = {layer: torch.cat(parts) for layer, parts in tables.items()}

        def batch(lesson: Lesson) -> VlmBatch:
            return model.lesson(lesson, {n: table.index_select(0, lesson.rows_B) for n, table in hidden.items()})

        def loss(numbered: tuple[int, Lesson]) -> Tensor:
            number, lesson = numbered
            parts = []
            for weight, learning.method in method.budgets(number, self.steps, self.seed):
                given = batch(lesson)
                logits_BW, answers_B = model.supervised(given)
                part = F.cross_entropy(logits_BW.float(), answers_B)
                if learning.method.teacher is not None:  # dense or trained, it is the checkpoint itself
                    part = followed(part, logits_BW, learning.told(model, given), learning.method.teacher)
                extra = learning.method.extra_loss(model, {VISUAL_TOKENS: learning})
                part = part if extra is None else part + extra
                parts.append(part if weight == 1 else weight * part)
            return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

        with model.occupy(VISUAL_TOKENS, learning):
            sample = torch.arange(0, len(hidden[model.info.feature_layer]), 8)
            with torch.no_grad():
                model.compress(batch(Lesson(sample, torch.zeros(len(sample), 1, dtype=torch.long), sample)))
            if learning.seen is not None:
                method.fit_inputs(module, learning.seen)
            name = {id(p): f"model.multi_modal_projector.{n}" for n, p in projector.named_parameters()}
            both = {id(p): p for p in [*module.parameters(), *projector.parameters()]}
            parameters = [p for key, p in both.items() if key not in name or method.trains(name[key])]
            lessons = Lessons(**dict(self.lessons))
            steps = lessons.steps(self.steps, self.batch, derive_seed("compressor", self.seed))
            keeper = Keeper(ctx.scratch(self))
            keeper.modules = [module]
            return fit(
                parameters, recipe, enumerate(steps), loss, lr=recipe.lr, fused=False, keeper=keeper, seed=self.seed
            )
