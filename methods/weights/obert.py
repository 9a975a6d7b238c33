"""oBERT, the Optimal BERT Surgeon: pruning by the loss's own curvature, at once or in steps of fine-tuning (arXiv 2203.07259).

Shape suffixes: O outputs (rows), I inputs (columns), N groups of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.base import known_matrices
from isoflop.methods.weights.fisher import BlockFisher, Saliency, surgery
from isoflop.methods.weights.healing import Form, Forms, Healed, HealedMethod, HealingSchedule, in_parts
from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.rules import UNSTRUCTURED, keep_highest
from isoflop.methods.weights.sparse import sparse_payload
from isoflop.methods.weights.statistics import Statistics, ViewStats
from isoflop.methods.weights.views import linear_views
from isoflop.models.base import Model, ModelInfo

BLOCK4 = "block4"
GROUP = {UNSTRUCTURED: 1, BLOCK4: 4}
"""Weights that go together, by mask."""
FISHER, MAGNITUDE = "fisher", "magnitude"
MODEL, MATRIX = "model", "matrix"
MOST_BYTES = 2**37
"""Of the Fisher matrix's blocks over all matrices, in float32."""
GRADS_BEGUN = 8
"""Gradients for each step of a training that is only begun."""


@METHODS.register("obert")
@dataclass(frozen=True)
class OBert(HealedMethod):
    """Weights go whose removal costs least by the loss's curvature, and those that stay move to make up for it.

    The curvature is the empirical Fisher matrix of ``grads`` gradients of the loss on labelled training examples, in blocks of ``block``
    weights. One order goes through all matrices of the model (``compare: model``). With ``mask: block4`` four neighbours of a row
    go together, which takes a quarter of a bit for the mask in place of one. ``recomputations`` splits a pruning into steps with
    new gradients, which matters beyond half of the weights.

    With ``heal_steps: 0`` everything goes at once. Otherwise it goes in ``prunings`` steps, ``first`` of the weights in the first one
    and the rest along a cubic curve, with a part of ``heal_steps`` behind each, in which learning rates fall to a tenth and begin
    anew, by default on the logits of the unpruned model alone (``heal_kd: 1``). ``criterion: magnitude`` is the baseline of equal
    training: the smallest weights go in the same steps, and nothing moves.

    ``damp`` wants to be tried: too little trusts curvature in directions that no gradient has seen, much of it prunes by magnitude.
    Measured here (``sweeps/encoders.yaml``, ``damp: 1e-5``, means of three trainings; unpruned, 33 % errors): 70 % of zeros at once give 54 %
    errors with one set of gradients and 41 % with four, SparseGPT 51 %, Wanda 61 %, magnitudes of each matrix 60 %, of the model 67 %.
    In steps they give 34 %, magnitudes 39 %; 90 % of zeros in steps 39 % and 63 %, in blocks of four 52 % and 68 %.

    On purpose not as released: exactly ⌊sparsity · n⌋ go (released: rounded); only matrices are fine-tuned, behind a model that is
    trained already, so that pruning begins at once (released: behind two epochs); each part of the training begins with
    a tenth of its steps as warm-up and without momentum.
    """

    paper: ClassVar[str] = "arXiv 2203.07259"

    sparsity: Annotated[float, Knob(low=0.0, high=0.99, ratio=True, doc="share of zeros in all matrices together")] = 0.8  # fmt: skip
    mask: Annotated[str, Knob(choices=tuple(GROUP), doc="single weights go, or four neighbours of a row together")] = UNSTRUCTURED  # fmt: skip
    compare: Annotated[str, Knob(choices=(MODEL, MATRIX), doc="scores are compared over the model, or within each matrix")] = MODEL  # fmt: skip
    criterion: Annotated[str, Knob(choices=(FISHER, MAGNITUDE), doc="what goes: by curvature with an update of the others, or the smallest weights")] = FISHER  # fmt: skip
    block: Annotated[int, Knob(low=1, high=512, log=True, unit="weights", doc="of a block of the Fisher matrix; 1 for its diagonal")] = 50  # fmt: skip
    grads: Annotated[int, Knob(low=1, high=100_000, log=True, doc="gradients that the Fisher matrix is made of")] = 1024
    grad_batch: Annotated[int, Knob(low=1, high=16, log=True, unit="examples", doc="training examples of a gradient")] = 8  # fmt: skip
    damp: Annotated[float, Knob(low=1e-12, high=1e4, log=True, doc="added to the Fisher matrix's diagonal")] = 1e-7
    recomputations: Annotated[int, Knob(low=1, high=64, log=True, doc="steps of a pruning, each with new gradients")] = 1  # fmt: skip

    heal_steps: Annotated[int, Knob(low=0, high=1_000_000, doc="of training the pruned matrices, all parts together; 0 for none")] = 0  # fmt: skip
    heal_lr: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="peak learning rate of each part")] = 8e-5
    heal_batch: Annotated[int, Knob(low=1, high=4096, log=True, unit="examples", doc="training examples of a step")] = 16  # fmt: skip
    heal_kd: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the divergence from the unpruned model's logits in its loss")] = 1.0  # fmt: skip
    temperature: Annotated[float, Knob(low=0.1, high=20.0, log=True, doc="of the logits in that divergence")] = 2.0
    prunings: Annotated[int, Knob(low=1, high=1000, log=True, doc="steps in which weights go, where there is a training; at most one for each step of it")] = 7  # fmt: skip
    first: Annotated[float, Knob(low=0.0, high=0.99, doc="share of zeros behind the first of them")] = 0.7

    @classmethod
    def identity(cls, info: ModelInfo) -> OBert:
        """Nothing removed."""
        return cls(sparsity=0.0)

    # What is refused, and what does not matter

    def check(self, info: ModelInfo) -> None:
        """Refuse models without a loss, blocks that cut groups, and a Fisher matrix that is too large."""
        super().check(info)
        if not self.sparsity or self.criterion != FISHER:
            return
        info.check_loss(f"method {self.name}")
        if self.block % GROUP[self.mask]:
            raise Infeasible(
                f"method obert: block = {self.block} cuts groups of mask = {BLOCK4}; allowed: multiples of 4 (the paper: 32)"
            )
        weights = sum(rows * cols * count for rows, cols, count in known_matrices(info))
        if 4 * weights * self.block > MOST_BYTES:
            raise Infeasible(
                f"method obert: block = {self.block} takes {4 * weights * self.block:.2g} bytes for the Fisher matrix of model {info.ref}, "
                f"and at most {MOST_BYTES:.2g} are tried; allowed: block up to {MOST_BYTES // (4 * weights)}"
            )

    def check_shape(self, rows: int, cols: int) -> None:
        """Groups lie within rows."""
        if cols % GROUP[self.mask]:
            raise Infeasible(
                f"method obert: mask = {self.mask} needs inputs in multiples of 4, and a matrix of the model has {cols}; allowed: mask {UNSTRUCTURED}"
            )

    def relevant(self) -> Self:
        """The same method with knobs at their defaults that the others leave without effect."""
        if not self.sparsity:
            return self.at_defaults(*(name for name in self.knobs() if name != "sparsity"))
        idle = ["block", "grads", "grad_batch", "damp", "recomputations"] if self.criterion == MAGNITUDE else []
        if self._events() == 1:
            idle.append("first")
        if not self.heal_steps:
            idle.append("prunings")
        if not self.heal_steps or not self.heal_kd:
            idle.append("temperature")
        return super().relevant().at_defaults(*idle)

    def begun(self, steps: int) -> Self:
        """With fewer gradients, too."""
        return replace(super().begun(steps), grads=min(self.grads, GRADS_BEGUN * steps))

    def axes(self, info: ModelInfo) -> Axes:
        """Weights over those that are not zero."""
        return Axes(ratio=1 / (1 - self.sparsity))

    # When how much goes

    def _events(self) -> int:
        """Prunings with a training behind each, or the only one."""
        return min(self.prunings, self.heal_steps) if self.heal_steps else 1

    def targets(self) -> list[float]:
        """The share of zeros behind each pruning: from ``first`` to ``sparsity``, fast and then slowly (cubic)."""
        events = self._events()
        begin = min(self.first, self.sparsity)
        left = [1 - number / (events - 1) for number in range(events - 1)]
        return [self.sparsity - (self.sparsity - begin) * share**3 for share in left] + [self.sparsity]

    @property
    def schedule(self) -> HealingSchedule:
        """Of one part of the training: down to a tenth of the learning rate."""
        return HealingSchedule(self.heal_steps, final=0.1)

    @property
    def kd_temperature(self) -> float:
        """The knob ``temperature``."""
        return self.temperature

    # The surgery

    def form(self, weight_OI: Tensor, stats: ViewStats | None, seed: int) -> Masked:
        """The matrix with nothing gone yet."""
        return Masked(weight_OI, GROUP[self.mask])

    def compress(
        self, model: Model, ctx: StageContext, statistics: Statistics | None, seed: int, scratch: Path | None = None
    ) -> Healed:
        """Prune and train in turn."""
        views = linear_views(model)
        forms = [self.form(view.weight(), None, 0) for view in views]
        together, losses, before = Forms(views, forms), list[float](), 0.0
        parts = self.recomputations if self.criterion == FISHER else 1
        for event, target in enumerate(self.targets() if self.sparsity else ()):
            for part in range(parts):
                share = before + (target - before) * (part + 1) / parts
                self.prune(model, ctx, together, forms, share, derive_seed("fisher", seed, event, part))
            before = target
            losses += self._train_part(model, ctx, together, event, seed, scratch)
        return self.stored(views, forms, losses, {"sparsity": self.targets()})

    def _train_part(
        self, model: Model, ctx: StageContext, forms: Forms, event: int, seed: int, scratch: Path | None
    ) -> list[float]:
        """The part of the training behind one pruning; the loss of each of its steps."""
        if not self.heal_steps:
            return []
        events = self._events()
        steps = self.heal_steps * (event + 1) // events - self.heal_steps * event // events
        folder = None if scratch is None else scratch / f"part-{event}"
        if folder is not None:
            folder.mkdir(exist_ok=True)
        return replace(self, heal_steps=steps).heal(model, ctx, forms, derive_seed("part", seed, event), folder)

    def prune(
        self, model: Model, ctx: StageContext, together: Forms, forms: Sequence[Masked], share: float, seed: int
    ) -> None:
        """Remove weights until ``share`` of them are gone; what is gone stays gone."""
        if self.criterion == MAGNITUDE:
            self._remove(forms, [form.magnitudes() for form in forms], share)
            return
        fishers = self.fishers(model, ctx, together, forms, seed)
        found = [
            Saliency.of(form.value_OI.detach(), fisher, form.group) for form, fisher in zip(forms, fishers, strict=True)
        ]
        gone = self._remove(forms, [one.score_N for one in found], share)
        for form, gone_OI, saliency, fisher in zip(forms, gone, found, fishers, strict=True):
            form.value_OI.data = surgery(form.value_OI.detach(), gone_OI, saliency, fisher)
            form.clear()

    def fishers(
        self, model: Model, ctx: StageContext, together: Forms, forms: Sequence[Masked], seed: int
    ) -> list[BlockFisher]:
        """The Fisher matrices of all forms, on the model as it is served with them; what is gone has no gradients."""
        found = [BlockFisher(form.value_OI, self.block, self.damp) for form in forms]
        values = [form.value_OI.requires_grad_(True) for form in forms]
        batches = in_parts(model.calibration(ctx, self.grads * self.grad_batch, seed), self.grad_batch)
        with torch.enable_grad():
            for batch in islice(batches, self.grads):
                logits_SW, targets_S = together.supervised(model, batch)
                loss = F.cross_entropy(logits_SW.float(), targets_S)
                gradients = torch.autograd.grad(loss, values, allow_unused=True)
                for fisher, form, gradient_OI in zip(found, forms, gradients, strict=True):
                    fisher.add(torch.zeros_like(form.value_OI) if gradient_OI is None else gradient_OI)
        return found

    def _remove(self, forms: Sequence[Masked], scores: Sequence[Tensor], share: float) -> list[Tensor]:
        """Mark the groups of lowest score as gone; gives what goes of each matrix now."""
        open_N = [score_N.masked_fill(~form.keep_N, -torch.inf) for form, score_N in zip(forms, scores, strict=True)]
        open_N = [score_N.cpu() for score_N in open_N]  # matrices of one model may lie on several devices
        joined = [torch.cat(open_N)] if self.compare == MODEL else open_N
        kept = torch.cat([keep_highest(score_N[None], share, by_row=False)[0] for score_N in joined])
        parts = kept.split([len(form.keep_N) for form in forms])
        return [form.keep_only(keep_N.to(form.keep_N.device)) for form, keep_N in zip(forms, parts, strict=True)]

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """Masks of one block; of few gradients the last ones matter; a training shows what belongs to it."""
        trained: dict[str, KnobValue] = {"heal_steps": 2, "heal_lr": 1e-2, "prunings": 2}
        return {
            "mask": [{"mask": mask, "block": 32} for mask in GROUP],
            "grads": [{"grads": count} for count in (2, 8)],
            "damp": [{"damp": damp} for damp in (1e-7, 1e-2)],
            "temperature": [{**trained, "temperature": value} for value in (1.0, 4.0)],
            "prunings": [{**trained, "prunings": count} for count in (1, 2)],
            "first": [{**trained, "first": share} for share in (0.2, 0.7)],
        }


class Masked(Form):
    """A matrix of which groups of neighbours in a row are gone.

    Attributes:
        value_OI: the weights, of which those that are gone mean nothing.
        keep_N: groups that are there, numbered row by row.
    """

    keep_N: Tensor

    def __init__(self, weight_OI: Tensor, group: int) -> None:
        super().__init__()
        self.group = group
        self.value_OI = nn.Parameter(weight_OI.clone().contiguous())
        self.register_buffer(
            "keep_N", torch.ones(weight_OI.numel() // group, dtype=torch.bool, device=self.value_OI.device)
        )

    @property
    def keep_OI(self) -> Tensor:
        """Of every weight."""
        return self.keep_N.repeat_interleave(self.group).view(self.value_OI.shape)

    def magnitudes(self) -> Tensor:
        """w², summed over each group (N,)."""
        return self.value_OI.detach().square().view(-1, self.group).sum(1)

    def keep_only(self, keep_N: Tensor) -> Tensor:
        """Leave these groups; what goes now (O, I)."""
        gone_N = self.keep_N & ~keep_N
        self.keep_N = self.keep_N & keep_N
        return gone_N.repeat_interleave(self.group).view(self.value_OI.shape)

    def clear(self) -> None:
        """Set to zero what is gone."""
        self.value_OI.data = self.value_OI.data * self.keep_OI

    def weight(self) -> Tensor:
        """The weights that are there, and zeros."""
        return self.value_OI * self.keep_OI

    def payload(self) -> Payload:
        """What is kept and a bitmap of the groups, or the whole matrix where that is smaller."""
        return sparse_payload(self.weight().detach(), self.keep_OI, self.group)

    def entries(self) -> int:
        """Weights that are there."""
        return int(self.keep_N.sum()) * self.group
