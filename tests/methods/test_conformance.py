"""The conformance suite on every registered method, and on methods that break a promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS, Method
from isoflop.methods.probe import Probe
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.methods.weights.gptq import Gptq
from isoflop.methods.weights.payloads import GridPayload, Payload
from isoflop.methods.weights.probe import WeightProbe
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import Model
from isoflop.models.vlm import CompressedTokens, VisualInput
from isoflop.testing import Case, Shared, check_method, method_checks
from isoflop.testing import methods as conformance
from isoflop.testing.snapshot import Snapshot
from isoflop.testing.suites import BrokenPromises, run_all

_PROBES: dict[Any, Shared[Probe]] = {}


def probe_of(name: str) -> Shared[Probe]:
    """One probe for all methods whose class got ``probe`` from the same place: what one of them leaves behind fails itself.

    What a class says of it for itself, ``tried``, is a place of its own.
    """
    cls = METHODS.get(name)
    places = cls.probe.__func__, getattr(getattr(cls, "tried", None), "__func__", None)  # type: ignore[attr-defined]
    return _PROBES.setdefault(places, Shared(cls.probe))


CASES = [
    pytest.param(run, id=f"{name}-{i}") for name in METHODS.own() for i, run in method_checks(name, probe_of(name))
]


@pytest.mark.parametrize("check", CASES)
def test_registered_method_keeps_the_contract(check: Any) -> None:
    check()


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
class WorksAtOneRatio(First):
    """Refuses every number of tokens but one."""

    def tokens_left(self, grid: int) -> int:
        if self.tokens != 4:
            raise Infeasible(f"tokens = {self.tokens} is not 4")
        return self.tokens


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
class TracesTensors(First):
    """Reports its losses as they came."""

    def trace(self, prepared: Any) -> dict[str, list[Any]]:
        return {"loss": [1.0, torch.tensor(0.5)]}


@dataclass(frozen=True)
class NoIdentity(First):
    """Claims that four tokens are the identity."""

    @classmethod
    def identity(cls, info: Any) -> NoIdentity:
        return cls(tokens=4)


@dataclass(frozen=True)
class SoundGptq(Gptq):
    """Under another name, because the broken ones below would replace the method."""

    n_calib: Annotated[int, Knob(low=1, high=4, doc="training examples")] = 4


@dataclass(frozen=True)
class IgnoresAKnobOfACalibratedMethod(SoundGptq):
    """Declares a knob that enters the stage's key, and nothing else."""

    dead: Annotated[float, Knob(low=0.0, high=1.0, doc="of nothing")] = 0.5


@dataclass(frozen=True)
class CalibratesWithGlobalRandomness(SoundGptq):
    """Adds noise from torch's global generator while it encodes."""

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        return super().encode(weight_OI + 0.01 * torch.randn_like(weight_OI), stats)


@dataclass(frozen=True, eq=False)
class TenthOfItsBytes(GridPayload):
    """Counts a tenth of what it stores."""

    def nbytes(self, dense_bits: int = 32) -> float:
        return super().nbytes(dense_bits) / 10


@dataclass(frozen=True)
class CountsTooFewBytes(SoundGptq):
    """Claims a tenth of its bytes, in cost and footprint alike."""

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        payload = super().encode(weight_OI, stats)
        return TenthOfItsBytes(payload.shape, payload.packed) if isinstance(payload, GridPayload) else payload


@dataclass(frozen=True, eq=False)
class MoreThanItStores(GridPayload):
    """Decodes to what it keeps beside its tensors."""

    def decode(self) -> Tensor:
        return super().decode() * 1.01


@dataclass(frozen=True)
class ServesMoreThanItStores(SoundGptq):
    """Serves weights that its serialised form does not give."""

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        payload = super().encode(weight_OI, stats)
        return MoreThanItStores(payload.shape, payload.packed) if isinstance(payload, GridPayload) else payload


@dataclass(frozen=True)
class BareKnob(First):
    """A number without an annotation, which nobody can sweep."""

    power = 2.0


@dataclass(frozen=True)
class HalfWritten(VisualTokenMethod):
    """What its family leaves to it is missing."""

    name: ClassVar[str] = "half-written"


VISUAL_BREACHES = [
    (BareKnob, conformance.check_declaration, "power has no annotation"),
    (HalfWritten, conformance.check_declaration, "leaves compress, tokens_left to it"),
    (LeavesWeightsChanged, conformance.check_restored, "multi_modal_projector.linear_1.weight changed"),
    (ForgetsOnException, conformance.check_restored, "left behind: _forward_hooks of lm_head"),
    (UsesGlobalRandomness, conformance.check_deterministic, "global random state"),
    (LooksAtTheBatch, conformance.check_batching, "examples run alone differ"),
    (IgnoresAKnob, conformance.check_knobs_honoured, "knob strength has no effect"),
    (IgnoresItsRatio, conformance.check_monotone_cost, "never change"),
    (WorksAtOneRatio, conformance.check_monotone_cost, "only 1 value of tokens works"),
    (ClaimsAnotherRatio, conformance.check_footprint, "claims ratio"),
    (FailsLate, conformance.check_impossible_knobs, "does not name tokens"),
    (NoIdentity, conformance.check_identity, "changes the outputs"),
    (TracesTensors, conformance.check_trace, "in series loss: a plain finite number is wanted"),
]
WEIGHT_BREACHES = [
    (IgnoresAKnobOfACalibratedMethod, conformance.check_knobs_honoured, "knob dead has no effect"),
    (CalibratesWithGlobalRandomness, conformance.check_deterministic, "global random state"),
    (CountsTooFewBytes, conformance.check_family, "payload grid counts"),
    (ServesMoreThanItStores, conformance.check_family, "is not what the serialised payload grid decodes to"),
]


@pytest.mark.parametrize(
    ("sound", "broken", "check", "finding"),
    [(First, *case) for case in VISUAL_BREACHES] + [(SoundGptq, *case) for case in WEIGHT_BREACHES],
)
def test_broken_promises_are_found(
    sound: type[Method], broken: type[Method], check: conformance.Check, finding: str
) -> None:
    def fresh() -> Probe:
        return VisualTokenProbe(examples=3) if sound is First else WeightProbe(examples=2)

    check(sound, fresh())
    with pytest.raises(AssertionError, match=finding):
        check(broken, fresh())


@pytest.mark.parametrize("leftover", [{"scaling": 3.0}, {"_cached": torch.zeros(1)}])
def test_changed_values_and_private_attributes_are_left_behind(leftover: dict[str, Any]) -> None:
    fresh = VisualTokenProbe(examples=1)
    before = Snapshot(fresh.model)
    vars(fresh.model.module.model.language_model.layers[0].self_attn).update(leftover)
    with pytest.raises(AssertionError, match="left behind"):
        before.compare(fresh.model)


def test_the_sound_method_behind_the_broken_ones_passes(probe: VisualTokenProbe) -> None:
    check_method(First, probe)


@dataclass(frozen=True)
class BreaksTwo(IgnoresAKnob):
    """Has a knob that does nothing, and reports its losses as they came."""

    def trace(self, prepared: Any) -> dict[str, list[Any]]:
        return {"loss": [torch.tensor(0.5)]}


IDLE = {"check_knobs_honoured": "strength is for later"}


def test_every_broken_promise_is_reported(probe: VisualTokenProbe) -> None:
    with pytest.raises(AssertionError) as caught:
        check_method(BreaksTwo, probe)
    first, second = str(caught.value).splitlines()
    assert first.startswith("method first: check_knobs_honoured: knob strength has no effect")
    assert second.startswith("method first: check_trace: trace() gives")
    assert isinstance(caught.value, BrokenPromises)
    assert len(caught.value.errors) == 2
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__  # no ExceptionGroup above the lines


def test_an_error_that_is_no_finding_is_reported_with_its_place(probe: VisualTokenProbe) -> None:
    @dataclass(frozen=True)
    class Crashes(First):
        def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
            raise KeyError("bytes")

    footprint = [case for case in method_checks(Crashes, probe) if case.id == "check_footprint"]
    with pytest.raises(AssertionError, match=r"check_footprint: KeyError: 'bytes' \(.*test_conformance.py:\d+\)"):
        run_all("method first", footprint)


def test_a_known_exception_is_let_through_and_no_longer_than_it_is_one(probe: VisualTokenProbe) -> None:
    check_method(IgnoresAKnob, probe, expected_failures=IDLE)
    with pytest.raises(
        AssertionError, match=r"check_knobs_honoured: expected to fail \(strength is for later\), but it"
    ):
        check_method(First, probe, expected_failures=IDLE)
    with pytest.raises(UserError, match=r"check_batch.*check_batching"):
        check_method(First, probe, expected_failures={"check_batch": "misspelt"})


def test_checks_can_be_had_one_by_one_and_load_nothing_before_they_run() -> None:
    made = []

    def make() -> Probe:
        made.append(1)
        return VisualTokenProbe(examples=2)

    cases = method_checks(IgnoresAKnob, Shared(make))
    assert [case.id for case in cases] == [check.__name__ for check in conformance.CHECKS]
    assert not made
    by_id: dict[str, Case] = {case.id: case for case in cases}
    by_id["check_declaration"].run()
    by_id["check_trace"].run()
    assert len(made) == 1
    with pytest.raises(AssertionError, match="no effect"):
        by_id["check_knobs_honoured"].run()
    by_id["check_trace"].run()
    assert len(made) == 2  # a fresh one behind a failure
