"""The conformance suite's model for methods that leave experts out: an untrained mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from isoflop.core.folder_context import FolderContext
from isoflop.core.knobs import KnobValue
from isoflop.methods.base import Method, build
from isoflop.methods.experts.odp import Odp
from isoflop.methods.experts.pruning import PER_TOKEN, Pruning
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, VOCABULARY
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.methods.weights.mixture_probe import untrained_mixture
from isoflop.models.hooks.experts import EXPERTS, experts_of
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel
from isoflop.models.taps import ActivationTap

LAYERS = 2
PROTECTED = 0.25
"""Of a probe's text; the share in the paper leaves no token of it."""


class PruningProbe(Probe):
    """Logits of an untrained mixture; the cost is the experts that run for a token."""

    def __init__(self, examples: int = 4) -> None:
        self.model: LmModel = untrained_mixture(layers=LAYERS)
        self.ctx, self.examples = FolderContext.temporary(), examples
        self._found: dict[str, Any] = {}
        rng = np.random.default_rng(1)
        self._ids = torch.from_numpy(rng.integers(0, VOCABULARY, (examples, PROMPT + TAIL)))

    def prepared(self, method: Method, seed: int) -> Any:
        """The method's own thresholds on this model; kept, because a quantile may not change them."""
        if not isinstance(method, Odp):
            return None
        key = f"{method.measured()} {seed}"
        if key not in self._found:
            self._found[key] = method.measured().calibrate(self.model, self.ctx, seed)
        return self._found[key]

    def forget(self) -> None:
        """Calibrate anew."""
        self._found.clear()

    def settings(self, knob: str) -> Sequence[Mapping[str, KnobValue]]:
        """Importance tells where some are protected."""
        return (
            [{knob: value, "protect": PROTECTED} for value in ("received", "released")] if knob == "importance" else ()
        )

    def absolute(self) -> Sequence[AbsoluteCost]:
        """At 1 every token has one expert, and of 48 tokens the 12 that are protected have two.

        A layer of width 64 has 2·64² + 2·64·32 weights of attention, 4·64 of its router, 2·64 of norms, and 3·64·32 per expert.
        """
        all_lose = build("odp", {"quantile": 1.0, "protect": 0.0})
        some = build("odp", {"quantile": 1.0, "protect": PROTECTED})
        layer = 2 * 64**2 + 2 * 64 * 32 + 4 * 64 + 2 * 64
        return (
            AbsoluteCost(all_lose, "cost", 1.0),
            AbsoluteCost(all_lose, "active_params", LAYERS * (layer + 3 * 64 * 32)),
            AbsoluteCost(some, "cost", 1 + 12 / 48),
        )

    @torch.no_grad()
    def verify(self, method: Method, prepared: Any) -> None:
        """As many experts run as are counted, by the tokens that enter them."""
        pruning = self.model.occupant(EXPERTS)
        assert isinstance(pruning, Pruning)
        before, counts = pruning.pairs.total(), list[int]()
        with ExitStack() as stack:
            for experts in experts_of(self.model.decoder).values():
                seen = stack.enter_context(ActivationTap(cast("nn.Module", experts.act_fn), "output").read())
                stack.callback(lambda seen=seen: counts.extend(len(rows) for rows in seen))  # type: ignore[misc]
            self.outputs(range(self.examples))
        ran, counted = sum(counts), pruning.pairs.total() - before
        assert ran == counted, f"{ran} pairs of a token and an expert ran, {counted} are counted"

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits, (B, tokens · vocabulary)."""
        ids_BT = self._ids[list(rows)]
        return self.model.logits(LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED))).flatten(1)

    def cost(self) -> float:
        """Experts per token and layer; 2 for the model as it is."""
        self.outputs(range(self.examples))
        pruning = self.model.occupant(EXPERTS)
        return pruning.active_experts() if isinstance(pruning, Pruning) else float(PER_TOKEN)
