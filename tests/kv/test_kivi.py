"""KIVI: what is packed when, equal to the released code, rows of unequal lengths, bytes by a formula."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, HEADS, WIDTH, a_call, left_padded, one_row, stepped
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.quant import packed_nbytes, quant_pack, unpack
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import append_recent, slice_call
from isoflop.methods.kv_cache.kivi import Kivi, KiviSegment
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.segments import LayerStore, stored_bytes

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "kivi.json").read_text())
"""Of jy-yuan/KIVI (commit 876b4d2): ``quant_and_pack_kcache``, ``quant_and_pack_vcache`` and their inverses (quant/new_pack.py) in the order
of ``LlamaAttention_KIVI.forward``, on ``wide_call()`` behind 70 tokens, groups of 16 tokens and 16 channels, residual 32: every
13th output of the steps, every 29th packed key and value at the end."""
SMALL: dict[str, Any] = {"bits": 2, "group": 4, "residual": 8}


def wide_call() -> AttentionCall:
    """Of 16 channels, the fewest that the released code packs at 2 bits."""
    rng, shapes = torch.Generator().manual_seed(7), ((HEADS, 2.0), (GROUPS, 1.0), (GROUPS, 1.0))
    q, k, v = (torch.randn(2, heads, 110, 16, generator=rng) * scale for heads, scale in shapes)
    return AttentionCall(0, q, k, v, Softmax(16**-0.5), torch.arange(110)[None], None)


def held(store: LayerStore) -> KiviSegment:
    segment = store.segments[0]
    assert isinstance(segment, KiviSegment)
    return segment


@pytest.mark.parametrize("bits", [2, 4])
def test_steps_are_those_of_the_released_code(bits: int) -> None:
    """But for codes near a tie, since grids here are float16 and rounded outwards."""
    expected, call = NUMBERS[str(bits)], wide_call()
    method = Kivi(bits=bits, group=16, residual=32)
    out, store = stepped(method, call, 70)
    off = (out.flatten()[::13] - torch.tensor(expected["sample"])).abs()
    assert float(off.median()) < 2e-3
    assert float(off.quantile(0.95)) < 0.05
    segment = held(store)
    assert segment.k is not None
    assert segment.v is not None
    for found, name in ((unpack(segment.k), "keys"), (unpack(segment.v), "values")):
        sample = torch.tensor(expected[name])
        near = (found.flatten()[::29] - sample).abs() < 0.01
        assert found.flatten()[::29].shape == sample.shape
        assert float(near.float().mean()) > 0.97


def plain(call: AttentionCall, prompt: int, method: Kivi) -> Tensor:
    """Step by step with whole matrices, one row: which keys and values are packed follows from the number of tokens alone."""
    r, outs = method.residual, []
    for t in range(prompt, call.q_BHTD.shape[2]):
        k, v = call.k_BGTD[:, :, : t + 1].clone(), call.v_BGTD[:, :, : t + 1].clone()
        blocks, old = t - t % r, max(0, t - r)
        for start in range(0, blocks, method.group):
            part = slice(start, start + method.group)
            k[:, :, part] = unpack(quant_pack(k[:, :, part], method.bits, -2))
        if old:
            v[:, :, :old] = unpack(quant_pack(v[:, :, :old], method.value_bits or method.bits, -1, method.group))
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        p = (call.q_BHTD[:, :, t : t + 1] @ k.transpose(-1, -2) * call.softmax.scaling).softmax(-1)
        outs.append((p @ v).transpose(1, 2))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("prompt", [3, 8, 13, 16, 29])
def test_keys_become_blocks_and_values_leave_one_by_one(prompt: int) -> None:
    call, method = a_call(40), Kivi(**SMALL, value_bits=4)
    out, store = stepped(method, call, prompt)
    torch.testing.assert_close(out, plain(call, prompt, method), atol=1e-5, rtol=1e-5)
    assert held(store).k_exact_BGMD.shape[2] == 0
    assert held(store).v_exact_BGMD.shape[2] == 8
    _, early = stepped(method, slice_call(call, 0, 37), prompt)
    assert held(early).k_exact_BGMD.shape[2] == 5


@pytest.mark.parametrize("pads", [None, (0, 5), (11, 2), (8, 0)])
def test_many_queries_at_once_are_those_one_by_one(pads: tuple[int, ...] | None) -> None:
    """The one-pass form, whose pieces end where a row's keys become a block."""
    call, method, prompt = a_call(45, pads=pads), Kivi(**SMALL), 20
    expected, late = stepped(method, call, prompt)
    _, store = method.prefill(slice_call(call, 0, prompt), None)
    outs, start = [], prompt
    while start < 45:
        stride = method.stride(store)
        assert stride is not None
        piece = slice_call(call, start, min(45, start + stride))
        piece = replace(piece, valid_BT=None)
        append_recent(store, piece)
        outs.append(method.step(piece, store, None))
        start += piece.q_BHTD.shape[2]
    torch.testing.assert_close(torch.cat(outs, 1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(held(store).keys(), held(late).keys())
    torch.testing.assert_close(held(store).values(), held(late).values())


@pytest.mark.parametrize("pads", [(0, 5), (11, 2), (0, 14), (3, 18)])
def test_rows_of_unequal_lengths_are_as_they_are_alone(pads: tuple[int, ...]) -> None:
    """Their blocks end at different times."""
    call, method, prompt = a_call(48, pads=pads), Kivi(**SMALL), 20
    both, _ = stepped(method, call, prompt)
    for row, pad in enumerate(pads):
        alone, _ = stepped(method, one_row(call, row, pad), prompt - pad)
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_padding_is_never_read() -> None:
    call = one_row(a_call(40), 0)
    alone, _ = stepped(Kivi(**SMALL), call, 21)
    padded, _ = stepped(Kivi(**SMALL), left_padded(call, 6), 27)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_what_is_packed_is_never_packed_again() -> None:
    call, method = a_call(60), Kivi(**SMALL)
    early, late = (held(stepped(method, slice_call(call, 0, n), 20)[1]) for n in (40, 60))
    for one, other in ((early.k, late.k), (early.v, late.v)):
        assert one is not None
        assert other is not None
        assert torch.equal(unpack(one), unpack(other)[:, :, : one.shape[2]])


def test_sixteen_bits_and_prompts_shorter_than_the_residual_are_exact() -> None:
    call = a_call(30)
    for method in (Kivi(bits=16), Kivi(residual=32)):
        torch.testing.assert_close(stepped(method, call, 20)[0], causal_attention(call)[:, 20:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    call = a_call(30)
    half = replace(call, **{n: getattr(call, n).to(dtype) for n in ("q_BHTD", "k_BGTD", "v_BGTD")})
    same = replace(half, **{n: getattr(half, n).float() for n in ("q_BHTD", "k_BGTD", "v_BGTD")})
    found, expected = (stepped(Kivi(**SMALL), c, 20)[0] for c in (half, same))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


def test_bytes_are_those_of_codes_grids_and_residual() -> None:
    """70 tokens of 2 heads of 8 channels, residual 32: 64 keys of 2 bits in groups of 16 tokens, 38 values in groups of 8 channels; 6
    keys and 32 values of 2 bytes each."""
    store = Kivi(bits=2, group=16, residual=32).compress(a_call(70, rows=1), None)
    packed = packed_nbytes((1, GROUPS, 64, WIDTH), 2, -2, 16) + packed_nbytes((1, GROUPS, 38, WIDTH), 2, -1, 16)
    by_hand = (64 * 2 * 2 + 4 * 2 * 8 * 4) + (38 * 2 * 2 + 38 * 2 * 4)
    assert packed == by_hand == 968
    assert stored_bytes(store.resident(), 16) == by_hand + (6 + 32) * 2 * 8 * 2


def test_blocks_of_broken_groups_are_refused() -> None:
    info = KvCacheProbe().model.info
    with pytest.raises(Infeasible, match=r"residual = 40 tokens are not whole groups of 32 .* such as 32"):
        build("kivi", {"residual": 40}).check(info)
    build("kivi", {"residual": 128}).check(info)
