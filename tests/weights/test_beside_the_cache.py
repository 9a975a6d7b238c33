"""Every method on matrices beside one on the cache: each changes what the other leaves, and both go again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isoflop.methods.base import METHODS, build
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, VOCABULARY
from isoflop.methods.weights.probe import WeightProbe
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.lm import NOT_SCORED, LmBatch
from isoflop.testing.configurations import at_default

SMALL = {"aqlm": {"rounds": 1, "steps": 2}, "bitstack": {"sort": "weight-error"}}
"""Quicker than at the defaults."""
ON_MATRICES = [name for name in METHODS.own() if MATRICES in METHODS.get(name).hooks and name != "none"]


@torch.no_grad()
def behind_a_prompt(probe: WeightProbe) -> Tensor:
    """Logits of tokens that read the others' keys and values as the cache keeps them."""
    ids_BT = torch.randint(0, VOCABULARY, (2, PROMPT + TAIL), generator=torch.Generator().manual_seed(0))
    return probe.model.logits(LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED), PROMPT))[:, PROMPT:]


@pytest.mark.parametrize("name", ON_MATRICES)
def test_beside_a_method_on_the_cache(name: str) -> None:
    cls = METHODS.get(name)
    probe = cls.probe()
    assert isinstance(probe, WeightProbe)
    method = build(name, SMALL[name]) if name in SMALL else at_default(cls, probe)
    cache, bare = build("kv-rtn", {"bits": 2}), behind_a_prompt(probe)
    with cache.apply(probe.model, None):
        cached = behind_a_prompt(probe)
    with method.apply(probe.model, probe.prepared(method, 0)):
        alone = behind_a_prompt(probe)
        with cache.apply(probe.model, None):
            both = behind_a_prompt(probe)
    assert torch.isfinite(both).all()
    found = (bare, cached, alone, both)
    assert all(not torch.equal(a, b) for number, a in enumerate(found) for b in found[:number])
    assert torch.equal(behind_a_prompt(probe), bare)
