"""ZipCache: saliency against the whole attention matrix, quantisation bounds, bytes by a formula, blocks while decoding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kv_cases import GROUPS, WIDTH, a_call, column_sums, left_padded, token
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.quant import pack_bits, packed_nbytes, unpack_bits
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import append_recent, slice_call
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.methods.kv_cache.rtn import KvRtn
from isoflop.methods.kv_cache.zipcache import ZipCache, probes
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import PackedSegment, stored_bytes

ALL = {"probe_recent": 1.0, "probe_random": 0.0}


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe()


@pytest.mark.parametrize("length", [1, 7, 20])
def test_all_rows_as_probes_give_the_brute_force_column_mean_and_both_normalisers_coincide(length: int) -> None:
    call = a_call(length)
    seen_by = torch.arange(length, 0, -1).double()
    expected = column_sums(call, torch.ones(length)) / seen_by
    for shares in ({"probe_recent": 1.0, "probe_random": 0.0}, {"probe_recent": 0.5, "probe_random": 0.5}):
        found = [ZipCache(normalizer=name, **shares).saliency(call) for name in ("probe_nnz", "rows_total")]
        for scores in found:
            torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)
    accumulated = ZipCache(normalizer="none", **ALL).saliency(call)
    torch.testing.assert_close(accumulated.double(), expected * seen_by, atol=1e-5, rtol=1e-5)


def test_zero_queries_give_harmonic_sums() -> None:
    length = 12
    call = a_call(length)
    call = replace(call, q_BHTD=torch.zeros_like(call.q_BHTD))
    harmonic = torch.cat((torch.zeros(1), (1 / torch.arange(1.0, length + 1)).cumsum(0)))
    difference = 2 * (harmonic[length] - harmonic[:length])  # two query heads of a group
    torch.testing.assert_close(
        ZipCache(normalizer="none", **ALL).saliency(call), difference.expand(2, 2, -1), atol=1e-5, rtol=1e-5
    )
    mean = difference / torch.arange(length, 0, -1)
    torch.testing.assert_close(ZipCache(**ALL).saliency(call), mean.expand(2, 2, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalizer", ["probe_nnz", "rows_total", "none"])
def test_saliency_from_probes_equals_brute_force(normalizer: str) -> None:
    call = a_call(40)
    method = ZipCache(probe_recent=0.1, probe_random=0.2, normalizer=normalizer)
    queries = probes(call, 0.1, 0.2)
    assert queries.index_BP is not None
    scores = method.saliency(call)
    for row in range(2):
        places = queries.index_BP[row][queries.weight_BP[row] > 0].tolist()
        assert len(set(places)) == 12
        assert {36, 37, 38, 39} <= set(places)
        weight = torch.zeros(40)
        weight[places] = 1
        sees = torch.tensor([sum(p >= j for p in places) for j in range(40)]).clamp(min=1)
        divisor = {"probe_nnz": sees, "rows_total": torch.arange(40, 0, -1), "none": torch.ones(40)}[normalizer]
        torch.testing.assert_close(scores[row].double(), column_sums(call, weight)[row] / divisor, atol=1e-5, rtol=1e-5)


def test_probe_counts_and_draws() -> None:
    call = a_call(74, rows=3)
    queries = probes(call, 0.05, 0.05)
    assert int(queries.weight_BP[0].sum()) == 4 + 3  # 74 - int(74 - 3.7) newest and int(3.7) drawn
    assert queries.index_BP is not None
    assert len({tuple(sorted(row)) for row in queries.index_BP.tolist()}) == 3  # each sample draws for itself
    assert probes(a_call(1), 0.05, 0.05).weight_BP.sum(-1).tolist() == [1, 1]
    assert probes(a_call(5), 0.0, 0.01).weight_BP.sum(-1).tolist() == [1, 1]  # at least one


def test_more_probes_rank_tokens_more_like_all_rows() -> None:
    call = a_call(512, rows=4, seed=3)
    full = ZipCache(**ALL).saliency(call)
    agreement = []
    for share in (0.05, 0.2, 0.5, 1.0):
        scores = ZipCache(probe_recent=share / 2, probe_random=share / 2).saliency(call)
        agreement.append(float(_spearman(scores, full)))
    assert agreement == sorted(agreement)
    assert agreement[-1] == pytest.approx(1.0, abs=1e-9)
    assert agreement[0] < 0.9


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    ranks = [x.flatten(0, 1).argsort(-1).argsort(-1).double() for x in (a, b)]
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]).mean()


@pytest.mark.parametrize("v_scheme", ["cst", "token", "group32"])
@pytest.mark.parametrize(("hi", "lo"), [(4, 2), (8, 3)])
def test_values_and_keys_come_back_within_half_a_step(v_scheme: str, hi: int, lo: int) -> None:
    call = a_call(23)
    call.v_BGTD[..., 1] *= 30  # an outlier channel
    store = ZipCache(salient_ratio=0.4, bits_hi=hi, bits_lo=lo, v_scheme=v_scheme).compress(call, None)
    assert [s.k.bits for s in store.segments] == [hi, lo]
    for segment in store.segments:
        assert isinstance(segment, PackedSegment)
        place = segment.positions_BGN[..., None].expand(-1, -1, -1, WIDTH)
        k_true, v_true = call.k_BGTD.gather(2, place), call.v_BGTD.gather(2, place)
        scale = segment.v_channel_scale_BGD
        if v_scheme == "cst":
            expected = call.v_BGTD.abs().amax(2).sqrt()
            torch.testing.assert_close(scale.float(), expected, atol=1e-3, rtol=1e-3)
        channel = 1.0 if scale is None else scale.float()[:, :, None]
        slack = 1e-6 * v_true.abs().max()
        assert ((segment.keys() - k_true).abs() <= segment.k.scale.float() / 2 + 1e-6).all()
        assert ((segment.values() - v_true).abs() <= channel * segment.v.scale.float() / 2 + slack).all()
        assert segment.k.scale.shape == (2, GROUPS, 1, WIDTH)
        assert segment.v.scale.shape == (2, GROUPS, segment.tokens, 1)


def test_channel_scales_save_values_with_outlier_channels() -> None:
    call = a_call(64)
    call.v_BGTD[..., 1] *= 30
    error = {}
    for scheme in ("cst", "token"):
        store = ZipCache(salient_ratio=0.5, v_scheme=scheme).compress(call, None)
        parts = [
            (s.values() - call.v_BGTD.gather(2, s.positions_BGN[..., None].expand(-1, -1, -1, WIDTH)))
            for s in store.segments
        ]
        error[scheme] = float(sum(((p[..., [0, *range(2, WIDTH)]]) ** 2).sum() for p in parts))
    assert error["cst"] < 0.5 * error["token"]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("width", [1, 5, 7, 8, 33])
def test_packing_round_trips_on_odd_lengths(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, width), generator=torch.Generator().manual_seed(width))
    packed = pack_bits(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, width).long(), codes)
    assert packed.nbytes + 4 * 6 == packed_nbytes((2, 3, width), bits)


def test_constant_channels_and_tokens_stay_finite() -> None:
    call = a_call(9)
    call.k_BGTD[...] = 1.5
    call.v_BGTD[...] = 0.0
    store = ZipCache().compress(call, None)
    for segment in store.segments:
        assert torch.equal(segment.keys(), torch.full_like(segment.keys(), 1.5))
        assert torch.equal(segment.values(), torch.zeros_like(segment.values()))


@pytest.mark.parametrize("pads", [None, (0, 5)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.6, 1.0])
def test_every_token_is_in_exactly_one_class(ratio: float, pads: tuple[int, ...] | None) -> None:
    call = a_call(17, pads=pads)
    found = ZipCache(salient_ratio=ratio).tiers(call)
    total = sum(chosen.mask(17).long() for _, chosen in found)
    real = (
        torch.ones(2, GROUPS, 17, dtype=torch.long)
        if call.valid_BT is None
        else call.valid_BT[:, None].long().expand(-1, GROUPS, -1)
    )
    assert torch.equal(total, real)
    salient = found[0][1].mask(17).sum(-1)[:, 0].tolist()
    assert salient == [math.floor(ratio * n + 0.5) for n in (17, 17 if pads is None else 12)]


@pytest.mark.parametrize("length", [1, 40, 41])
@pytest.mark.parametrize(("ratio", "hi", "lo"), [(0.6, 4, 2), (0.3, 8, 3), (1.0, 4, 2), (0.0, 4, 2)])
def test_bytes_equal_the_formula(length: int, ratio: float, hi: int, lo: int) -> None:
    """Codes, grids per channel and tier (4 bytes) for keys, per token and head for values, one channel scale (2 bytes)."""
    call = a_call(length, rows=1)
    store = ZipCache(salient_ratio=ratio, bits_hi=hi, bits_lo=lo).compress(call, None)
    salient = math.floor(ratio * length + 0.5)
    tiers = [(n, bits) for n, bits in ((salient, hi), (length - salient, lo)) if n]
    codes = sum(2 * GROUPS * n * WIDTH * bits / 8 for n, bits in tiers)
    grids = 4 * GROUPS * WIDTH * len(tiers) + 4 * GROUPS * length
    assert stored_bytes(store.resident(), 16) == codes + grids + 2 * GROUPS * WIDTH


def test_sixteen_bits_reproduce_dense_logits(probe: KvCacheProbe) -> None:
    batch = probe.batch(range(3))
    with torch.no_grad():
        dense = probe.model.logits(batch)
        for knobs in (
            {"bits_hi": 16, "bits_lo": 16, "salient_ratio": 0.3, "streaming_gap": 3},
            {"bits_hi": 16, "salient_ratio": 1.0},
        ):
            with build("zipcache", knobs).apply(probe.model, None):
                assert (probe.model.logits(batch) - dense).abs().max() <= 1e-5 * dense.abs().max()


def test_a_full_buffer_becomes_a_block_and_older_blocks_are_left_alone() -> None:
    whole = a_call(31)
    method = ZipCache(streaming_gap=4, salient_ratio=0.5)
    store = method.compress(slice_call(whole, 0, 20), None)
    before = [t.clone() for t in store.resident()]
    prompt_segments = list(store.segments)
    for place in range(20, 31):
        assert method.stride(store) == 4 - store.recent.tokens
        query = token(whole, place)
        append_recent(store, query)
        method.step(query, store, None)
    assert [s.tokens for s in store.segments[2:]] == [2, 2, 2, 2]
    assert store.recent.positions_BGN[0, 0].tolist() == [28, 29, 30]
    assert store.segments[:2] == prompt_segments
    assert all(torch.equal(a, b) for a, b in zip(before, store.resident(), strict=False))
    for block, start in ((store.segments[2:4], 20), (store.segments[4:6], 24)):
        places = torch.cat([s.positions_BGN for s in block], dim=-1).sort(-1).values
        assert torch.equal(places, torch.arange(start, start + 4).expand(2, GROUPS, 4))


def test_new_tokens_are_weighed_by_a_softmax_over_the_whole_cache() -> None:
    """By hand: the first head looks at the prompt and leaves the block e^-25; the second gives a .525 and b .475."""
    q_BHTD = torch.tensor([[[3.0, -2.0]], [[-1.0, 0.9]]])[None].expand(-1, -1, 3, -1)
    k_BGTD = torch.tensor([[8.0, 0.0], [0.0, 1.0], [1.0, 2.0]])[None, None]
    whole = AttentionCall(0, q_BHTD, k_BGTD, k_BGTD, Softmax(1.0), torch.arange(3)[None], None)
    method = ZipCache(streaming_gap=2, salient_ratio=0.5, bits_hi=16, bits_lo=16)
    store = method.compress(slice_call(whole, 0, 1), None)
    tokens = slice_call(whole, 1, 3)
    append_recent(store, tokens)
    found = method.new_saliency(slice_call(whole, 2, 3), store)
    torch.testing.assert_close(found, torch.tensor([[[0.525, 0.475]]]), atol=5e-4, rtol=0)
    method.step(tokens, store, None)
    assert [s.positions_BGN.flatten().tolist() for s in store.segments[1:]] == [[1], [2]]


@pytest.mark.parametrize("pads", [None, (0, 6)])
def test_new_salient_tokens_are_those_the_newest_query_attends_to(pads: tuple[int, ...] | None) -> None:
    rows = 32
    whole = a_call(24, rows, pads=None if pads is None else pads * (rows // 2))
    method = ZipCache(streaming_gap=4, salient_ratio=0.25, bits_hi=16, bits_lo=16)
    store = method.compress(slice_call(whole, 0, 20), None)
    for place in range(20, 24):
        query = token(whole, place)
        append_recent(store, query)
        method.step(query, store, None)
    received = column_sums(whole, torch.eye(24)[23])[..., 20:]
    first = whole.order_BT[:, 20].expand(rows)[:, None]
    assert torch.equal(store.segments[2].positions_BGN[..., 0] - first, received.argmax(-1))


@pytest.mark.parametrize("gap", [1, 3, 100])
def test_many_queries_at_once_leave_the_blocks_that_single_ones_leave(gap: int) -> None:
    whole = a_call(34)
    method = ZipCache(streaming_gap=gap, salient_ratio=0.5)
    stores, outs = [], []
    for size in (1, 5):
        store, found = method.compress(slice_call(whole, 0, 20), None), []
        place = 20
        while place < 34:
            stop = min(place + min(size, method.stride(store)), 34)
            query = slice_call(whole, place, stop)
            append_recent(store, query)
            found.append(method.step(query, store, None))
            place = stop
        stores.append(store)
        outs.append(torch.cat(found, dim=1))
    for a, b in zip(stores[0].resident(), stores[1].resident(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


def test_padding_changes_no_class_and_no_code() -> None:
    call = a_call(30)
    plain, padded = (ZipCache().compress(c, None) for c in (call, left_padded(call, 6)))
    for a, b in zip(plain.segments, padded.segments, strict=True):
        assert torch.equal(a.positions_BGN, b.positions_BGN)
        assert torch.equal(a.k.codes, b.k.codes)
        assert torch.equal(a.v.codes, b.v.codes)


def test_results_do_not_depend_on_neighbours_in_the_batch() -> None:
    """The released code takes channel scales over the batch."""
    call = a_call(30)
    louder = replace(call, v_BGTD=call.v_BGTD * torch.tensor([1.0, 100.0])[:, None, None, None])
    a, b = (ZipCache().compress(c, None).segments[0].values()[0] for c in (call, louder))
    assert torch.equal(a, b)


def test_uniform_bits_group_keys_along_tokens() -> None:
    call = a_call(70)
    (segment,) = KvRtn(bits=2, group=32).compress(call, None).segments
    assert segment.k.scale.shape == (2, GROUPS, 3, WIDTH)
    assert segment.v.scale.shape == (2, GROUPS, 70, 1)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"bits_lo": 8}, "bits_lo = 8 exceeds bits_hi = 4"),
        ({"probe_recent": 0.0, "probe_random": 0.0}, "no probe query"),
    ],
)
def test_impossible_knobs_are_refused(knobs: dict[str, float], words: str, probe: KvCacheProbe) -> None:
    with pytest.raises(Infeasible, match=words):
        build("zipcache", knobs).check(probe.model.info)
