"""The runtime of KV-cache methods: one pass equals step by step, padding, composition at one hook."""

import pytest
import torch

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import KvCacheMethod
from isoflop.methods.kv_cache.probe import PROMPT, KvCacheProbe
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.lm import LmBatch


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe()


@pytest.mark.parametrize("name", ["full-cache"])
def test_one_pass_equals_step_by_step(name: str, probe: KvCacheProbe) -> None:
    method, batch = build(name, {}), probe.batch(range(3))
    with method.apply(probe.model, None), torch.no_grad():
        together = probe.model.logits(batch)
        report = probe.model.occupant(ATTENTION).report()  # type: ignore[union-attr]
        alone = probe.model.stepwise_logits(batch)
        assert probe.model.occupant(ATTENTION).report() == report  # type: ignore[union-attr]
    assert (together - alone).abs().max() <= 1e-5 * together.abs().max()


def test_left_padding_changes_nothing(probe: KvCacheProbe) -> None:
    batch = probe.batch([0, 1])
    pads = 5
    ids = torch.cat((torch.zeros(2, pads, dtype=torch.long), batch.ids_BT), dim=1)
    valid = torch.arange(ids.shape[1])[None].expand(2, -1) >= pads
    padded = LmBatch(ids, torch.zeros_like(ids), PROMPT + pads, valid)
    with build("full-cache", {}).apply(probe.model, None), torch.no_grad():
        plain = probe.model.logits(batch)[:, PROMPT:]
        assert (probe.model.logits(padded)[:, PROMPT + pads :] - plain).abs().max() <= 1e-5 * plain.abs().max()
        steps = probe.model.stepwise_logits(padded)[:, PROMPT + pads :]
        assert (steps - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_the_hook_takes_one_method(probe: KvCacheProbe) -> None:
    method = build("full-cache", {})
    assert isinstance(method, KvCacheMethod)
    with (
        method.apply(probe.model, None),
        pytest.raises(Infeasible, match="one method"),
        method.apply(probe.model, None),
    ):
        pass
    assert probe.model.occupant(ATTENTION) is None
