"""Heads that pool tokens of a vision encoder, while a reduction has merged some of them.

A mean over tokens becomes the mean weighted by their sizes, as in ToMe's released code for models that average (its patch for MAE):
a token that stands for four patches counts four times, so that merging equal patches changes nothing. Attention that pools gets the
logarithms of the sizes on its keys where the reduction's own attention gets them. Tokens in front of the patches count as ever, and
patches that were dropped count nothing. As long as nothing has merged, the head sees what it always saw.

Shape suffixes: B batch, N tokens (prefix tokens first), M patches, C width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from isoflop.models.hooks.vision_blocks import BlockRun


@dataclass(frozen=True, eq=False)
class Pooling:
    """What of a model pools tokens behind the last block.

    Attributes:
        averaged: the encoder whose ``last_hidden_state`` a head averages over the patches; None for none.
        attended: attention of a learned query over all tokens; None for none.
    """

    averaged: nn.Module | None = None
    attended: nn.MultiheadAttention | None = None


NO_POOLING = Pooling()
"""The head reads tokens in front of the patches only."""


@contextmanager
def sized_pooling(pooling: Pooling, run: BlockRun) -> Iterator[None]:
    """Let the head count sizes within the ``with`` block."""
    with ExitStack() as stack:
        if pooling.averaged is not None:
            stack.callback(pooling.averaged.register_forward_hook(_weighting(run)).remove)
        if pooling.attended is not None:
            hook = _biasing(run, pooling.attended.num_heads)
            stack.callback(pooling.attended.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def weighted_by_size(x_BNC: Tensor, size_BN1: Tensor, prefix: int) -> Tensor:
    """Tokens whose plain mean over the patches is the mean weighted by their sizes."""
    size_BM1 = size_BN1[:, prefix:]
    weight_BM1 = size_BM1 * size_BM1.shape[1] / size_BM1.sum(1, keepdim=True)
    return torch.cat((x_BNC[:, :prefix], (x_BNC[:, prefix:].float() * weight_BM1).to(x_BNC.dtype)), dim=1)


def _weighting(run: BlockRun) -> Callable[[nn.Module, Any, Any], Any]:
    def weigh(module: nn.Module, args: Any, output: Any) -> Any:
        state = run.state
        if state is None or state.size_BN1 is None:
            return None
        x_BNC = weighted_by_size(output.last_hidden_state, state.size_BN1, state.prefix)
        return type(output)(**{**output, "last_hidden_state": x_BNC})

    return weigh


def _biasing(run: BlockRun, heads: int) -> Callable[[nn.Module, Any, Mapping[str, Any]], Any]:
    def bias(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        state = run.state
        bias_B11N = None if state is None else run.reduction.pooling_bias(state)
        if bias_B11N is None:
            return None
        mask = bias_B11N.expand(-1, heads, -1, -1).flatten(0, 1)  # (B·H, 1, N), as torch wants it
        return args, {**kwargs, "attn_mask": mask}

    return bias
