"""Measuring what one answer costs on the live model, with whatever methods are applied to it.

Counted is one image and one question, batch of one, from pixels to the answer's logits: vision tower, compressor with
projector, and the language model's prefill of V + Q tokens. Nothing is taken from a formula: FLOPs come from
``torch.utils.flop_counter`` (matrix products, convolutions and attention; element-wise work is not counted), bytes from
the tensors themselves, seconds from a clock.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from isoflop.models.vlm import VlmBatch, VlmModel

REPEATS = 5
MakeBatch = Callable[[dict[int, Tensor]], VlmBatch]


@torch.no_grad()
def measure_answer(model: VlmModel, image_BCHW: Tensor, make: MakeBatch) -> dict[str, float]:
    """Footprint of one answer; see ``Task.measure`` for the keys.

    Args:
        image_BCHW: one image with values in [0, 1].
        make: the batch of one for given tower features.
    """
    image_BCHW = image_BCHW.to(model.device)
    vision, hidden = _flops(lambda: model.look(image_BCHW))
    batch = make(hidden)
    method, tokens = _flops(lambda: model.compress(batch).tokens_BVD)
    projector, visual_BVd = _flops(lambda: model.project(tokens))
    language, _ = _flops(lambda: model.prefill(visual_BVd, batch))
    cache = model.prefill(visual_BVd, batch, use_cache=True).past_key_values

    def answer() -> Tensor:
        return model.answer_logits(make(model.look(image_BCHW)))

    own = model.compression.module if model.compression is not None else None
    weight_bytes = module_bytes(model.module) + (module_bytes(own) if own is not None else 0)
    return {
        "visual_tokens": float(visual_BVd.shape[1]),
        "text_tokens": float(batch.prompt_BT.shape[1] - 1),
        "flops": float(vision + method + projector + language),
        "flops_llm": float(language),
        "flops_vision": float(vision),
        "flops_projector": float(projector),
        "flops_method": float(method),
        "weight_bytes": float(weight_bytes),
        "kv_bytes": float(cache_bytes(cache)),
        "seconds": _seconds(answer, model.device),
        "peak_bytes": float(weight_bytes + _peak_bytes(answer, model.device)),
    }


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of all distinct parameters and buffers."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a Hugging Face cache holds after the prefill."""
    seen: dict[int, Tensor] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                seen[id(value)] = value
    return sum(t.numel() * t.element_size() for t in seen.values())


def _flops(call: Callable[[], Any]) -> tuple[int, Any]:
    # The counter knows matrix products; the math backend expresses attention as such on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        value = call()
    return counter.get_total_flops(), value


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times)


def _peak_bytes(call: Callable[[], Tensor], device: torch.device) -> int:
    """Most bytes of activations alive at once during ``call``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _AliveBytes() as alive:
        call()
    return alive.peak


class _AliveBytes(TorchDispatchMode):
    """Follows the storages of tensors that operators return, until the last tensor on a storage is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, new=leaf.untyped_storage().data_ptr() not in known)
        return result

    def _follow(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer not in self._users:
            if not new:  # a view of a weight or of an input, counted elsewhere
                return
            self._users[pointer] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[pointer] += 1
        weakref.finalize(tensor, self._release, pointer, size)

    def _release(self, pointer: int, size: int) -> None:
        self._users[pointer] -= 1
        if self._users[pointer] == 0:
            del self._users[pointer]
            self.now -= size
