"""Plain references for what methods do in the attention: explicit masks over whole caches, nothing compressed.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from isoflop.models.hooks.attention import AttentionCall, AttentionPolicy, CacheReport

SeesBHTT = Callable[[AttentionCall], Tensor]


def logits_of(call: AttentionCall) -> Tensor:
    """Unmasked logits, (B, H, T, T)."""
    k_BHTD = call.k_BGTD.repeat_interleave(call.q_BHTD.shape[1] // call.k_BGTD.shape[1], dim=1)
    return call.q_BHTD @ k_BHTD.transpose(-1, -2) * call.softmax.scaling


def causal(call: AttentionCall) -> Tensor:
    """Which keys each query sees where nothing acts, (B, H, T, T)."""
    batch, heads, length, _ = call.q_BHTD.shape
    return torch.ones(length, length, dtype=torch.bool).tril().expand(batch, heads, -1, -1).clone()


class Masked(AttentionPolicy):
    """Softmax attention over the whole text under a mask that the test gives."""

    def __init__(self, sees: SeesBHTT) -> None:
        self.sees = sees

    def attend(self, call: AttentionCall) -> Tensor:
        p_BHTT = logits_of(call).masked_fill(~self.sees(call), float("-inf")).softmax(-1)
        v_BHTD = call.v_BGTD.repeat_interleave(call.q_BHTD.shape[1] // call.v_BGTD.shape[1], dim=1)
        return (p_BHTT @ v_BHTD).transpose(1, 2)

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def forget(self) -> None:
        pass

    def report(self) -> CacheReport:
        raise ValueError("nothing is compressed")
