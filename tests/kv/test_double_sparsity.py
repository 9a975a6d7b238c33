"""Double Sparsity: the choice against exact top-k, labels, calibration, what is read against a formula."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kv_cases import GROUPS, HEADS, WIDTH, a_call, left_padded, probabilities, token
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.kernels.quant import quant_pack
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import append_recent, slice_call
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, KvCacheProbe
from isoflop.methods.sparse_attention.base import best, gathered_attention, masked_attention
from isoflop.methods.sparse_attention.double_sparsity import DoubleSparsity, dense
from isoflop.methods.sparse_attention.labels import Contributions, Meter, contributions, ranked
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.models.hooks.attention import ATTENTION, AttentionCall
from isoflop.models.lm import LmBatch
from isoflop.models.segments import DenseSegment, LayerStore, stored_bytes

ORACLE = {"group_factor": 1, "label_bits": 16, "channel": "random", "dense_layers": 0}


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(cost="read", layers=4)


def decoded(
    method: DoubleSparsity, call: AttentionCall, prompt: int, prepared: Contributions | None = None
) -> tuple[Tensor, LayerStore]:
    """Tokens behind the prompt one by one: outputs and the store."""
    store = method.compress(slice_call(call, 0, prompt), prepared)
    outs = []
    for place in range(prompt, call.q_BHTD.shape[2]):
        query = token(call, place)
        append_recent(store, query)
        outs.append(method.step(query, store, prepared))
    return torch.cat(outs, dim=1), store


def some_contributions(seed: int = 0) -> Contributions:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(1, heads, WIDTH, generator=rng) for name, heads in (("qk", HEADS), ("q", HEADS), ("k", GROUPS))
    }


@pytest.mark.parametrize("share", [0.05, 0.25, 0.7])
def test_all_channels_at_sixteen_bits_choose_exactly_the_top_k(share: float) -> None:
    call = a_call(30)
    method = DoubleSparsity(**ORACLE, k_share=share)
    store = method.compress(call, None)
    chosen = method._choose(call, store, None)
    p = probabilities(call)
    for place in range(30):
        count = max(1, int(share * (place + 1) + 0.5))
        expected = p[:, :, place].topk(count).indices.sort(-1).values
        for row in range(2):
            for head in range(HEADS):
                assert chosen[row, head, place].nonzero().flatten().tolist() == expected[row, head].tolist()


@pytest.mark.parametrize("knobs", [{}, {"select_per": "kv-head"}, {"label_per": "query-head", "label_bits": 4}])
def test_reading_everything_gives_dense_logits(knobs: dict[str, object], probe: KvCacheProbe) -> None:
    method = build("double-sparsity", {"k_share": 1.0, "dense_layers": 0, **knobs})
    batch = probe.batch(range(3))
    with torch.no_grad():
        expected = probe.model.logits(batch)
        with method.apply(probe.model, probe.prepared(method, 0)):
            for logits in (probe.model.logits(batch), probe.model.stepwise_logits(batch)):
                assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


class Blocks:
    """A model's calibration cut into given blocks."""

    def __init__(self, probe: KvCacheProbe, blocks: list[Tensor]) -> None:
        self.probe, self.blocks = probe, blocks

    def __enter__(self) -> None:
        def given(ctx: object, examples: int, seed: int) -> Iterator[LmBatch]:
            return iter([LmBatch(ids, torch.zeros_like(ids)) for ids in self.blocks])

        self.probe.model.calibration = given  # type: ignore[method-assign, assignment]

    def __exit__(self, *args: object) -> None:
        del self.probe.model.calibration  # type: ignore[method-assign]


def test_calibration_over_blocks_is_the_mean_of_their_statistics(probe: KvCacheProbe, tmp_path: object) -> None:
    """The released code keeps the last block only."""
    ctx = FolderContext(str(tmp_path))
    blocks = list(torch.randint(0, 48, (3, 2, 20), generator=torch.Generator().manual_seed(1)))
    alone = []
    for block in blocks:
        with Blocks(probe, [block]):
            alone.append(contributions(probe.model, ctx, 2, 0))
    with Blocks(probe, blocks):
        together = contributions(probe.model, ctx, 6, 0)
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in alone]).mean(0), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(together["qk"], alone[-1]["qk"], rtol=1e-3)


def test_contributions_are_those_of_each_token_with_itself(probe: KvCacheProbe, tmp_path: object) -> None:
    seen: list[AttentionCall] = []
    ids = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(2))
    with Blocks(probe, [ids]):
        found = contributions(probe.model, FolderContext(str(tmp_path)), 2, 0)
    from isoflop.models.hooks.attention import causal_attention, replaced_attention

    def note(call: AttentionCall) -> Tensor:
        seen.append(call)
        return causal_attention(call)

    with replaced_attention(probe.model.decoder, note), torch.no_grad():
        probe.model.logits(LmBatch(ids, ids))
    k = seen[1].k_BGTD.repeat_interleave(2, dim=1)
    torch.testing.assert_close(found["qk"][1], (seen[1].q_BHTD * k).abs().mean((0, 2)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["k"][1], seen[1].k_BGTD.abs().mean((0, 2)), atol=1e-6, rtol=1e-5)
    assert found["k"].shape == (4, 2, 16)


@pytest.mark.parametrize("bits", [16, 4, 2])
@pytest.mark.parametrize("per", ["kv-head", "query-head"])
def test_the_label_cache_equals_labels_of_the_final_keys(bits: int, per: str) -> None:
    call = a_call(26)
    method = DoubleSparsity(group_factor=2, label_bits=bits, label_per=per, dense_layers=0)
    _, store = decoded(method, call, 19, some_contributions())
    order = ranked(some_contributions(), "qk", 0, HEADS, GROUPS, per == "query-head", WIDTH)[:, : WIDTH // 2]
    keys = call.k_BGTD if per == "kv-head" else call.k_BGTD.repeat_interleave(2, dim=1)
    labels = torch.stack([keys[:, head][..., order[head]] for head in range(order.shape[0])], dim=1)
    expected = labels if bits == 16 else dense(quant_pack(labels, bits))
    assert torch.equal(dense(store.state["labels"]), expected)


@pytest.mark.parametrize("sets", [GROUPS, HEADS])
def test_gathered_attention_equals_masked_attention(sets: int) -> None:
    call = a_call(40)
    cached = DenseSegment(call.order_BT[:, None].expand(2, GROUPS, -1), None, call.k_BGTD, call.v_BGTD)
    query = token(call, 39)
    scores = torch.randn(2, sets, 1, 40, generator=torch.Generator().manual_seed(0))
    chosen = best(scores, torch.tensor([[7], [9]]))
    gathered = gathered_attention(query.q_BHTD, cached, chosen[:, :, 0], call.softmax)
    torch.testing.assert_close(
        gathered, masked_attention(query.q_BHTD, cached, chosen, call.softmax), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("select", ["query-head", "kv-head"])
@pytest.mark.parametrize("pads", [None, 5])
def test_many_queries_at_once_equal_one_after_the_other(select: str, pads: int | None) -> None:
    call = a_call(33)
    padded = call if pads is None else left_padded(call, pads)
    shift = pads or 0
    method = DoubleSparsity(k_share=0.2, group_factor=4, select_per=select, dense_layers=0)
    steps, _ = decoded(method, padded, 20 + shift, some_contributions())
    store = method.compress(slice_call(call, 0, 20), some_contributions())
    rest = slice_call(call, 20, None)
    append_recent(store, rest)
    torch.testing.assert_close(steps, method.step(rest, store, some_contributions()), atol=1e-5, rtol=1e-5)


def test_permuting_channels_of_queries_and_keys_permutes_the_list_and_nothing_else() -> None:
    call, stats = a_call(30), some_contributions()
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(5))
    moved = replace(call, q_BHTD=call.q_BHTD[..., order], k_BGTD=call.k_BGTD[..., order])
    moved_stats = {name: value[..., order] for name, value in stats.items()}
    method = DoubleSparsity(k_share=0.2, group_factor=4, dense_layers=0)
    plain, store = decoded(method, call, 20, stats)
    permuted, other = decoded(method, moved, 20, moved_stats)
    assert torch.equal(order[other.state["channels"]], store.state["channels"])
    torch.testing.assert_close(permuted, plain, atol=1e-6, rtol=1e-5)


def test_padding_is_never_read() -> None:
    call = left_padded(a_call(20), 6)
    method = DoubleSparsity(**ORACLE, k_share=1.0)
    chosen = method._choose(call, method.compress(call, None), None)
    assert not chosen[..., :6].any()
    assert chosen[:, :, -1].sum(-1).unique().tolist() == [20]


def test_forced_recent_tokens_are_among_those_read() -> None:
    call = a_call(20)
    method = DoubleSparsity(**ORACLE, k_share=0.2, force_recent=3)
    chosen = method._choose(call, method.compress(call, None), None)[:, :, -1]
    assert chosen[..., -3:].all()
    assert chosen.sum(-1).unique().tolist() == [4]


@pytest.mark.parametrize(("factor", "bits"), [(1, 16), (4, 16), (2, 4), (2, 2)])
@pytest.mark.parametrize("per", ["kv-head", "query-head"])
def test_bytes_read_and_stored_equal_the_formula(factor: int, bits: int, per: str) -> None:
    """Labels of all tokens, and 2 x 16 bits x D per token of the union of a group's sets."""
    call = a_call(40, rows=1)
    method = DoubleSparsity(
        k_share=0.25, group_factor=factor, label_bits=bits, label_per=per, select_per="kv-head", dense_layers=0
    )
    _, store = decoded(method, call, 32, some_contributions())
    channels = WIDTH // factor
    heads = GROUPS if per == "kv-head" else HEADS
    labels = heads * 40 * (channels * bits / 8 + (4 if bits < 16 else 0))
    assert method.read_bytes(store, [], 16) == labels + 10 * GROUPS * 2 * WIDTH * 2
    assert stored_bytes([*store.resident(), *store.recent.tensors()], 16) == 40 * GROUPS * 2 * WIDTH * 2 + labels


def test_per_query_head_sets_cost_their_union() -> None:
    call = a_call(40, rows=1)
    method = DoubleSparsity(**ORACLE, k_share=0.25)
    _, store = decoded(method, call, 32)
    union = method._choose(token(call, 39), store, None)[0, :, 0].unflatten(0, (GROUPS, -1)).any(1).sum()
    assert store.state["chosen"] == int(union)
    assert 10 * GROUPS <= int(union) <= 10 * HEADS


def test_the_ratio_is_that_of_reading_and_storing_costs_more(probe: KvCacheProbe) -> None:
    method = build("double-sparsity", {"k_share": 0.1, "dense_layers": 1})
    with method.apply(probe.model, probe.prepared(method, 0)), torch.no_grad():
        probe.model.logits(probe.batch([0]))
        report = probe.model.occupant(ATTENTION).report()  # type: ignore[union-attr]
        costs = method.footprint(probe.model, probe.ctx)
    assert costs["ratio"] == costs["kv_read_ratio"] == report.dense / report.read > 1
    labels = 3 * 2 * PROMPT * (16 // 8) * 2  # three sparse layers, two heads, two channels, two bytes
    dense_bytes = 4 * 2 * PROMPT * 2 * 16 * 2
    assert costs["kv_prompt_bytes"] == dense_bytes + labels
    assert costs["kv_store_ratio"] == dense_bytes / (dense_bytes + labels) < 1
    assert report.dense == 4 * 2 * (PROMPT + TAIL) * 2 * 16 * 2


def test_prompts_and_dense_layers_are_exact(probe: KvCacheProbe) -> None:
    method = build("double-sparsity", {"k_share": 0.01, "dense_layers": 0})
    batch = probe.batch(range(2))
    with torch.no_grad():
        expected = probe.model.logits(batch)[:, :PROMPT]
        with method.apply(probe.model, probe.prepared(method, 0)):
            assert torch.allclose(probe.model.logits(batch)[:, :PROMPT], expected, atol=1e-5)


def test_calibrated_channels_find_more_of_the_top_k_than_random_or_worst_ones() -> None:
    """Queries and keys with most of their product in two channels."""
    call = a_call(200, rows=2)
    call.q_BHTD[..., [2, 5]] *= 4
    call.k_BGTD[..., [2, 5]] *= 2
    stats = {"qk": (call.q_BHTD * call.k_BGTD.repeat_interleave(2, 1)).abs().mean((0, 2))[None]}
    exact = DoubleSparsity(**ORACLE, k_share=0.05)
    oracle = exact._choose(call, exact.compress(call, None), None)
    found = {}
    for channel in ("qk", "random", "worst"):
        method = DoubleSparsity(k_share=0.05, group_factor=4, channel=channel, dense_layers=0)
        chosen = method._choose(call, method.compress(call, stats), stats)
        found[channel] = float((chosen & oracle).sum() / oracle.sum())
    assert found["qk"] > 0.6
    assert found["qk"] > found["random"] + 0.2
    assert found["random"] > found["worst"] + 0.2


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"group_factor": 32}, "group_factor = 32 leaves no label channel of 16; allowed: 1 … 16"),
        ({"dense_layers": 4}, "dense_layers = 4 leaves none of the 4 layers sparse; allowed: 0 … 3"),
    ],
)
def test_impossible_knobs_are_refused(knobs: dict[str, int], words: str, probe: KvCacheProbe) -> None:
    with pytest.raises(Infeasible, match=words):
        build("double-sparsity", knobs).check(probe.model.info)


@pytest.mark.parametrize("window", [3, 6, 50])
def test_a_window_beyond_the_budget_keeps_the_newest(window: int) -> None:
    call = a_call(30)
    method = DoubleSparsity(**ORACLE, k_share=0.2, force_recent=window)  # type: ignore[arg-type]
    chosen = method._choose(call, method.compress(call, None), None)
    for place in (0, 4, 13, 29):
        budget = max(1, int(0.2 * (place + 1) + 0.5))
        newest = range(place + 1 - min(window, budget), place + 1)
        assert chosen[:, :, place, list(newest)].all()
        assert (chosen[:, :, place].sum(-1) == budget).all()


@torch.no_grad()
def test_calibration_counts_the_scored_prompts_alone() -> None:
    """QueCC runs the decoder on the question before the prompt; that pass is none of the model's work on prompts."""
    probe = VisualTokenProbe(examples=2)
    quecc = build("quecc", {})
    passes: dict[int, list[int]] = {}
    with quecc.apply(probe.model, probe.prepared(quecc, 0)):
        batch, meter = probe.batch([0, 1]), Meter()
        attend = meter.attend

        def note(call: AttentionCall) -> Tensor:
            passes.setdefault(call.layer, []).append(call.q_BHTD.shape[2])
            return attend(call)

        meter.attend = note  # type: ignore[method-assign]
        with probe.model.occupy(ATTENTION, meter):
            for _ in range(2):
                probe.model.answer_logits(batch)
                meter.count()
        passed = {layer: list(lengths) for layer, lengths in passes.items()}
        length = probe.model.compress(batch).tokens_BVD.shape[1] + batch.prompt_BT.shape[1] - 1
    assert batch.question_BQ is not None
    assert passed[0] == [batch.question_BQ.shape[1], length] * 2
    assert set(meter._tokens.values()) == {2 * 2 * length}
