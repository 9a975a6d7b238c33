"""Attention over pieces against plain attention over their union."""

from __future__ import annotations

import pytest
import torch
from softmaxes import a_softmax, logits_by_hand, softmax_by_hand
from torch import Tensor
from torch.nn import functional as F

from isoflop.kernels.decode_segments import SegmentPart, decode_segments
from isoflop.kernels.quant import quant_pack, unpack
from isoflop.kernels.softmax import Softmax


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["plain", "cap", "sinks", "both"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads, groups", [(4, 2), (2, 2), (3, 1)])
def test_pieces_equal_attention_over_the_whole(heads: int, groups: int, queries: int, kind: str) -> None:
    """However a dense cache is cut, and in whatever order its tokens come."""
    q, k, v = draw(2, heads, queries, 8), draw(2, groups, 13, 8, seed=1), draw(2, groups, 13, 8, seed=2)
    softmax = a_softmax(kind, 0.4, heads)
    if kind == "plain":
        expected = F.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
    else:
        expected = softmax_by_hand(q, k, softmax)[..., :13] @ v.repeat_interleave(heads // groups, 1)
    shuffled = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    for cuts in ([13], [5, 8], [0, 1, 11, 1]):
        parts = [
            SegmentPart(k[:, :, shuffled][:, :, i : i + n], v[:, :, shuffled][:, :, i : i + n])
            for i, n in zip([0, *torch.tensor(cuts).cumsum(0).tolist()], cuts, strict=False)
        ]
        out, lse = decode_segments(q, parts, softmax)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        whole = logits_by_hand(q, k, softmax).logsumexp(-1)
        torch.testing.assert_close(lse, whole)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packed_pieces_equal_their_unpacked_selves(bits: int) -> None:
    """Keys by channel in groups of tokens, values by token with a scale per channel: ZipCache's layout."""
    q, k, v = draw(2, 4, 1, 12), draw(2, 2, 19, 12, seed=1), draw(2, 2, 19, 12, seed=2)
    scale = v.abs().amax(2).sqrt()
    packed_k, packed_v = quant_pack(k, bits, axis=-2, group=8), quant_pack(v / scale[:, :, None], bits, axis=-1)
    near = SegmentPart(draw(2, 2, 4, 12, seed=4), draw(2, 2, 4, 12, seed=5))
    mixed = decode_segments(q, [SegmentPart(packed_k, packed_v, v_channel_scale_BGD=scale), near], Softmax(0.3))
    dense = [SegmentPart(unpack(packed_k), unpack(packed_v) * scale[:, :, None]), near]
    for mine, theirs in zip(mixed, decode_segments(q, dense, Softmax(0.3)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_bias_of_log_n_counts_an_entry_n_times() -> None:
    q, k, v = draw(1, 2, 1, 8), draw(1, 1, 5, 8, seed=1), draw(1, 1, 5, 8, seed=2)
    bias = torch.zeros(1, 1, 5)
    bias[..., 2] = torch.log(torch.tensor(3.0))
    bias[..., 4] = -torch.inf
    repeated = torch.tensor([0, 1, 2, 2, 2, 3])
    for mine, theirs in zip(
        decode_segments(q, [SegmentPart(k, v, bias)], Softmax(0.5)),
        decode_segments(q, [SegmentPart(k[:, :, repeated], v[:, :, repeated])], Softmax(0.5)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_channel_scale_on_keys_undoes_a_balancer() -> None:
    q, k, v = draw(1, 4, 1, 8), draw(1, 2, 6, 8, seed=1), draw(1, 2, 6, 8, seed=2)
    balancer = draw(1, 2, 8, seed=3).abs() + 0.1
    balanced = SegmentPart(k * balancer[:, :, None], v, k_channel_scale_BGD=1 / balancer)
    torch.testing.assert_close(
        decode_segments(q, [balanced], Softmax(0.5)), decode_segments(q, [SegmentPart(k, v)], Softmax(0.5))
    )


def test_partial_results_join_by_their_log_sum_exp() -> None:
    """What lse is for: two calls joined by it equal one."""
    q = draw(1, 2, 1, 8)
    a, b = (SegmentPart(draw(1, 2, 5, 8, seed=s), draw(1, 2, 5, 8, seed=s + 1)) for s in (1, 3))
    (out_a, lse_a), (out_b, lse_b) = decode_segments(q, [a], Softmax(0.5)), decode_segments(q, [b], Softmax(0.5))
    out, lse = decode_segments(q, [a, b], Softmax(0.5))
    share = (lse_a - torch.logaddexp(lse_a, lse_b)).exp()[..., None]
    torch.testing.assert_close(out, share * out_a + (1 - share) * out_b)
    torch.testing.assert_close(lse, torch.logaddexp(lse_a, lse_b))


def test_empty_entries_give_zeros() -> None:
    q, k = draw(1, 2, 1, 8), draw(1, 1, 3, 8)
    for part in (SegmentPart(k, k, torch.full((1, 1, 3), -torch.inf)), SegmentPart(k[:, :, :0], k[:, :, :0])):
        out, lse = decode_segments(q, [part], Softmax(1.0))
        assert not out.any()
        assert torch.equal(lse, torch.full((1, 2, 1), -torch.inf))
    with pytest.raises(ValueError, match="at least one segment"):
        decode_segments(q, [], Softmax(1.0))
