"""The conformance suite on every registered method, and on methods that break a promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import torch
from torch import nn

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS, Method
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.models.base import Model
from isoflop.models.vlm import CompressedTokens, VisualInput
from isoflop.testing import check_method, conformance


@pytest.mark.parametrize("name", METHODS.names())
def test_registered_method_keeps_the_contract(name: str) -> None:
    check_method(name)


@pytest.fixture(scope="module")
def probe() -> VisualTokenProbe:
    return VisualTokenProbe()


@dataclass(frozen=True)
class First(VisualTokenMethod):
    """Keeps the first tokens; the base of the broken methods below."""

    name: ClassVar[str] = "first"
    tokens: Annotated[int, Knob(low=1, high=64, ratio=True, doc="V")] = 4

    def tokens_left(self, grid: int) -> int:
        if self.tokens > grid * grid:
            raise Infeasible(f"tokens = {self.tokens} exceeds {grid * grid}")
        return self.tokens

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        return CompressedTokens(view.x_BPD[:, : self.tokens])


@dataclass(frozen=True)
class LeavesWeightsChanged(First):
    """Rounds the projector and does not put it back."""

    @contextmanager
    def apply(self, model: Model, prepared: Any) -> Iterator[None]:
        with super().apply(model, prepared):
            model.module.model.multi_modal_projector.linear_1.weight.data.mul_(1.001)
            yield


@dataclass(frozen=True)
class ForgetsOnException(First):
    """Removes its hook only when nothing goes wrong."""

    @contextmanager
    def apply(self, model: Model, prepared: Any) -> Iterator[None]:
        handle = model.module.lm_head.register_forward_hook(lambda *args: None)
        with super().apply(model, prepared):
            yield
        handle.remove()


@dataclass(frozen=True)
class UsesGlobalRandomness(First):
    """Adds noise from torch's global generator."""

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        tokens = view.x_BPD[:, : self.tokens]
        return CompressedTokens(tokens + torch.randn_like(tokens))


@dataclass(frozen=True)
class LooksAtTheBatch(First):
    """Centres the features over the batch."""

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        tokens = view.x_BPD[:, : self.tokens]
        return CompressedTokens(tokens - tokens.mean(0, keepdim=True))


@dataclass(frozen=True)
class IgnoresAKnob(First):
    """Declares a knob that does nothing."""

    strength: Annotated[float, Knob(low=0.0, high=1.0, doc="of nothing")] = 0.5


@dataclass(frozen=True)
class IgnoresItsRatio(First):
    """Keeps the same tokens whatever the ratio knob says."""

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        return CompressedTokens(view.x_BPD[:, :4])


@dataclass(frozen=True)
class ClaimsAnotherRatio(First):
    """Says that it keeps half of the tokens that it keeps."""

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        return {"ratio": 2 * super().footprint(model, ctx)["ratio"]}


@dataclass(frozen=True)
class FailsLate(First):
    """Finds an impossible knob out only when it runs."""

    def tokens_left(self, grid: int) -> int:
        if self.tokens > grid * grid:
            raise Infeasible("does not work")
        return self.tokens


@dataclass(frozen=True)
class NoIdentity(First):
    """Claims that four tokens are the identity."""

    @classmethod
    def identity(cls, info: Any) -> NoIdentity:
        return cls(tokens=4)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (LeavesWeightsChanged, conformance.check_restored),
        (ForgetsOnException, conformance.check_restored),
        (UsesGlobalRandomness, conformance.check_deterministic),
        (LooksAtTheBatch, conformance.check_batching),
        (IgnoresAKnob, conformance.check_knobs_honoured),
        (IgnoresItsRatio, conformance.check_monotone_cost),
        (ClaimsAnotherRatio, conformance.check_footprint),
        (FailsLate, conformance.check_impossible_knobs),
        (NoIdentity, conformance.check_identity),
    ],
)
def test_broken_promises_are_found(broken: type[Method], check: conformance.Check) -> None:
    fresh = VisualTokenProbe(examples=3)
    with pytest.raises(AssertionError):
        check(broken, fresh)


def test_the_sound_method_behind_the_broken_ones_passes(probe: VisualTokenProbe) -> None:
    for check in conformance.CHECKS:
        if check is not conformance.check_knob_errors:  # builds by name; the class is not registered
            check(First, probe)
