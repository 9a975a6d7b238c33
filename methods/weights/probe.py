"""The conformance suite's model for weight methods: an untrained decoder with grouped queries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import Method
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, VOCABULARY, untrained_decoder
from isoflop.methods.probe import Probe
from isoflop.methods.weights.base import WeightMethod
from isoflop.methods.weights.views import linear_views
from isoflop.models.base import tensor_bytes
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel


class WeightProbe(Probe):
    """Logits of an untrained decoder; the cost is the bytes of its matrices as stored."""

    def __init__(self, examples: int = 4) -> None:
        self.model: LmModel = untrained_decoder(layers=1)
        shapes = Counter((view.rows, view.cols) for view in linear_views(self.model))
        matrices = tuple((rows, cols, count) for (rows, cols), count in shapes.items())
        self.model.info = replace(self.model.info, geometry={**self.model.info.geometry, "matrices": matrices})
        self.ctx = FolderContext(Path(mkdtemp(prefix="isoflop-probe-")))
        self.examples = examples
        self._calibrated: dict[str, Any] = {}
        rng = np.random.default_rng(1)
        self._ids = torch.from_numpy(rng.integers(0, VOCABULARY, (examples, PROMPT + TAIL)))

    def prepared(self, method: Method, seed: int) -> Any:
        """The value of the method's own calibration on this model; kept, because a ratio knob may not change it."""
        if not isinstance(method, WeightMethod) or not hasattr(method, "calibrate"):
            return None
        key = f"{method.name} {method.calibration_knobs()} {seed}"
        if key not in self._calibrated:
            self._calibrated[key] = method.calibrate(self.model, self.ctx, seed)
        return self._calibrated[key]

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits, (B, tokens · vocabulary)."""
        ids_BT = self._ids[list(rows)]
        return self.model.logits(LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED))).flatten(1)

    def cost(self) -> float:
        """Bytes of the compressible matrices."""
        dense = {
            view.parameter: tensor_bytes(view.holder, self.model.info.dense_bits) for view in linear_views(self.model)
        }
        return sum(self.model.stored.get(name, size) for name, size in dense.items())
