"""MiKV: tiers against a plain simulation, the balancer's identities, demotion that never goes back, bytes by a formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, HEADS, WIDTH, a_call, left_padded, one_row, probabilities, token
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import append_recent, slice_call
from isoflop.methods.kv_cache.mikv import MiKV, balancer
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.segments import LayerStore, stored_bytes

EXACT = {"bits_hi": 16, "bits_lo": 16}


def run(method: MiKV, call: AttentionCall, prompt: int) -> tuple[list[Tensor], LayerStore]:
    """Outputs of the steps behind a prompt, and the store at the end."""
    _, store = method.prefill(slice_call(call, 0, prompt), None)
    outs = []
    for place in range(prompt, call.q_BHTD.shape[2]):
        append_recent(store, token(call, place))
        outs.append(method.step(token(call, place), store, None))
    return outs, store


def held(store: LayerStore) -> tuple[Tensor, Tensor]:
    """Positions of the important tokens and of the others, ascending, (B, G, N) each."""
    hi, lo = store.state["hi"].segment.positions_BGN, store.state["lo"].segment
    return hi.sort(-1).values, lo.positions_BGN.sort(-1).values if lo is not None else hi[:, :, :0]


def simulated(method: MiKV, call: AttentionCall, prompt: int, row: int, group: int) -> tuple[list[Tensor], list[int]]:
    """The same with lists for one row and key-value head: nothing is quantised, what ``bits_lo: 0`` demotes is gone."""
    heads = [group * HEADS // GROUPS + n for n in range(HEADS // GROUPS)]
    share = lambda n: min(n, int(method.importance * n + 1e-9))  # noqa: E731
    p_HTT = probabilities(slice_call(call, 0, prompt))[row, heads]
    score = dict(enumerate(p_HTT.sum((0, 1)).tolist()))

    def important(budget: int, seen: int) -> list[int]:
        newest = int(method.recent * budget + 0.5)
        recent = [n for n in score if n >= seen - newest]
        rest = sorted((n for n in score if n < seen - newest), key=lambda n: (-score[n], n))
        return sorted(rest[: budget - len(recent)] + recent)

    keep = important(share(prompt), prompt)
    gone: list[int] = [n for n in range(prompt) if n not in keep]
    score = {n: score[n] for n in keep}
    outs = []
    for place in range(prompt, call.q_BHTD.shape[2]):
        score[place] = 0.0
        visible = sorted([*score, *(gone if method.bits_lo else [])])
        k_ND, v_ND = (x[row, group, visible].double() for x in (call.k_BGTD, call.v_BGTD))
        q_HD = call.q_BHTD[row, heads, place].double()
        p_HN = (q_HD @ k_ND.T * call.softmax.scaling).softmax(-1)
        outs.append(p_HN @ v_ND)
        for column, n in enumerate(visible):
            if n in score:
                score[n] += float(p_HN[:, column].sum())
        keep = important(min(len(score), share(place + 1)), place + 1)
        gone += [n for n in score if n not in keep]
        score = {n: score[n] for n in keep}
    return outs, sorted(score)


@pytest.mark.parametrize("bits_lo", [0, 16])
@pytest.mark.parametrize("importance", [0.2, 0.5, 0.77])
def test_tiers_and_outputs_equal_a_plain_simulation(importance: float, bits_lo: int) -> None:
    """With 0 bits it is H2O, which forgets; with 16 every token is seen, whatever its tier."""
    call, prompt = a_call(40), 24
    method = MiKV(importance=importance, bits_lo=bits_lo, recent=0.0 if importance == 0.2 else 0.5)
    outs, store = run(method, call, prompt)
    hi, lo = held(store)
    for row in range(2):
        for group in range(GROUPS):
            expected, keep = simulated(method, call, prompt, row, group)
            assert hi[row, group].tolist() == keep
            assert lo[row, group].tolist() == ([n for n in range(40) if n not in keep] if bits_lo else [])
            for out, one in zip(outs, expected, strict=True):
                heads = slice(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
                torch.testing.assert_close(out[row, 0, heads].double(), one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"importance": 1.0, "bits_lo": 2}, {"importance": 0.3, **EXACT}])
def test_exact_tiers_give_dense_attention_at_every_step(change: dict[str, Any]) -> None:
    call = a_call(30)
    outs, _ = run(MiKV(**change), call, 20)
    torch.testing.assert_close(torch.cat(outs, 1), causal_attention(call)[:, 20:], atol=1e-5, rtol=1e-5)


def test_a_balanced_product_is_the_product_and_its_channels_are_even() -> None:
    call = a_call(20)
    scale_BGD = balancer(call).float()
    k_BGTD = call.k_BGTD / scale_BGD[:, :, None]
    q_BGMD = call.q_BHTD.reshape(2, GROUPS, -1, WIDTH) * scale_BGD[:, :, None]
    plain = call.q_BHTD.reshape(2, GROUPS, -1, WIDTH) @ call.k_BGTD.transpose(-1, -2)
    torch.testing.assert_close(q_BGMD @ k_BGTD.transpose(-1, -2), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(q_BGMD.abs().amax(2), k_BGTD.abs().amax(2), atol=0, rtol=2e-3)  # float16
    silent = replace(call, k_BGTD=call.k_BGTD * (torch.arange(WIDTH) != 3))
    assert bool((balancer(silent)[..., 3] == 1).all())


def test_a_balancer_saves_what_outlying_channels_cost() -> None:
    """Keys with a channel twenty times as large, queries with it as small: the products are the same, two bits are not."""
    call = a_call(60)
    factor = torch.ones(WIDTH)
    factor[2] = 20.0
    call = replace(call, q_BHTD=call.q_BHTD / factor, k_BGTD=call.k_BGTD * factor)
    dense = causal_attention(call)[:, 50:]
    errors = [
        float((torch.cat(run(MiKV(importance=0.1, balancer=on), call, 50)[0], 1) - dense).square().mean())
        for on in (True, False)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_every_token_is_in_one_tier_and_none_is_promoted() -> None:
    call, method = a_call(50), MiKV(importance=0.3, bits_hi=8)
    _, store = method.prefill(slice_call(call, 0, 20), None)
    before = [set(map(tuple, [(g, n) for g in range(GROUPS) for n in held(store)[1][0, g].tolist()]))]
    for place in range(20, 50):
        append_recent(store, token(call, place))
        method.step(token(call, place), store, None)
        hi, lo = held(store)
        assert torch.cat((hi, lo), -1).sort(-1).values.tolist() == [[list(range(place + 1))] * GROUPS] * 2
        now = {(g, n) for g in range(GROUPS) for n in lo[0, g].tolist()}
        assert before[-1] <= now
        before.append(now)
    assert len(before[-1]) > len(before[0])


def test_what_is_packed_is_within_half_a_step_and_is_never_packed_again() -> None:
    call, method = a_call(40), MiKV(importance=0.2, bits_lo=3, balancer=False)
    _, store = method.prefill(slice_call(call, 0, 30), None)
    first = store.state["lo"].segment.keys()
    _, store = run(method, call, 30)
    lo = store.state["lo"].segment
    torch.testing.assert_close(lo.keys()[:, :, : first.shape[2]], first, atol=0, rtol=0)
    true = call.k_BGTD.gather(2, lo.positions_BGN[..., None].expand(-1, -1, -1, WIDTH))
    step = lo.k.scale.float().repeat_interleave(WIDTH // 2, dim=-1)
    assert bool(((lo.keys() - true).abs() <= step / 2 + 1e-5).all())


def test_bytes_are_those_of_the_formula() -> None:
    """32 of 40 tokens at 2 bits with two grids a token in keys and values, 8 exact ones with their scores, and the balancer."""
    _, store = MiKV(importance=0.2).prefill(a_call(40), None)
    packed = 32 * 2 * (WIDTH * 2 / 8 + 2 * 4)
    exact = 8 * (2 * WIDTH * 2 + 4)
    assert stored_bytes(store.resident(), 16) == 2 * GROUPS * (packed + exact + 2 * WIDTH)


def test_rows_that_are_padded_are_as_if_alone() -> None:
    call = a_call(30, rows=1)
    alone, _ = run(MiKV(importance=0.4), call, 20)
    beside, _ = run(MiKV(importance=0.4), left_padded(call, 5), 25)
    torch.testing.assert_close(torch.cat(beside, 1), torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
    mixed = a_call(30, pads=(0, 7))
    both, _ = run(MiKV(importance=0.4), mixed, 20)
    one = one_row(mixed, 1, 7)
    other, _ = run(MiKV(importance=0.4), one, 13)
    torch.testing.assert_close(torch.cat(both, 1)[1:], torch.cat(other, 1), atol=1e-5, rtol=1e-5)


def test_impossible_tiers_are_refused() -> None:
    info = KvCacheProbe().model.info
    with pytest.raises(Infeasible, match="bits_lo = 8 exceeds bits_hi = 4"):
        build("mikv", {"bits_hi": 4, "bits_lo": 8}).check(info)
    with pytest.raises(Infeasible, match="importance = 0 with bits_lo = 0 keeps nothing"):
        build("mikv", {"importance": 0.0, "bits_lo": 0}).check(info)
