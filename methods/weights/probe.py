"""The conformance suite's model for weight methods: an untrained decoder with grouped queries."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.core.knobs import KnobValue
from isoflop.methods.base import Method
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, VOCABULARY, untrained_decoder
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.methods.weights.base import WeightMethod
from isoflop.methods.weights.healing import HealedMethod
from isoflop.methods.weights.payloads import PAYLOADS, Payload
from isoflop.methods.weights.views import linear_views, replaceable
from isoflop.models.base import tensor_bytes
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel

HEALED_STEPS = 2
"""Of the training of a stored form, at most."""
SETTINGS_LENGTH = 256
"""Characters of a payload's settings as JSON, at most: they cost nothing, so no weights may lie in them."""


class WeightProbe(Probe):
    """Logits of an untrained decoder; the cost is the bytes of its matrices as stored.

    Args:
        tried: settings in which a knob shows what it does, where none shows by itself; see ``Probe.settings``.
        model: in the place of that decoder.
    """

    def __init__(
        self,
        examples: int = 4,
        layers: int = 1,
        tried: Mapping[str, Sequence[Mapping[str, KnobValue]]] | None = None,
        model: LmModel | None = None,
    ) -> None:
        self._tried = tried or {}
        self.model: LmModel = untrained_decoder(layers=layers) if model is None else model
        shapes = Counter((view.rows, view.cols) for view in linear_views(self.model))
        matrices = tuple((rows, cols, count) for (rows, cols), count in shapes.items())
        self.model.info = replace(self.model.info, geometry={**self.model.info.geometry, "matrices": matrices})
        self.ctx = FolderContext.temporary()
        self.examples = examples
        self._calibrated: dict[str, Any] = {}
        rng = np.random.default_rng(1)
        self._dense = {view.parameter: view.holder.detach().clone() for view in linear_views(self.model)}
        self._ids = torch.from_numpy(rng.integers(0, VOCABULARY, (examples, PROMPT + TAIL)))

    def prepared(self, method: Method, seed: int) -> Any:
        """The value of the method's own calibration on this model; kept, because a ratio knob may not change it.

        Of a training the first steps are enough to see that it happens.
        """
        if not isinstance(method, WeightMethod) or not hasattr(method, "calibrate"):
            return None
        if isinstance(method, HealedMethod):
            method = method.begun(HEALED_STEPS)
        key = f"{method.name} {method.calibration_knobs()} {seed}"
        if key not in self._calibrated:
            self._calibrated[key] = method.calibrate(self.model, self.ctx, seed)
        return self._calibrated[key]

    def forget(self) -> None:
        """Calibrate anew."""
        self._calibrated.clear()

    def settings(self, knob: str) -> Sequence[Mapping[str, KnobValue]]:
        """Those given."""
        return self._tried.get(knob, ())

    def absolute(self) -> Sequence[AbsoluteCost]:
        """A layer of width 64 with keys of 32 and an MLP of 96: 2·64² + 2·64·32 + 3·64·96 = 30720 weights.

        Rounded to 4 bits, half a byte each, with a grid of 4 bytes for every 32; whole, 2 bytes each.
        """
        from isoflop.methods.base import build

        weights = self.model.info.geometry["layers"] * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 96)
        rounded, whole = build("rtn", {"bits": 4, "group": 32}), build("rtn", {"bits": 16})
        return (
            AbsoluteCost(rounded, "cost", weights / 2 + 4 * weights / 32),
            AbsoluteCost(rounded, "bits", 4 + 32 / 32),
            AbsoluteCost(whole, "cost", 2.0 * weights),
        )

    @torch.no_grad()
    def verify(self, method: Method, prepared: Any) -> None:
        """Bytes counted are bytes stored, and the served matrices are what the serialised payloads decode to."""
        assert isinstance(method, WeightMethod)
        views = linear_views(self.model)
        served = {view.name: view.weight().clone() for view in views}
        counted: dict[str, float] = dict.fromkeys((view.parameter for view in views), 0.0)
        with replaceable(self.model, list(counted)) as parameters:
            for name, weight in self._dense.items():
                parameters[name].data.copy_(weight)
            payload_of, _ = method.served(self.model, views, prepared)
            for view in views:
                payload = payload_of(view)
                check_payload(payload, served[view.name], self.model.info.dense_bits)
                counted[view.parameter] += payload.nbytes(self.model.info.dense_bits)
        for name, size in counted.items():
            assert self.model.stored[name] == size, f"{name} counts {self.model.stored[name]:g} bytes, not {size:g}"

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


def check_payload(payload: Payload, served_OI: Tensor, dense_bits: int) -> None:
    """Raise AssertionError unless ``payload`` counts what it stores and what it stores decodes to ``served_OI``."""
    kind, tensors, raw = payload.kind, payload.tensors(), payload.serialise()
    assert payload.nbytes(32) == len(raw), f"payload {kind} counts {payload.nbytes(32):g} bytes and stores {len(raw)}"
    size = sum(tensor_bytes(t, dense_bits) for t in tensors.values())
    assert payload.nbytes(dense_bits) == size, (
        f"payload {kind} counts {payload.nbytes(dense_bits):g} bytes and stores {size:g} at {dense_bits} bits"
    )
    settings = json.dumps(payload.settings())
    assert len(settings) <= SETTINGS_LENGTH, f"payload {kind} hides {len(settings)} characters in its settings"
    restored, start = {}, 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        restored[name] = torch.frombuffer(bytearray(raw[start:end]), dtype=tensor.dtype).view(tensor.shape)
        start = end
    decoded_OI = PAYLOADS[kind].restore(json.loads(settings), restored).decode()
    assert torch.equal(decoded_OI.to(served_OI.dtype), served_OI), (
        f"what is served is not what the serialised payload {kind} decodes to"
    )
