"""Training a model with methods in place: what a family gives, and the loop in which methods change from step to step.

Shape suffixes: S scored positions, W classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.models.base import Model
from isoflop.models.training.loop import Keeper, Schedule, fit
from isoflop.models.training.taught import DENSE, InTraining, Taught, Teacher, in_its_hooks

Forward = Callable[[Model, Any], tuple[Tensor, Tensor]]


def supervised(model: Model, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits (S, W) and targets (S,) of a batch, as the model is now."""
    return model.supervised(batch)


@dataclass
class Course:
    """How a family trains one of its models; everything is ready to begin.

    Attributes:
        model: with initial weights; its module requires gradients.
        recipe: steps and schedule.
        groups: parameter groups of the model with their peak learning rates.
        lessons: batches, in order.
        forward: logits and targets of a batch.
        extra: the family's own auxiliary loss of the batch that ``forward`` saw last, or None.
        learned: is told each step's loss, for curricula.
        betas, weight_decay: of AdamW.
        prime: before the first step: what methods' own weights derive from data.
        finish: after the last step: what turns the module into what is saved.
        save: writes the checkpoint and ``training.json``, given the losses.
    """

    model: Model
    recipe: Schedule
    groups: list[dict[str, Any]]
    lessons: Iterable[Any]
    save: Callable[[Path, list[float]], None]
    forward: Forward = supervised
    extra: Callable[[Any], Tensor | None] = lambda batch: None
    learned: Callable[[float], None] | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    prime: Callable[[Sequence[Pupil]], None] = lambda pupils: None
    finish: Callable[[], None] = lambda: None


@dataclass
class Pupil:
    """A method in a training, with its own weights."""

    method: Taught
    module: nn.Module | None

    @contextmanager
    def in_place(self, model: Model, now: Any, extra: list[Tensor]) -> Iterator[None]:
        """The method as it is ``now`` in its hooks; at the end its own loss, if any, is added to ``extra``."""
        with in_its_hooks(now, model, InTraining(self.module)) as found:
            yield
            own = now.extra_loss(model, found)
            if own is not None:
                extra.append(own)


@dataclass
class Teaching:
    """The loss of a course with methods in place.

    Attributes:
        course: of the family.
        pupils: the methods.
        seed: of what they draw at each step.
        teacher: a model to follow, for methods that want a trained one.
    """

    course: Course
    pupils: Sequence[Pupil]
    seed: int
    teacher: Model | None = None
    step: int = field(default=0, init=False)

    def run(self, keeper: Keeper | None = None) -> list[float]:
        """All steps; returns the loss of every step."""
        course = self.course
        modules = [course.model.module, *(pupil.module for pupil in self.pupils if pupil.module is not None)]
        if keeper is not None:
            keeper.modules = modules
        course.prime(self.pupils)
        course.model.module.train()
        for pupil in self.pupils:
            if pupil.module is not None:
                pupil.module.train().requires_grad_(True)

        def numbered(pair: tuple[int, Any]) -> Tensor:
            self.step, batch = pair
            return self.loss(batch)

        losses = fit(
            self.groups(),
            course.recipe,
            enumerate(course.lessons),
            numbered,
            betas=course.betas,
            weight_decay=course.weight_decay,
            learned=course.learned,
            keeper=keeper,
            seed=self.seed,
        )
        course.finish()
        for module in modules:
            module.eval()
        return losses

    def groups(self) -> list[dict[str, Any]]:
        """The methods' own weights, then those of the model that all methods let learn; the others are frozen."""
        names = {id(p): name for name, p in self.course.model.module.named_parameters()}
        own = [
            {"params": list(pupil.module.parameters()), "lr": pupil.method.learning_rate}
            for pupil in self.pupils
            if pupil.module is not None
        ]
        found = []
        for group in self.course.groups:
            learning = []
            for parameter in group["params"]:
                learns = all(pupil.method.trains(names.get(id(parameter), "")) for pupil in self.pupils)
                parameter.requires_grad_(learns)
                learning += [parameter] if learns else []
            if learning:
                found.append({**group, "params": learning})
        groups = [group for group in own if group["params"]] + found
        if not groups:
            asking = ", ".join(pupil.method.name for pupil in self.pupils)
            raise Infeasible(
                f"nothing learns: {asking} let no parameter of the model learn, and have no weights of their own"
            )
        return groups

    def loss(self, batch: Any) -> Tensor:
        """The mean over the step's configurations of the methods, by their weights."""
        steps = self.course.recipe.steps
        choices = [pupil.method.budgets(self.step, steps, self.seed) for pupil in self.pupils]
        parts = []
        for combination in itertools.product(*choices):
            weight = math.prod(w for w, _ in combination)
            loss = self._of(batch, [now for _, now in combination])
            parts.append(loss if weight == 1 else weight * loss)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def _of(self, batch: Any, now: list[Any]) -> Tensor:
        model, extra = self.course.model, list[Tensor]()
        with ExitStack() as stack:
            for pupil, method in zip(self.pupils, now, strict=True):
                stack.enter_context(pupil.in_place(model, method, extra))
            logits_SW, targets_S = self.course.forward(model, batch)
            own = self.course.extra(batch)
        loss = F.cross_entropy(logits_SW.float(), targets_S)
        for method in now:
            loss = self._followed(loss, logits_SW, method, batch)
        for part in [*extra, *([] if own is None else [own])]:
            loss = loss + part
        return loss

    def _followed(self, loss: Tensor, logits_SW: Tensor, method: Any, batch: Any) -> Tensor:
        """The loss with the divergence from a method's teacher."""
        wanted = method.teacher
        if wanted is None:
            return loss
        model = self.course.model if wanted.source == DENSE else self.teacher
        if model is None:
            raise ValueError(f"method {method.name} follows a trained teacher, and none was given")
        with torch.no_grad():
            told_SW, _ = self.course.forward(model, batch)
        return followed(loss, logits_SW, told_SW, wanted)


def followed(loss: Tensor, logits_SW: Tensor, told_SW: Tensor, teacher: Teacher) -> Tensor:
    """A loss on targets, mixed with the divergence from what a teacher says of the same positions; see ``Teacher``."""
    heat = teacher.temperature
    student_SW, told_SW = ((x.float() / heat).log_softmax(-1) for x in (logits_SW, told_SW))
    divergence = F.kl_div(student_SW, told_SW, log_target=True, reduction="batchmean") * heat**2
    return (1 - teacher.weight) * loss + teacher.weight * divergence
