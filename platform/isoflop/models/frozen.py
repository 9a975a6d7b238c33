"""Training a compressor on a checkpoint whose language model stays frozen: the compressor and the projector learn.

Shape suffixes: B batch, Q question tokens, P patches, D vision width.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import family_of
from isoflop.models.descent import descend
from isoflop.models.digit_world import VOCABULARY
from isoflop.models.features import FeaturesStage
from isoflop.models.training import MethodSpec, Recipe, Step, build_visual, lessons, method_spec
from isoflop.models.vlm import Checkpoint, CompressedTokens, VisualInput, VlmBatch, VlmInfo, VlmModel

if TYPE_CHECKING:
    from isoflop.methods.visual_tokens.base import VisualTokenMethod

STEPS = 900
BATCH = 32


@dataclass
class _Learning:
    """A compressor in training, in the model's hook point."""

    method: VisualTokenMethod
    module: nn.Module | None
    projector: nn.Module | None
    layers: tuple[int, ...]
    seen: VisualInput | None = None

    def __call__(self, view: VisualInput) -> CompressedTokens:
        self.seen = view
        return self.method.compress(view, self.module)


@dataclass(frozen=True)
class CompressorStage(Stage):
    """``compressor.safetensors`` and ``projector.safetensors``, trained on the digit scenes for one checkpoint.

    AdamW at the method's learning rate with warm-up and linear decay; the projector starts from the checkpoint's.
    """

    kind: ClassVar[str] = "compressor"

    ref: str
    checkpoint: str
    options: tuple[tuple[str, Any], ...]
    method: MethodSpec
    seed: int
    features: tuple[FeaturesStage, ...]
    steps: int = STEPS
    batch: int = BATCH

    @classmethod
    def of(cls, info: VlmInfo, method: VisualTokenMethod, seed: int) -> CompressorStage:
        """The stage of a method on a checkpoint. Raises Infeasible when there are no training scenes for it."""
        if info.vocabulary != VOCABULARY:
            raise Infeasible(
                f"method {method.name} must be trained for {info.ref}, and there are training scenes only for checkpoints that declare the vocabulary {VOCABULARY}"
            )
        layers = [info.feature_layer, *(n for n in method.layers(info) if n != info.feature_layer)]
        features = tuple(stage for n in layers for stage in Recipe().train_features(info.tower, n))
        return cls(info.ref, info.version, info.options, method_spec(method), seed, features)

    def deps(self) -> tuple[Stage, ...]:
        """Training features."""
        return self.features

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, save."""
        from safetensors.torch import save_file

        family = family_of(self.ref)
        # In float32, whatever the type at evaluation: small steps vanish in 16 bits.
        info = family.info(self.ref, {**dict(self.options), "dtype": "float32"})
        model = family.load(info, None, ctx)
        method = build_visual(self.method)
        if not isinstance(model, VlmModel):
            raise TypeError(f"{self.ref} is no vision-language model")
        module = method.untrained(model.info, self.seed)
        if module is None:
            raise TypeError(f"method {method.name} has no weights to train")
        projector = deepcopy(model.module.model.multi_modal_projector).requires_grad_(True)
        module = module.to(model.device)
        losses = self._train(ctx, model, method, module, projector)
        for name, trained in (("compressor", module), ("projector", projector)):
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
        self, ctx: StageContext, model: VlmModel, method: VisualTokenMethod, module: nn.Module, projector: nn.Module
    ) -> list[float]:
        recipe = Recipe(steps=self.steps, batch=self.batch, lr=method.learning_rate)
        slot = _Learning(method, module, projector, method.layers(model.info))
        model.compression = slot
        tables = {a.layer: (a, b) for a, b in zip(self.features[::2], self.features[1::2], strict=True)}
        reading, coarse = tables[model.info.feature_layer]
        hidden = {n: torch.cat([torch.from_numpy(ctx.get(s).copy()) for s in pair]) for n, pair in tables.items()}

        def batch(step: Step) -> VlmBatch:
            rows = {n: table.index_select(0, step.rows_B).to(model.device) for n, table in hidden.items()}
            image_B1 = torch.full((len(step.rows_B), 1), model.info.geometry["image_token"])
            prompt_BT = torch.cat((image_B1, step.questions_BQ), dim=1).to(model.device)
            return VlmBatch(rows, prompt_BT, step.questions_BQ.to(model.device), step.rows_B.to(model.device))

        sample = torch.arange(0, len(hidden[model.info.feature_layer]), 8)
        with torch.no_grad():
            model.compress(batch(Step(sample, torch.zeros(len(sample), 1, dtype=torch.long), sample)))
        if slot.seen is not None:
            method.fit_inputs(module, slot.seen)
        parameters = [*module.parameters(), *projector.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.98))

        def loss(step: Step) -> Tensor:
            prompts = batch(step)
            logits_BW = model.prefill(model.project(model.compress(prompts).tokens_BVD), prompts).logits[:, -1]
            return F.cross_entropy(logits_BW.float(), step.answers_B.to(model.device))

        steps = lessons(recipe, (reading, coarse), derive_seed("compressor", self.seed))
        return descend(optimizer, recipe, steps, loss)
