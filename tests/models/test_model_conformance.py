"""The suite for model families on every registered one, and on families that break a promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from isoflop.core.errors import UserError
from isoflop.core.stage import Stage
from isoflop.models.base import Model, ModelInfo
from isoflop.models.family import FAMILIES, ModelFamily
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.hooks.residual import RESIDUAL
from isoflop.models.tiny.vit import TinyVit
from isoflop.models.vit import VitInfo
from isoflop.testing import ModelProbe, check_model, model_checks
from isoflop.testing import models as suite
from isoflop.testing.model_probes import PROBES, model_probe

CASES = [
    pytest.param(run, id=f"{name}-{i}")
    for name in FAMILIES.names()
    if type(FAMILIES.get(name)).__module__.startswith("isoflop.models.")
    for i, run in model_checks(name)
]


@pytest.mark.parametrize("check", CASES)
def test_registered_family_keeps_the_contract(check: Any) -> None:
    check()


def test_every_family_of_this_project_is_looked_at() -> None:
    own = {n for n in FAMILIES.names() if type(FAMILIES.get(n)).__module__.startswith("isoflop.models.")}
    assert own == set(PROBES)


class Sound(TinyVit):
    """The base of the broken families below."""


class UnlistedMember(Sound):
    """Lists what it cannot describe."""

    def members(self) -> list[str]:
        return [*super().members(), "tiny-vit/c1"]


class OtherName(Sound):
    """Describes members under another name."""

    def info(self, ref: str, options: Mapping[str, Any]) -> VitInfo:
        return dataclasses.replace(super().info(ref, options), ref="tiny-vit/other")


class NewVersionEachTime(Sound):
    """Counts its descriptions."""

    calls = 0

    def info(self, ref: str, options: Mapping[str, Any]) -> VitInfo:
        type(self).calls += 1
        return dataclasses.replace(super().info(ref, options), version=str(self.calls))


class SaysNothing(Sound):
    """Refuses without a hint."""

    def info(self, ref: str, options: Mapping[str, Any]) -> VitInfo:
        try:
            return super().info(ref, options)
        except UserError:
            raise UserError(f"what is {ref}?") from None


class KeepsDefaults(Sound):
    """Takes a written default for another model."""

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        return dict(options)


class ForgetsTheSeed(Sound):
    """Trains the same weights whatever the seed."""

    def weights(self, info: ModelInfo, methods: Any, seed: int) -> Stage:
        return super().weights(info, methods, 0)


class TrainsAnything(Sound):
    """Ignores methods that it cannot train with."""

    def trained_with(self, info: ModelInfo, methods: Any) -> Any:
        return ()


def loaded(change: Any) -> ModelProbe:
    """The family's probe with something done to every model."""
    probe = model_probe("tiny-vit")

    def load(info: ModelInfo) -> Model:
        model = probe.load(info)
        change(model)
        return model

    return dataclasses.replace(probe, load=load)


def offers_too_much(model: Any) -> None:
    model.info = dataclasses.replace(model.info, hooks=model.info.hooks | {RESIDUAL})


def keeps_its_occupants(model: Any) -> None:
    occupy = model.occupy

    def kept(hook: Any, occupant: Any) -> Any:
        model.last = occupant
        return occupy(hook, occupant)

    model.occupy = kept


def darkens_codecs(model: Any) -> None:
    seen = model.seen
    model.seen = lambda images, ids=None: seen(images, ids) * (0.5 if model.occupant(PIXELS) is not None else 1.0)


def in_training(model: Any) -> None:
    model.module.train()


def never_free(model: Any) -> None:
    model.refuses = model.occupy
    model.occupy = lambda hook, occupant: torch.no_grad()


BREACHES = [
    (UnlistedMember, None, suite.check_members, "unknown model 'tiny-vit/c1'"),
    (OtherName, None, suite.check_members, "is described as tiny-vit/other"),
    (NewVersionEachTime, None, suite.check_versions, "is described otherwise the second time"),
    (SaysNothing, None, suite.check_refusals, "does not name 'tiny-vit/c"),
    (KeepsDefaults, None, suite.check_canonical_options, "defaults are options"),
    (ForgetsTheSeed, None, suite.check_weights, "the seed does not name the weights"),
    (TrainsAnything, None, suite.check_trainable, "training with .* is accepted"),
    (Sound, in_training, suite.check_loaded, "in training mode"),
    (Sound, offers_too_much, suite.check_hooks, "'VitModel' object has no attribute 'decoder_layers'"),
    (Sound, keeps_its_occupants, suite.check_hooks, "left behind: model.last"),
    (Sound, darkens_codecs, suite.check_hooks, "an occupant of pixels that changes nothing changes the outputs"),
    (Sound, never_free, suite.check_hooks_behind_errors, "a second occupant of .* is accepted"),
]


@pytest.mark.parametrize(("broken", "change", "check", "finding"), BREACHES)
def test_broken_promises_are_found(broken: type[ModelFamily], change: Any, check: suite.Check, finding: str) -> None:
    check(Sound(), model_probe("tiny-vit"))
    with pytest.raises((AssertionError, UserError, AttributeError), match=finding):
        check(broken(), model_probe("tiny-vit") if change is None else loaded(change))


def test_a_family_of_no_known_kind_needs_a_probe() -> None:
    class Strange(Sound):
        """Of another name."""

        name = "strange"

    with pytest.raises(AssertionError, match="give check_model a ModelProbe"):
        check_model(Strange())


def test_a_hook_without_a_neutral_occupant_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "neutral", lambda hook, model: None)
    with pytest.raises(AssertionError, match=r"no neutral occupant of matrices"):
        suite.check_hooks(Sound(), model_probe("tiny-vit"))
