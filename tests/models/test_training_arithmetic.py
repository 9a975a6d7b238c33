"""What a training adds up, on stand-ins: weights of budgets, teachers without gradients, prefixes that are put back."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from isoflop.methods.base import METHODS
from isoflop.methods.calibration import OnModel
from isoflop.models.decoder_model import DecoderModel
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.visual_tokens import AllTokens
from isoflop.models.training import frozen
from isoflop.models.training.frozen import CompressorStage
from isoflop.models.training.taught import Teacher
from isoflop.models.training.teaching import Teaching
from isoflop.models.worlds.lessons import Lesson


def pupil(*budgets: tuple[float, Any]) -> Any:
    return SimpleNamespace(method=SimpleNamespace(budgets=lambda step, steps, seed: list(budgets)))


def test_combinations_of_budgets_weigh_the_product_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    teaching = Teaching.__new__(Teaching)
    teaching.course = SimpleNamespace(recipe=SimpleNamespace(steps=1))  # type: ignore[assignment]
    teaching.pupils = [pupil((0.25, 1.0), (0.75, 3.0)), pupil((0.4, 10.0), (0.6, 50.0))]
    teaching.step, teaching.seed = 0, 0
    monkeypatch.setattr(Teaching, "_of", lambda self, batch, now: torch.tensor(now[0] + now[1]))
    expected = sum(a * b * (x + y) for a, x in ((0.25, 1.0), (0.75, 3.0)) for b, y in ((0.4, 10.0), (0.6, 50.0)))
    assert float(teaching.loss(None)) == pytest.approx(expected)  # 2.5 + 34


def test_a_teacher_is_asked_without_gradients() -> None:
    student, seen = nn.Linear(3, 4), []

    def forward(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        seen.append(torch.is_grad_enabled())
        return model(batch), None

    teaching = Teaching.__new__(Teaching)
    teaching.course = SimpleNamespace(model=student, forward=forward)  # type: ignore[assignment]
    teaching.teacher = trained = nn.Linear(3, 4)  # type: ignore[assignment]
    batch = torch.ones(2, 3)
    for source in ("dense", "trained"):
        method = SimpleNamespace(name="m", teacher=Teacher(source, weight=0.5))
        teaching._followed(torch.zeros(()), student(batch), method, batch).backward()
    assert seen == [False, False]
    assert trained.weight.grad is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_prefix_inside_a_prefix_is_put_back(fails: bool) -> None:
    policy = SimpleNamespace(prefix=0, examples_B=None)
    model: Any = SimpleNamespace(occupant=lambda hook: policy if hook is ATTENTION else None)
    with DecoderModel.compressing_prefix(model, 3):
        with pytest.raises(KeyError) if fails else nullcontext(), DecoderModel.compressing_prefix(model, 7):
            assert policy.prefix == 7
            if fails:
                raise KeyError
        assert policy.prefix == 3
    assert policy.prefix == 0


class Scaled:
    """A compressor in training whose logits depend on its budget."""

    name, learning_rate, teacher = "scaled", 1e-3, None

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def layers(self, info: Any) -> tuple[int, ...]:
        return (0,)

    def budgets(self, step: int, steps: int, seed: int) -> list[tuple[float, Any]]:
        return [(0.2, Scaled(1.0)), (0.5, Scaled(2.0)), (0.3, Scaled(-1.0))]

    def extra_loss(self, model: Any, learning: Any) -> None:
        return None

    def trains(self, name: str) -> bool:
        return True


def test_budgets_of_a_compressor_weigh_their_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BW, answers_B = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -0.5]]), torch.tensor([2, 1])
    held: list[Any] = []

    class Model:
        info = SimpleNamespace(feature_layer=0)

        def occupy(self, hook: Any, learning: Any) -> Any:
            held.append(learning)
            return nullcontext()

        def lesson(self, lesson: Any, tables: Any) -> Any:
            return lesson

        def compress(self, batch: Any) -> None: ...

        def supervised(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return held[0].method.scale * logits_BW, answers_B

    losses: list[float] = []

    def fit(parameters: Any, recipe: Any, steps: Any, loss: Any, **options: Any) -> list[float]:
        rows = torch.arange(2)
        losses.append(float(loss((0, Lesson(rows, torch.zeros(2, 1, dtype=torch.long), answers_B)))))
        return losses

    monkeypatch.setattr(frozen, "fit", fit)
    method: Any = Scaled()
    features: Any = (SimpleNamespace(layer=0),)
    stage = CompressorStage("ref", "1", (), method, 0, (), features, steps=1, batch=2)
    ctx: Any = SimpleNamespace(get=lambda stage: np.zeros((16, 3), np.float32), scratch=lambda stage: tmp_path)
    model: Any = Model()
    stage._train(ctx, model, method, nn.Linear(2, 2), nn.Linear(2, 2))
    expected = sum(w * float(F.cross_entropy(s * logits_BW, answers_B)) for w, s in ((0.2, 1), (0.5, 2), (0.3, -1)))
    assert losses == [pytest.approx(expected)]


def test_a_checkpoint_is_asked_without_gradients_with_all_tokens() -> None:
    """And the compressor is back in its place afterwards, also when that fails."""
    method: Any = Scaled()
    learning = frozen._Learning(method, None, nn.Linear(1, 1), ())
    projector = learning.projector

    def supervised(batch: Any) -> tuple[torch.Tensor, None]:
        assert isinstance(learning.method, AllTokens)
        assert learning.projector is None
        assert not torch.is_grad_enabled()
        if batch == "bad":
            raise KeyError
        return torch.ones(1), None

    model: Any = SimpleNamespace(supervised=supervised)
    learning.told(model, "good")  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        learning.told(model, "bad")  # type: ignore[arg-type]
    assert (learning.method, learning.projector) == (method, projector)


def test_calibration_stands_behind_the_methods_as_they_are_trained() -> None:
    """A knob that acts at inference only makes no second calibration."""
    ref = "tiny-llava/d24"
    info = family_of(ref).info(ref, {})
    cls = METHODS.get("random")
    spread, row = (cls(tokens=16, keep_positions=places) for places in ("original", "contiguous"))
    assert spread.as_trained() != spread
    sources = [OnModel.source(info, None, 0, (method,)) for method in (spread, row)]
    assert sources[0]["trained_with"] == (spread.as_trained(),)
    assert sources[0] == sources[1]
