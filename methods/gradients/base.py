"""Gradient methods: how the workers of a data-parallel training exchange gradients.

They act in training only: the family of models trains its weights with them (see ``isoflop.models.training.distributed``), and the
resulting model is served as it is. Costs are what a worker sent, as recorded by that training.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.methods.gradients.compressors import GradCompressor
from isoflop.methods.gradients.exchange import Compression, Exchanger
from isoflop.methods.gradients.memory import ErrorFeedback, Forgetful, Memory
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.gradients import GRADIENTS, ExchangeReport
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.training.distributed import Setting

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

BACKENDS = ("ddp", "simulated")
LINKS_GBIT = (1, 10, 100)
"""Speeds of the links for which the time of the transfer is modelled."""


@dataclass(frozen=True)
class GradientMethod(Method):
    """Base class of methods on the gradients of a data-parallel training with momentum SGD.

    A step's batch is the model's ``batch`` whatever the number of workers: each takes an equal share of it. The learning
    rate follows the model's ``warmup`` and ``final``, and gradients its ``clip``; its own learning rates are AdamW's and
    not used.
    """

    family: ClassVar[str] = "gradients"
    ratio_of: ClassVar[str] = "bytes sent per step"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (GRADIENTS,)
    trains_model: ClassVar[bool] = True

    workers: Annotated[int, Knob(low=2, high=4, doc="N, data-parallel workers; must divide the model's batch")] = 2
    backend: Annotated[
        str, Knob(choices=BACKENDS, doc="processes over torch.distributed (gloo), or one that plays all workers")
    ] = "ddp"
    lr: Annotated[float, Knob(low=1e-4, high=10.0, log=True, doc="peak learning rate of momentum SGD")] = 0.3
    momentum: Annotated[float, Knob(low=0.0, high=0.99, doc="of SGD")] = 0.9
    nesterov: Annotated[bool, Knob(doc="Nesterov's momentum")] = False

    @abstractmethod
    def exchange(self, setting: Setting) -> Exchanger:
        """A worker's exchange, with an empty memory."""

    @property
    def processes(self) -> int:
        """Local processes that a training runs."""
        return self.workers if self.backend == "ddp" else 1

    def check(self, info: ModelInfo) -> None:
        """Refuse models that are not trained here, and numbers of workers that do not divide their batch."""
        super().check(info)
        batch = dict(info.options).get("batch", 0)
        if batch % self.workers:
            fitting = ", ".join(str(n) for n in (2, 3, 4) if batch % n == 0) or "none"
            raise Infeasible(
                f"method {self.name}: workers = {self.workers} does not divide the batch of {batch} sequences of model "
                f"{info.ref}; allowed: {fitting}"
            )

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The model's own training, whose report tells what was sent."""
        return weights

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The report of the model's training, at hand for ``footprint``; the model is served as it was trained.

        Args:
            prepared: the checkpoint of the training, or its ``ExchangeReport``; None gives no footprint.
        """
        report = report_of(prepared)
        return {} if report is None else {GRADIENTS: report}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Bytes that a worker sends per step, measured in the training.

        ``ratio``: those of a ring all-reduce of all gradients in float32 over ``wire_bytes``, which are the mean after
        the warm-up. ``payload_ratio``: a worker's gradients over its messages, before they are multiplied by the
        collective, which papers quote. ``run_wire_ratio`` and ``run_wire_bytes``: of the whole training, warm-up
        included. ``exchange_ms``: computed for the exchange, ``ms``: of a step here. ``modelled_ms_<n>gbit``: a model,
        not a measurement: ``exchange_ms`` and ``wire_bytes`` over a link of that speed. ``socket_bytes``: what a
        worker's sockets sent per step, by the kernel's count; only over gloo.
        """
        report = model.occupant(GRADIENTS)
        if report is None:
            raise ValueError(f"method {self.name} knows nothing of the model's training")
        wire, payload = report.steady(report.wire_bytes), report.steady(report.payload_bytes)
        exchange_ms, steps = report.steady(report.exchange_ms), len(report.wire_bytes)
        sockets = {} if report.socket_bytes is None else {"socket_bytes": report.socket_bytes / steps}
        return {
            "ratio": report.dense_step_bytes / wire,
            "payload_ratio": 4 * report.elements / payload,
            "run_wire_ratio": report.dense_step_bytes * steps / sum(report.wire_bytes),
            "run_wire_bytes": sum(report.wire_bytes),
            "wire_bytes": wire,
            "payload_bytes": payload,
            "workers": float(report.workers),
            "ms": report.steady(report.ms),
            "exchange_ms": exchange_ms,
            **{f"modelled_ms_{n}gbit": exchange_ms + 8 * wire / (n * 1e6) for n in LINKS_GBIT},
            **sockets,
        }

    def trace(self, prepared: Any) -> Mapping[str, Sequence[float]]:
        """Per step of the training: loss, and bytes that a worker has sent so far, which together are loss against bytes."""
        report = report_of(prepared)
        if report is None:
            return {}
        return {
            "loss": report.loss,
            "wire_bytes_sent": list(accumulate(report.wire_bytes)),
            "payload_bytes": report.payload_bytes,
            "ms": report.ms,
        }

    @classmethod
    def probe(cls) -> Probe:
        """A decoder that is trained for a few steps."""
        from isoflop.methods.gradients.probe import GradientProbe

        return GradientProbe()


@dataclass(frozen=True)
class CompressingMethod(GradientMethod):
    """Base class of methods that compress: matrices go through memory and compressor, vectors are averaged as they are.

    By default the memory is error feedback, and momentum is the optimiser's, on the averaged directions.
    """

    clip: Annotated[
        bool, Knob(doc="shorten each worker's gradient to the model's clip / √N before it is accumulated")
    ] = True
    min_numel: Annotated[
        int, Knob(low=1, high=2**31, log=True, doc="smaller tensors are averaged as they are", unit="elements")
    ] = 1

    @abstractmethod
    def compressor(self, setting: Setting) -> GradCompressor:
        """A worker's compressor."""

    def memory(self) -> Memory:
        """A worker's memory, empty."""
        return ErrorFeedback()

    def warmup_steps(self, setting: Setting) -> int:
        """Steps that send more than the later ones."""
        return 0

    def exchange(self, setting: Setting) -> Exchanger:
        """See ``GradientMethod.exchange``."""
        names = (n for n, shape in setting.shapes.items() if len(shape) > 1 and shape.numel() >= self.min_numel)
        clip = setting.clip * setting.workers**-0.5 if self.clip else None
        part = Compression(self.compressor(setting), self.memory(), frozenset(names), clip, self.warmup_steps(setting))
        return Exchanger(setting.workers, part)


def feedback_memory(feedback: bool) -> Memory:
    """Error feedback, or none."""
    return ErrorFeedback() if feedback else Forgetful()


def report_of(prepared: Any) -> ExchangeReport | None:
    """The report of a training: itself, or read beside a checkpoint."""
    if prepared is None or isinstance(prepared, ExchangeReport):
        return prepared
    return ExchangeReport.read(prepared.folder)
