"""Measuring what one answer costs on the live model, with whatever methods are applied to it.

Counted is one image and one question, batch of one, from pixels to the answer's logits: vision tower, compressor with
projector, and the language model's prefill of V + Q tokens. Nothing is taken from a formula: FLOPs come from
``torch.utils.flop_counter`` (matrix products, convolutions and attention; element-wise work is not counted), bytes from
the tensors themselves, seconds from a clock. Bytes of weights and cache count 16 bits per element of a model that
merely computes in float32 (``ModelInfo.dense_bits``); ``peak_bytes`` counts what this process really held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from isoflop.methods.kv_cache.base import CompressedCache
from isoflop.methods.kv_cache.full_cache import FullCache
from isoflop.models.counting import flops_of
from isoflop.models.decoder_model import DecoderModel
from isoflop.models.features import LayerKey
from isoflop.models.hooks.attention import ATTENTION, CacheReport
from isoflop.models.live_bytes import LiveBytes
from isoflop.models.metering import meter
from isoflop.models.visual_side import PLAIN, Layout
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch

MOST_TIMINGS = 5
"""Of a call that takes little."""
PATIENCE = 1.0
"""Seconds of timing after which there is no further one: what takes longer differs less, and is most of a job on a real model."""
MakeBatch = Callable[[dict[LayerKey, Tensor]], VlmBatch]


@torch.no_grad()
def measure_answer(model: VlmModel, pixels: Tensor, make: MakeBatch, layout: Layout = PLAIN) -> dict[str, float]:
    """Footprint of one answer; see ``Task.measure`` for the keys.

    Args:
        pixels: of one image; see ``VlmModel.look``.
        make: the batch of one for given tower features.
        layout: of the image.
    """
    pixels = pixels.to(model.device)
    vision, hidden = flops_of(lambda: model.look(pixels, layout=layout))
    batch = make(hidden)
    method, found = flops_of(lambda: model.compress(batch))
    projector, visual_BVd = flops_of(lambda: model.project(found.tokens_BVD, layout))

    def prefill() -> Any:
        return model.prefill(visual_BVd, batch, found.places_BV, question_BQd=found.question_BQd, deep=found.deep)

    language, _ = flops_of(prefill)

    def answer() -> Tensor:
        return model.answer_logits(make(model.look(pixels, layout=layout)))

    visual, dense = visual_BVd.shape[1], model.side.tokens(layout)
    separators = len(model.side.ids(layout, visual)) - visual
    text = batch.prompt_BT.shape[1] - 1 + separators
    if ATTENTION in model.info.hooks:
        cache = decoder_cache(model, prefill)
    else:  # nothing can act on it, so that all of it is held
        cache = CacheReport(*[model.dense_cache_bytes(visual + text)] * 5)
    dense_cache = model.dense_cache_bytes(dense + text)
    return {
        **({"visual_tokens_dense": float(dense)} if model.side.sized else {}),
        "visual_tokens": float(visual_BVd.shape[1]),
        "text_tokens": float(text),
        "flops": float(vision + method + projector + language),
        "flops_llm": float(language),
        "flops_vision": float(vision),
        "flops_projector": float(projector),
        "flops_method": float(method),
        **byte_costs(model, cache, dense_cache),
        "seconds": seconds_of(answer, model.devices),
        "peak_bytes": float(model.resident_bytes() + peak_bytes_of(answer, model.devices)),
    }


def byte_costs(model: DecoderModel, cache: CacheReport, dense_cache: float) -> dict[str, float]:
    """Bytes of weights and cache, as compressed and dense; ``bytes`` is their sum, what serving one request holds.

    Weights that methods hold besides the model count as compressed only.

    Args:
        dense_cache: bytes of the whole cache of the same request where no method of any kind acts.
    """
    weight_bytes, dense = model.served_bytes(), model.dense_weight_bytes()
    return {
        "weight_bytes": weight_bytes,
        "weight_bytes_dense": dense,
        "kv_bytes": cache.stored,
        "kv_bytes_dense": dense_cache,
        "kv_read_bytes": cache.read,
        "bytes": weight_bytes + cache.stored,
        "bytes_dense": dense + dense_cache,
    }


def decoder_cache(model: DecoderModel, forward: Callable[[], Any]) -> CacheReport:
    """The key-value cache that one forward pass leaves behind, batch of one; the whole cache where no method acts on it."""
    if model.occupant(ATTENTION) is None:
        with model.occupy(ATTENTION, CompressedCache(FullCache(), None, model.info.dense_bits)):
            return decoder_cache(model, forward)
    with meter(model) as reading:
        forward()
    if reading.cache is None:
        raise ValueError(f"nothing was compressed in a pass of model {model.info.ref} whose cache was to be measured")
    return reading.cache


def seconds_of(call: Callable[[], Any], devices: Sequence[torch.device], warm: bool = False) -> float:
    """Median wall seconds of a call after one warm-up; calls that take long, and differ less, are timed less often.

    Args:
        warm: it has just run, and needs no warm-up.
    """
    if not warm:
        call()
    times: list[float] = []
    while len(times) < MOST_TIMINGS and sum(times) <= PATIENCE:
        started = time.perf_counter()
        call()
        synchronize(devices)
        times.append(time.perf_counter() - started)
    return median(times)


def synchronize(devices: Sequence[torch.device]) -> None:
    """Wait for what accelerators have to do."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def peak_bytes_of(call: Callable[[], Any], devices: Sequence[torch.device]) -> int:
    """Most bytes of activations alive at once during ``call``; on several accelerators the sum over them of each one's most."""
    if devices[0].type == "cuda":
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        before = sum(torch.cuda.memory_allocated(device) for device in devices)
        call()
        synchronize(devices)
        return sum(torch.cuda.max_memory_allocated(device) for device in devices) - before
    with LiveBytes() as alive:
        call()
    return alive.peak
