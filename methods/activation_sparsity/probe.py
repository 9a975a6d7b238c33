"""The conformance suite's model for methods that leave neurons out: an untrained decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.methods.activation_sparsity.base import Sparsity
from isoflop.methods.activation_sparsity.calibration import ThresholdMethod
from isoflop.methods.base import Method, build
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, VOCABULARY, untrained_decoder
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel


class ActivationProbe(Probe):
    """Logits of an untrained decoder; the cost is the share of active neurons."""

    def __init__(self, examples: int = 4) -> None:
        self.model: LmModel = untrained_decoder()
        self.model.info = replace(self.model.info, hooks=self.model.info.hooks | {FEED_FORWARD})
        self.ctx = FolderContext.temporary()
        self.examples = examples
        self._found: dict[str, Any] = {}
        rng = np.random.default_rng(1)
        self._ids = torch.from_numpy(rng.integers(0, VOCABULARY, (examples, PROMPT + TAIL)))

    def prepared(self, method: Method, seed: int) -> Any:
        """The method's own thresholds on this model."""
        if not isinstance(method, ThresholdMethod):
            return None
        key = f"{method} {seed}"
        if key not in self._found:
            self._found[key] = method.calibrate(self.model, self.ctx, seed)
        return self._found[key]

    def forget(self) -> None:
        """Search anew."""
        self._found.clear()

    def absolute(self) -> Sequence[AbsoluteCost]:
        """24 of 96 neurons stay in each of 2 gated blocks of width 64: 3·64 weights a neuron, 2 FLOPs a weight and token."""
        method = build("mlp-topk", {"active": 0.25})
        return (
            AbsoluteCost(method, "cost", 24 / 96),
            AbsoluteCost(method, "mlp_flops", 2 * 2 * 3 * 64 * 24),
            AbsoluteCost(method, "mlp_flops_dense", 2 * 2 * 3 * 64 * 96),
        )

    @torch.no_grad()
    def verify(self, method: Method, prepared: Any) -> None:
        """The share that is counted is that of the neurons that enter the down projections and are not zero, at most."""
        from isoflop.models.hooks.feed_forward import mlps_of
        from isoflop.models.taps import ActivationTap

        tap = ActivationTap(mlps_of(self.model.decoder)[0].down)
        with tap.read() as seen:  # a hook behind the method's own, which sees what it has left
            self.outputs([0])
        sparsity = self.model.occupant(FEED_FORWARD)
        assert isinstance(sparsity, Sparsity)
        left = float((seen[0] != 0).double().mean())
        counted = sparsity.share_of_layer(0)
        assert left <= counted + 1e-9, f"{left:g} of the neurons are left, {counted:g} are counted"

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits, (B, tokens · vocabulary); the pass is observed, as a task does."""
        ids_BT = self._ids[list(rows)]
        logits_BTW = self.model.logits(LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED)))
        policy = self.model.occupant(FEED_FORWARD)
        if policy is not None:
            policy.observed()
        return logits_BTW.flatten(1)

    def cost(self) -> float:
        """Active neurons over all; 1 for the model as it is."""
        self.outputs([0])
        policy = self.model.occupant(FEED_FORWARD)
        return policy.active_share() if isinstance(policy, Sparsity) else 1.0
