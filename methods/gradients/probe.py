"""The conformance suite's training for gradient methods: a narrow decoder, a few steps, all workers simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import Method, build
from isoflop.methods.gradients.base import GradientMethod
from isoflop.methods.kv_cache.probe import VOCABULARY, untrained_decoder
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.models.hooks.gradients import GRADIENTS, ExchangeReport
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel
from isoflop.models.tiny.lm_exchange import LmLoss, rows_of
from isoflop.models.training.collectives import dense_wire_bytes
from isoflop.models.training.distributed import simulate
from isoflop.models.training.loop import descend

STEPS, BATCH, TOKENS = 4, 12, 8


@dataclass(frozen=True)
class ProbeRecipe:
    """The schedule of the probe's training."""

    steps: int = STEPS
    warmup: float = 0.25
    final: float = 0.5
    clip: float = 3.5  # above the norm of whole batches, below that of shares times √N


@dataclass
class TrainedProbe(ExchangeReport):
    """A report together with the trained weights, by name in the module; times are 0, since they prove nothing."""

    weights: dict[str, Tensor] | None = None


class GradientProbe(Probe):
    """Logits of a decoder after a short training with the method that is applied; bytes that a worker sends per step.

    Without a method, the training is one process's, with plain momentum SGD on whole batches: the reference that a method
    must equal where it sends everything. Sums over shares of a batch are taken in another order than over the whole.
    """

    exact = False

    def __init__(self, examples: int = 4) -> None:
        self.model: LmModel = untrained_decoder(layers=1)
        info = self.model.info
        self.model.info = replace(info, hooks=info.hooks | {GRADIENTS}, options=(("batch", BATCH),))
        self.ctx = FolderContext.temporary()
        self.examples = examples
        rng = np.random.default_rng(1)
        self._ids = torch.from_numpy(rng.integers(0, VOCABULARY, (examples, TOKENS)))
        self._trained: dict[str, TrainedProbe] = {}
        self._plain: dict[str, Tensor] | None = None

    def prepared(self, method: Method, seed: int) -> TrainedProbe:
        """What a training with the method gave; the back-end is simulated whatever the knob says."""
        assert isinstance(method, GradientMethod)
        key = f"{replace(method, backend='simulated').as_field()} {seed}"
        if key not in self._trained:
            module = self._copy()
            report = simulate(LmLoss(module), method, ProbeRecipe(), self._lessons(), rows_of, seed)
            for name in ("ms", "exchange_ms"):
                setattr(report, name, [0.0] * STEPS)
            self._trained[key] = TrainedProbe(**vars(report), weights=_weights(module))
        return self._trained[key]

    def forget(self) -> None:
        """Train anew."""
        self._trained.clear()

    def trained(self, method: Method, prepared: Any) -> Any:
        """Where the workers run: the results are the same bits, as a test of the back-ends tells."""
        assert isinstance(method, GradientMethod)
        return method.processes

    def absolute(self) -> Sequence[AbsoluteCost]:
        """In a ring all-reduce each of N workers sends 2·(N - 1)/N of all gradients, 4 bytes each.

        There are 48·64 numbers in the embeddings, as many in the head, 2·64² + 2·64·32 + 3·64·96 in the matrices of the one
        layer, and 3·64 in norms: 37056.
        """
        numbers = 2 * 48 * 64 + 2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 96 + 3 * 64
        two, four = (build("dense-gradients", {"workers": workers}) for workers in (2, 4))
        return (
            AbsoluteCost(two, "cost", 2 * 1 / 2 * 4 * numbers),
            AbsoluteCost(two, "run_wire_bytes", STEPS * 2 * 1 / 2 * 4 * numbers),
            AbsoluteCost(four, "wire_bytes", 2 * 3 / 4 * 4 * numbers),
        )

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits after the training, (B, tokens · vocabulary)."""
        ids_BT = self._ids[list(rows)]
        report = self.model.occupant(GRADIENTS)
        weights = report.weights if isinstance(report, TrainedProbe) else self._plainly_trained()
        return functional_call(self.model.module, weights or {}, (ids_BT,)).logits.flatten(1)

    def cost(self) -> float:
        """Bytes that a worker sends in the last step; without a method, those of a ring all-reduce in float32."""
        report = self.model.occupant(GRADIENTS)
        if report is None:
            return dense_wire_bytes(sum(p.numel() for p in self.model.module.parameters()), 2)
        return report.wire_bytes[-1]

    def verify(self, method: Method, prepared: Any) -> None:
        """The warm-up sends no less than later steps, and the messages no more than the wire carries in all."""
        assert isinstance(prepared, TrainedProbe)
        last = prepared.wire_bytes[-1]
        early = prepared.wire_bytes[: prepared.steady_from]
        assert all(size >= last for size in early), f"the warm-up sends less than later steps: {early} and {last}"
        sent, payload = prepared.wire_bytes[-1] * prepared.workers, prepared.payload_bytes[-1]
        assert sent >= payload, f"{prepared.workers} workers send {sent:g} bytes for messages of {payload:g}"

    def _copy(self) -> Any:
        module = untrained_decoder(layers=1).module
        return module.requires_grad_(True).train()

    def _lessons(self) -> Iterator[LmBatch]:
        rng = np.random.default_rng(2)
        for _ in range(STEPS):
            ids_BT = torch.from_numpy(rng.integers(0, VOCABULARY, (BATCH, TOKENS)))
            targets_BT = torch.full_like(ids_BT, NOT_SCORED)
            targets_BT[:, :-1] = ids_BT[:, 1:]
            yield LmBatch(ids_BT, targets_BT)

    def _plainly_trained(self) -> dict[str, Tensor]:
        """Weights after momentum SGD in one process."""
        if self._plain is None:
            module = self._copy()
            loss: nn.Module = LmLoss(module)
            optimizer = torch.optim.SGD(loss.parameters(), lr=GradientMethod.lr, momentum=GradientMethod.momentum)
            with torch.enable_grad():
                descend(optimizer, ProbeRecipe(), self._lessons(), loss)
            self._plain = _weights(module)
        return self._plain


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}
