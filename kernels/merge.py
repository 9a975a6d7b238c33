"""Matching tokens with their most similar ones, and merging tokens by their sizes.

These two carry ToMe and PiToMe alike. A method decides which tokens are sources, which are destinations and which stay out
of it (protected ones, [CLS]); it asks ``bipartite_match`` for each source's best destination, picks the pairs to merge, and
hands the plan, in indices of the original tokens, to ``merge_tokens``.

Shape suffixes: B batch, N tokens (sources when matching), M destinations, K tokens kept, R tokens merged away, C channels,
D width of the metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.kernels.dispatch import operation

_EPS = 1e-12
"""Least squared norm that cosine similarity divides by; a zero vector is similar to nothing (0)."""


def _match_supported(a_BND: Tensor, b_BMD: Tensor, valid_BM: Tensor | None = None) -> bool:
    return a_BND.numel() > 0 and b_BMD.shape[1] > 0 and a_BND.shape[0] <= 65535


@operation("isoflop.kernels.merge_triton:bipartite_match", supports=_match_supported)
def bipartite_match(a_BND: Tensor, b_BMD: Tensor, valid_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each ``a`` the most cosine-similar ``b``; of equals the first.

    Args:
        a_BND: metric of the sources.
        b_BMD: metric of the destinations, at least one.
        valid_BM: False for destinations that must not be chosen (padding). A source without any gets (-inf, 0).

    Returns:
        similarity_BN (float32) and index_BN (int64, into M).

    Raises:
        ValueError: there are no destinations.
    """
    if b_BMD.shape[1] == 0:
        raise ValueError("bipartite_match needs at least one destination")
    cosine_BNM = _unit(a_BND) @ _unit(b_BMD).transpose(-1, -2)
    if valid_BM is not None:
        cosine_BNM = cosine_BNM.masked_fill(~valid_BM[:, None], float("-inf"))
    index_BN = cosine_BNM.argmax(-1)  # the first of equals
    return cosine_BNM.gather(-1, index_BN[..., None]).squeeze(-1), index_BN


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x * x.square().sum(-1, keepdim=True).clamp_min(_EPS).rsqrt()


def _merge_supported(
    x_BNC: Tensor, size_BN1: Tensor, keep_BK: Tensor, src_BR: Tensor, dst_BR: Tensor, mode: str = "mean"
) -> bool:
    return x_BNC.numel() > 0 and keep_BK.numel() > 0 and x_BNC.shape[0] <= 65535


@operation("isoflop.kernels.merge_triton:merge_tokens", supports=_merge_supported)
def merge_tokens(
    x_BNC: Tensor, size_BN1: Tensor, keep_BK: Tensor, src_BR: Tensor, dst_BR: Tensor, mode: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Merge each source into its destination: ``out[k] = sum_i size_i x_i / sum_i size_i`` over k and its sources.

    A token that is neither kept nor a source is dropped.

    Args:
        x_BNC: tokens.
        size_BN1: how many original tokens each stands for.
        keep_BK: tokens that remain, in the order of the output, each once.
        src_BR: tokens merged away, none of them kept.
        dst_BR: where each goes: an index of a kept token; several sources may share one.
        mode: ``mean`` weighs by sizes, ``sum`` adds the tokens as they are.

    Returns:
        out_BKC in the type of ``x`` (sums are taken in float32), and size_BK1, the sums of sizes, in the type of ``size``.

    Raises:
        ValueError: another mode.
    """
    check_mode(mode)
    x = x_BNC.float() * size_BN1.float() if mode == "mean" else x_BNC.float()
    row_BR = rows_of(keep_BK, dst_BR, x_BNC.shape[1])
    size_BK1 = _gathered_sum(size_BN1.float(), keep_BK, src_BR, row_BR)
    out_BKC = _gathered_sum(x, keep_BK, src_BR, row_BR)
    if mode == "mean":
        out_BKC = out_BKC / size_BK1
    return out_BKC.to(x_BNC.dtype), size_BK1.to(size_BN1.dtype)


def check_mode(mode: str) -> None:
    """A ValueError unless ``mode`` is one of ``merge_tokens``."""
    if mode not in ("mean", "sum"):
        raise ValueError(f"mode={mode!r}: allowed are 'mean' and 'sum'")


def rows_of(keep_BK: Tensor, dst_BR: Tensor, tokens: int) -> Tensor:
    """Where in ``keep`` each destination stands."""
    place_BN = torch.zeros(keep_BK.shape[0], tokens, dtype=torch.int64, device=keep_BK.device)
    order_BK = torch.arange(keep_BK.shape[1], device=keep_BK.device).expand_as(keep_BK)
    return place_BN.scatter(1, keep_BK, order_BK).gather(1, dst_BR)


def _gathered_sum(x_BNC: Tensor, keep_BK: Tensor, src_BR: Tensor, row_BR: Tensor) -> Tensor:
    """Kept rows plus the rows of their sources."""
    width = x_BNC.shape[-1]

    def wide(index: Tensor) -> Tensor:
        return index[..., None].expand(-1, -1, width)

    return x_BNC.gather(1, wide(keep_BK)).scatter_add(1, wide(row_BR), x_BNC.gather(1, wide(src_BR)))
