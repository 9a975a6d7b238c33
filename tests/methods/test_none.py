"""``none`` is the baseline of every model, and takes part in nothing where it acts nowhere."""

from __future__ import annotations

import numpy as np
import pytest

from isoflop.methods.base import build
from isoflop.models.base import Model
from isoflop.models.family import FAMILIES, family_of
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS
from isoflop.tasks.base import TASKS
from isoflop.testing.task_probes import TaskProbe, task_probe

MEMBERS = [
    ref for family in ("tiny-lm", "tiny-vit", "tiny-bert", "tiny-llava") for ref in FAMILIES.get(family).members()
]


@pytest.mark.parametrize("ref", MEMBERS)
def test_a_model_that_offers_nothing_to_none_is_trained_as_without_it(ref: str) -> None:
    family, none = family_of(ref), build("none", {})
    info = family.info(ref, {})
    none.check(info)
    assert none.idle(info) == (VISUAL_TOKENS not in info.hooks)
    if none.idle(info):
        with_it, without = family.weights(info, (none,), 0), family.weights(info, (), 0)
        assert getattr(with_it, "key", None) == getattr(without, "key", None)
        assert none.axes(info).named() == {"ratio": 1.0}
    else:
        assert none.axes(info).named()["V"] == info.geometry["visual_tokens"]


@pytest.mark.parametrize("task", ["kv-recall", "digit-classification", "choice"])
def test_scores_and_costs_with_none_are_those_of_the_model(task: str) -> None:
    probe: TaskProbe = task_probe(TASKS.get(task))
    model: Model = probe.model
    built = probe.task(TASKS.get(task))
    plain = [shard.errors for shard in built.evaluate(model, probe.ctx, 0)]
    with build("none", {}).apply(model, None):
        same = [shard.errors for shard in built.evaluate(model, probe.ctx, 0)]
        assert build("none", {}).footprint(model, probe.ctx) == {"ratio": 1.0}
    np.testing.assert_array_equal(np.concatenate(plain), np.concatenate(same))
