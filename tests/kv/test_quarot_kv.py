"""QuaRot's cache: rotations that cancel, codes of the released kernels, errors of its simulation, bytes by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, WIDTH, a_call, left_padded, one_row, stepped
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.quant import quant_pack, unpack
from isoflop.methods.base import build
from isoflop.methods.hadamard import hadamard, has_hadamard
from isoflop.methods.kv_cache.base import slice_call
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.methods.kv_cache.quarot_kv import QuarotKv, RotatedCodec, clipped
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.segments import DenseSegment, PackedSegment, stored_bytes

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "quarot-kv.json").read_text())
"""Of spcl/QuaRot (commit 5008669) on ``outlying()``: every 17th entry of rotated keys and values through ``asym_quantize_and_pack_i4`` and its
inverse (quarot/transformers/kv_cache.py); and by bits the relative errors of its simulation at a clipping ratio of 0.95
(``ActQuantizer`` of fake_quant/quant_utils.py, as ``QKRotationWrapper`` and the values' quantiser call it), whose zero points are whole
steps."""


def outlying() -> tuple[Tensor, Tensor]:
    """Keys with a channel eight times as large, and values."""
    rng = torch.Generator().manual_seed(11)
    k, v = (torch.randn(2, 2, 40, 16, generator=rng) for _ in range(2))
    k[..., 3] *= 8
    return k, v


def encoded(bits: int, clip: float) -> PackedSegment:
    k, v = outlying()
    tokens = DenseSegment(torch.arange(40).expand(2, 2, -1), None, k, v)
    segment = RotatedCodec(bits, 16, None, bits, clip).encode(tokens)
    assert isinstance(segment, PackedSegment)
    return segment


def test_codes_are_those_of_the_released_kernels() -> None:
    segment = encoded(4, 1.0)
    for packed, name in ((segment.k, "k"), (segment.v, "v")):
        off = (unpack(packed).flatten()[::17] - torch.tensor(NUMBERS["kernel"][name])).abs()
        assert float(off.quantile(0.98)) < 0.01, "but for codes at a tie, on a grid in float16"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_errors_are_no_larger_than_those_of_the_released_simulation(bits: int) -> None:
    """Zero points that are numbers lose less than whole steps; at many bits, where clipping decides, nothing."""
    segment, turn = encoded(bits, 0.95), hadamard(16)
    for packed, x, name in ((segment.k, outlying()[0], "k"), (segment.v, outlying()[1], "v")):
        error = float((unpack(packed) - x @ turn).norm() / x.norm())
        assert 0.75 * NUMBERS[str(bits)][name] < error < 1.02 * NUMBERS[str(bits)][name]


def plain(call: AttentionCall, prompt: int, method: QuarotKv) -> Tensor:
    """Whole matrices, one token after the other: each is rotated, clipped, rounded, and rotated back."""
    turn = hadamard(WIDTH)
    k, v = (
        unpack(quant_pack(clipped(x @ turn, method.group or WIDTH, method.clip), bits, -1, method.group or WIDTH))
        @ turn.T
        for x, bits in ((call.k_BGTD, method.bits), (call.v_BGTD, method.value_bits or method.bits))
    )
    return causal_attention(replace(call, k_BGTD=k, v_BGTD=v))[:, prompt:]


@pytest.mark.parametrize("knobs", [{}, {"bits": 2, "clip": 1.0}, {"bits": 3, "value_bits": 8, "group": 4}])
def test_attention_is_that_over_tokens_rotated_there_and_back(knobs: dict[str, Any]) -> None:
    call, method = a_call(40), QuarotKv(**knobs)
    out, store = stepped(method, call, 25)
    torch.testing.assert_close(out, plain(call, 25, method), atol=1e-5, rtol=1e-5)
    assert store.recent.tokens == 0
    assert store.segments[0].tokens == 40


def test_many_queries_at_once_are_those_one_by_one() -> None:
    call, method = a_call(40), QuarotKv()
    expected, _ = stepped(method, call, 25)
    _, store = method.prefill(slice_call(call, 0, 25), None)
    tail = slice_call(call, 25, 40)
    store.recent.append(tail.k_BGTD, tail.v_BGTD, tail.order_BT[:, None].expand(2, GROUPS, -1))
    torch.testing.assert_close(method.step(tail, store, None), expected, atol=1e-5, rtol=1e-5)


def test_a_large_channel_costs_less_than_without_the_rotation() -> None:
    k, _ = outlying()
    bare = unpack(quant_pack(k, 4, -1, 16))
    turned = unpack(encoded(4, 1.0).k) @ hadamard(16).T
    assert float((turned - k).norm()) < 0.8 * float((bare - k).norm())


@pytest.mark.parametrize(
    "size", [1, 2, 4, 12, 16, 20, 28, 36, 40, 44, 48, 56, 60, 64, 72, 80, 96, 112, 128, 160, 192, 256]
)
def test_hadamard_matrices_are_orthogonal_and_even(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))


def test_powers_of_two_are_sylvester_s_and_other_sizes_are_known_or_not() -> None:
    assert torch.equal(
        hadamard(4) * 2, torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).float()
    )
    known = [n for n in range(1, 130) if has_hadamard(n)]
    assert not [n for n in known if n > 2 and n % 4], "no Hadamard matrix has another size"
    assert {64, 80, 96, 112, 120, 128} <= set(known)
    assert not has_hadamard(92)  # exists, by another construction
    with pytest.raises(ValueError, match="no Hadamard matrix of size 6"):
        hadamard(6)


@pytest.mark.parametrize("pads", [(0, 5), (11, 2)])
def test_rows_of_unequal_lengths_are_as_they_are_alone(pads: tuple[int, ...]) -> None:
    call, method = a_call(40, pads=pads), QuarotKv()
    both, _ = stepped(method, call, 20)
    for row, pad in enumerate(pads):
        alone, _ = stepped(method, one_row(call, row, pad), 20 - pad)
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    single = one_row(call, 0, pads[0])
    padded, _ = stepped(method, left_padded(single, 6), 26 - pads[0])
    torch.testing.assert_close(padded, stepped(method, single, 20 - pads[0])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    call = a_call(30)
    half = replace(call, **{n: getattr(call, n).to(dtype) for n in ("q_BHTD", "k_BGTD", "v_BGTD")})
    same = replace(half, **{n: getattr(half, n).float() for n in ("q_BHTD", "k_BGTD", "v_BGTD")})
    found, expected = (stepped(QuarotKv(bits=8), c, 20)[0] for c in (half, same))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.04, rtol=0.04)


def test_sixteen_bits_are_dense_attention() -> None:
    call = a_call(30)
    torch.testing.assert_close(
        stepped(QuarotKv(bits=16), call, 20)[0], causal_attention(call)[:, 20:], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("width", [8, 12, 20])
def test_what_is_rotated_comes_back_in_heads_of_any_width(width: int) -> None:
    """Matrices of Paley's sizes are not symmetric: the way back is not the way there."""
    rng = torch.Generator().manual_seed(width)
    call = a_call(30)
    q, k, v = (torch.randn(*x.shape[:-1], width, generator=rng) for x in (call.q_BHTD, call.k_BGTD, call.v_BGTD))
    call = replace(call, q_BHTD=q, k_BGTD=k, v_BGTD=v)
    found, _ = stepped(QuarotKv(bits=8, clip=1.0), call, 20)
    torch.testing.assert_close(found, causal_attention(call)[:, 20:], atol=0.05, rtol=0)


def test_clipping_cuts_the_ends_and_leaves_groups_of_one_sign_their_entries() -> None:
    x = torch.tensor([[-1.0, 0.5, 2.0, 0.0, 1.0, 1.5, 2.0, 1.9], [-4.0, -1.0, -2.0, -3.9, 0.0, 0.0, 0.0, 0.0]])[
        None, None
    ]
    found = clipped(x, 4, 0.9)[0, 0]
    torch.testing.assert_close(found[0], torch.tensor([-0.9, 0.5, 1.8, 0.0, 1.0, 1.5, 1.8, 1.8]))
    torch.testing.assert_close(found[1], torch.tensor([-3.6, -1.0, -2.0, -3.6, 0.0, 0.0, 0.0, 0.0]))
    narrow = torch.tensor([-10.0, -9.9, -9.8, -9.8])
    for sign in (1, -1):  # no end passes the entry on the other side
        torch.testing.assert_close(
            clipped(sign * narrow[None, None, None], 4, 0.9)[0, 0, 0], sign * narrow.new_full((4,), -9.8)
        )


def test_bytes_are_those_of_codes_and_grids() -> None:
    """40 tokens of 2 heads of 8 channels: 4 bits each for keys, 2 for values, and a grid of 4 bytes per token, head and tensor."""
    store = QuarotKv(bits=4, value_bits=2).compress(a_call(40, rows=1), None)
    assert stored_bytes(store.resident(), 16) == 40 * 2 * (8 * 4 / 8 + 8 * 2 / 8 + 2 * 4) == 1120


def test_heads_without_a_matrix_and_broken_groups_are_refused() -> None:
    info = KvCacheProbe().model.info
    with pytest.raises(
        Infeasible, match=r"no Hadamard matrix of 92 channels, the width of a head .*; allowed: powers of two"
    ):
        build("quarot-kv", {}).check(replace(info, geometry={**info.geometry, "head_width": 92}))
    with pytest.raises(Infeasible, match=r"groups of 5 channels \(group\) do not divide a head of 16"):
        build("quarot-kv", {"group": 5}).check(info)
    build("quarot-kv", {"bits": 16}).check(replace(info, geometry={**info.geometry, "head_width": 92}))
