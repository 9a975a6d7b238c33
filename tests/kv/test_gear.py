"""GEAR: the parts of a block by themselves, read in factors, equal to the released code, bytes by a formula."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, WIDTH, a_call, left_padded, one_row, stepped
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.quant import packed_nbytes
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import slice_call
from isoflop.methods.kv_cache.gear import Gear, GearSegment, first_guess, outliers_of, power_iteration
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.models.hooks.attention import causal_attention
from isoflop.models.segments import DenseSegment, attend_segments, stored_bytes

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "gear.json").read_text())
"""What ``gearslkivi_channelQ_new`` and ``gearslkivi_tokenQ_new`` of opengear-project/GEAR (commit efe0bfe,
GEARLM/Simulated/compress_function.py) give on ``outlying()`` with groups of 16, rank 4 and 3 iterations from ``first_guess``: the
relative error, and every 31st entry."""


def matrix(rows: int = 2, tokens: int = 32, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(rows, GROUPS, tokens, width, generator=torch.Generator().manual_seed(seed))


def outlying() -> Tensor:
    """Keys or values with a channel eight times as large."""
    x_BGND = matrix(seed=3)
    x_BGND[..., 3] *= 8
    return x_BGND


def parts(x_BGND: Tensor, axis: int, **knobs: Any) -> Any:
    method = Gear(**{"group": 16, "sparsity": 0.0, "rank": 0, "bits": 2, **knobs})
    return method._parts(x_BGND, axis, method.group or None, method.rank, None)


@pytest.mark.parametrize("case", NUMBERS)
def test_blocks_are_those_of_the_released_code(case: str) -> None:
    """But for codes at a tie, which a grid in float16 rounds to the other side: few entries, no error to speak of."""
    kind, bits, share = case[0], int(case[1]), float(case[3:])
    x_BGND = outlying()
    found = parts(x_BGND, -2 if kind == "k" else -1, bits=bits, sparsity=share, rank=4).whole()
    error = float((found - x_BGND).norm() / x_BGND.norm())
    assert error == pytest.approx(NUMBERS[case]["error"], rel=0.01)
    sample = torch.tensor(NUMBERS[case]["sample"])
    off = (found.flatten()[::31][:64] - sample).abs()
    assert float((off < 0.03).float().mean()) > 0.8
    assert float(off.median()) < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_the_low_rank_is_near_the_best_one_and_none_is_below(seed: int) -> None:
    """Eckart and Young, on the errors of a real backbone."""
    x_BGND = matrix(tokens=80, width=32, seed=seed)
    error = x_BGND - parts(x_BGND, -2).whole()
    left, right = power_iteration(error, first_guess(32, 4), 3)
    residual = (error - left @ right.transpose(-1, -2)).square().sum((-1, -2))
    best = torch.linalg.svdvals(error)[..., 4:].square().sum(-1)
    assert bool((residual >= best * (1 - 1e-5)).all())
    assert bool((residual.sqrt() <= 1.05 * best.sqrt()).all())
    torch.testing.assert_close(
        left @ right.transpose(-1, -2), left @ left.transpose(-1, -2) @ error, atol=1e-4, rtol=1e-4
    )


def test_a_full_rank_gives_everything_back_and_every_part_helps() -> None:
    x_BGND = outlying()
    assert (parts(x_BGND, -2, rank=16).whole() - x_BGND).abs().max() < 5e-3, "factors are kept in float16"
    for axis in (-2, -1):
        errors = [
            float((parts(x_BGND, axis, **knobs).whole() - x_BGND).norm())
            for knobs in ({}, {"rank": 2}, {"rank": 4}, {"rank": 4, "sparsity": 0.125})
        ]
        assert all(b < a for a, b in pairwise(errors))


@pytest.mark.parametrize("axis", [-2, -1])
def test_outliers_are_the_extremes_of_their_vectors_and_come_back_exactly(axis: int) -> None:
    x_BGND = matrix().half().float()
    found = parts(x_BGND, axis, sparsity=0.125).backbone()
    vectors = x_BGND if axis == -2 else x_BGND.transpose(1, 2).flatten(2)
    back = found if axis == -2 else found.transpose(1, 2).flatten(2)
    order = vectors.sort(2).indices
    for places in (order[:, :, :2], order[:, :, -2:]):
        assert torch.equal(back.gather(2, places), vectors.gather(2, places))
    assert outliers_of(x_BGND, axis, 0.01, None) is None, "a share of nothing"


def test_attention_in_factors_is_attention_on_what_they_multiply_to() -> None:
    call = a_call(40)
    segment = Gear(bits=2, group=8, sparsity=0.2, rank=2).compress(call, None).segments[0]
    assert isinstance(segment, GearSegment)
    dense = DenseSegment(segment.positions_BGN, None, segment.keys(), segment.values())
    query = replace(call, q_BHTD=call.q_BHTD[:, :, -1:], order_BT=call.order_BT[:, -1:])
    outs = [attend_segments(query.q_BHTD, [s], call.softmax, query.order_BT)[0] for s in (segment, dense)]
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)


def test_new_tokens_wait_and_become_blocks_that_are_never_touched_again() -> None:
    call = a_call(60)
    method = Gear(bits=4, group=8, n_b=8)
    _, early = stepped(method, slice_call(call, 0, 40), 20)
    _, late = stepped(method, call, 20)
    assert [s.tokens for s in late.segments] == [20, 8, 8, 8, 8, 8]
    for one, other in zip(early.segments, late.segments, strict=False):
        assert torch.equal(one.keys(), other.keys())
        assert torch.equal(one.values(), other.values())
    assert late.recent.tokens == 0
    second = late.segments[1]
    assert isinstance(second, GearSegment)
    assert second.k.left_BGNR is not None
    assert second.k.left_BGNR.shape[-1] == method.rank_new


def test_sixteen_bits_are_dense_attention() -> None:
    call = a_call(30)
    torch.testing.assert_close(
        stepped(Gear(bits=16), call, 20)[0], causal_attention(call)[:, 20:], atol=1e-5, rtol=1e-5
    )


def test_rows_do_not_depend_on_one_another_nor_on_padding() -> None:
    knobs: dict[str, Any] = {"bits": 2, "group": 8, "sparsity": 0.2, "n_b": 6}
    call = a_call(30, rows=2)
    both, _ = stepped(Gear(**knobs), call, 20)
    one = one_row(call, 0)
    alone, _ = stepped(Gear(**knobs), one, 20)
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)
    padded, _ = stepped(Gear(**knobs), left_padded(one, 5), 25)
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)
    mixed = a_call(30, pads=(0, 7))
    mixed.k_BGTD[1, :, 19] *= 10  # an outlier where empty entries take their copy from
    ragged, _ = stepped(Gear(**knobs), mixed, 20)
    other = one_row(mixed, 1, 7)
    torch.testing.assert_close(ragged[1:], stepped(Gear(**knobs), other, 13)[0], atol=1e-4, rtol=1e-4)


def test_bytes_are_those_of_all_three_parts() -> None:
    """40 tokens of 2 heads of 8 channels: packed codes, factors of rank 2, 4 outliers of 2 + 2 bytes in each of 16 key channels and
    4 in each of 40 value tokens."""
    call = a_call(40, rows=1)
    store = Gear(bits=2, group=8, sparsity=0.1, rank=2).compress(call, None)
    codes = packed_nbytes((1, GROUPS, 40, WIDTH), 2, -2, 8) + packed_nbytes((1, GROUPS, 40, WIDTH), 2, -1, 8)
    factors = 2 * GROUPS * 2 * (40 + WIDTH) * 2
    outliers = 4 * (4 * GROUPS * WIDTH + 2 * 40)
    assert stored_bytes(store.resident(), 16) == codes + factors + outliers


def test_what_an_index_cannot_count_is_refused() -> None:
    info = KvCacheProbe().model.info
    wide = replace(info, geometry={**info.geometry, "kv_heads": 512, "head_width": 128})
    with pytest.raises(Infeasible, match="a layer has 65536 channels; allowed: sparsity = 0"):
        build("gear", {}).check(wide)
    with pytest.raises(Infeasible, match="a prompt of task text has 40000 tokens"):
        build("gear", {}).check_prompt(40000, "text")
    build("gear", {"sparsity": 0.0}).check(wide)
