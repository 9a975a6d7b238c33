"""The hook ``gradients``: how the workers of a data-parallel training exchange gradients.

Nothing acts at inference; the occupant tells what the training that made the model recorded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from isoflop.core.hook import Hook
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.training.collectives import dense_wire_bytes

REPORT = "exchange.json"


@dataclass
class ExchangeReport(Occupant):
    """The occupant: what a training recorded of its exchange; series have one value per step, and are means over workers.

    Attributes:
        workers, backend: N; ``ddp`` or ``simulated``.
        elements: of all parameters.
        steady_from: first step after the warm-up.
        loss: of the batch, in nats.
        wire_bytes: sent by a worker, padding and lengths included.
        payload_bytes: of a worker's messages.
        exchange_ms: what a worker computes for the exchange, waiting left out.
        ms: of the whole step; all workers one after the other where they are simulated.
        socket_bytes: that a worker's sockets sent during the training, headers of the transport included; None where they
            are simulated or the system does not tell.
        worker_cpu_seconds: of all workers' processes together; 0 where they are simulated.
    """

    workers: int
    backend: str
    elements: int
    steady_from: int
    loss: list[float] = field(default_factory=list)
    wire_bytes: list[float] = field(default_factory=list)
    payload_bytes: list[float] = field(default_factory=list)
    exchange_ms: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    socket_bytes: float | None = None
    worker_cpu_seconds: float = 0.0

    SERIES: ClassVar[tuple[str, ...]] = ("loss", "wire_bytes", "payload_bytes", "exchange_ms", "ms")

    @property
    def dense_step_bytes(self) -> float:
        """What a worker sends per step in a ring all-reduce of all gradients in float32."""
        return dense_wire_bytes(self.elements, self.workers)

    def steady(self, series: Sequence[float]) -> float:
        """Mean over the steps after the warm-up; the last step's value where there is none."""
        after = series[self.steady_from :] or series[-1:]
        return sum(after) / len(after)

    def save(self, folder: Path) -> None:
        """Write ``exchange.json``."""
        (folder / REPORT).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> ExchangeReport:
        """What ``save`` wrote."""
        return cls(**json.loads((folder / REPORT).read_text()))


GRADIENTS: Hook[ExchangeReport] = Hook(
    "gradients", -10, "exchanges the gradients of a model's training between workers"
)
