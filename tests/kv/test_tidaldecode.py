"""TidalDecode: who selects, who reuses, exactness where it is promised, and bytes by the formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, HEADS, WIDTH, a_call, probabilities, token
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import append_recent, slice_call
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.methods.sparse_attention.tidaldecode import TidalDecode
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.segments import LayerStore

LAYERS, LENGTH, PROMPT = 6, 40, 32
HEADS_OF_GROUP = HEADS // GROUPS


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(cost="read", layers=4)


def layers(seed: int = 0, rows: int = 2, pads: tuple[int, ...] | None = None) -> list[AttentionCall]:
    """A call per layer, each with queries, keys and values of its own."""
    return [a_call(LENGTH, rows=rows, seed=seed + n, layer=n, pads=pads) for n in range(LAYERS)]


def run(method: TidalDecode, calls: list[AttentionCall]) -> tuple[list[list[Tensor]], list[LayerStore]]:
    """Outputs of every step, by layer, and the stores: layers in order, what one leaves the others find."""
    memory: dict[str, Any] = {}
    stores = [method.compress(replace(slice_call(call, 0, PROMPT), carried=memory), None) for call in calls]
    outs = []
    for place in range(PROMPT, LENGTH):
        memory = {}
        row = []
        for call, store in zip(calls, stores, strict=True):
            one = replace(token(call, place), carried=memory)
            append_recent(store, one)
            row.append(method.step(one, store, None))
        outs.append(row)
    return outs, stores


def dense_at(call: AttentionCall, place: int) -> Tensor:
    return causal_attention(slice_call(call, 0, place + 1))[:, -1:]


def top(call: AttentionCall, place: int, count: int) -> Tensor:
    """The places with the largest products of the newest query, (B, H, count), plain."""
    p_BHN = probabilities(slice_call(call, 0, place + 1))[:, :, -1]
    return p_BHN.topk(count, -1).indices


def over(call: AttentionCall, place: int, sets_BHM: Tensor) -> Tensor:
    """Attention of one query over sets of places, head by head."""
    out = torch.zeros(call.q_BHTD.shape[0], 1, HEADS, WIDTH)
    for row in range(out.shape[0]):
        for head in range(HEADS):
            places = sorted(set(sets_BHM[row, head].tolist()))
            k, v = (x[row, head // HEADS_OF_GROUP, places] for x in (call.k_BGTD, call.v_BGTD))
            out[row, 0, head] = (call.q_BHTD[row, head, place] @ k.T * call.softmax.scaling).softmax(-1) @ v
    return out


def test_layers_reuse_what_the_selecting_ones_before_them_chose() -> None:
    """Against loops over heads: dense up to the selection, its places in the layers behind, and anew from the correction on."""
    calls, share = layers(), 0.2
    method = TidalDecode(k_share=share, sparse_start=1, correction=4, force_recent=0)
    outs, _ = run(method, calls)
    for step, place in enumerate(range(PROMPT, LENGTH)):
        count = int(share * (place + 1) + 0.5)
        first, second = (top(calls[n], place, count) for n in (1, 4))
        for layer, call in enumerate(calls):
            expected = {2: first, 3: first, 5: second}.get(layer)
            wanted = dense_at(call, place) if expected is None else over(call, place, expected)
            torch.testing.assert_close(outs[step][layer], wanted, atol=1e-5, rtol=1e-5)


def test_a_layer_with_the_selecting_ones_queries_and_keys_reads_its_own_best() -> None:
    """Persistence is the only approximation."""
    calls = layers()
    calls[2] = replace(calls[1], layer=2)
    outs, _ = run(TidalDecode(k_share=0.1, sparse_start=1, force_recent=0), calls)
    place = LENGTH - 1
    torch.testing.assert_close(
        outs[-1][2], over(calls[2], place, top(calls[2], place, int(0.1 * LENGTH + 0.5))), atol=1e-5, rtol=1e-5
    )


def test_every_token_chooses_anew() -> None:
    """Another last query changes what later layers read of it, and nothing of the step before."""
    calls = layers()
    other = [replace(c, q_BHTD=torch.cat((c.q_BHTD[:, :, :-1], -c.q_BHTD[:, :, -1:]), 2)) for c in calls[:2]] + calls[
        2:
    ]
    method = TidalDecode(k_share=0.1, sparse_start=1)
    one, two = run(method, calls)[0], run(method, other)[0]
    for a, b in zip(one[-2], two[-2], strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(one[-1][2], two[-1][2])


@pytest.mark.parametrize("per", ["query-head", "kv-head", "layer"])
def test_those_who_choose_together_read_the_same(per: str) -> None:
    calls = layers()
    method = TidalDecode(k_share=0.15, sparse_start=0, select_per=per)
    memory: dict[str, Any] = {}
    method.compress(replace(calls[0], carried=memory), None)
    chosen_BSN = memory["chosen"][:, :, -1]
    assert chosen_BSN.shape[1] == {"query-head": HEADS, "kv-head": GROUPS, "layer": GROUPS}[per]
    assert chosen_BSN.sum(-1).unique().tolist() == [int(0.15 * LENGTH + 0.5)]
    assert (per == "layer") == bool((chosen_BSN == chosen_BSN[:, :1]).all())
    assert bool(chosen_BSN[..., -1].all()), "the newest token is forced"


def test_sinks_and_the_newest_are_read_as_far_as_the_budget_goes() -> None:
    memory: dict[str, Any] = {}
    TidalDecode(k_share=0.1, sparse_start=0, force_recent=3, force_sinks=5).compress(
        replace(a_call(LENGTH), carried=memory), None
    )
    assert memory["chosen"][:, :, -1].nonzero()[:, -1].unique().tolist() == [0, 37, 38, 39], (
        "4 tokens: 3 newest and a sink"
    )


@pytest.mark.parametrize(
    "knobs", [{}, {"sparse_start": 1, "correction": 2}, {"select_per": "kv-head"}, {"select_per": "layer"}]
)
def test_reading_everything_gives_dense_logits_and_prompts_are_exact(
    knobs: dict[str, Any], probe: KvCacheProbe
) -> None:
    bare = probe.outputs([0, 1])
    with build("tidaldecode", {"k_share": 1.0, **knobs}).apply(probe.model, None):
        torch.testing.assert_close(probe.outputs([0, 1]), bare, atol=1e-5, rtol=1e-5)
    with build("tidaldecode", {"k_share": 0.1, **knobs}).apply(probe.model, None):
        assert not torch.allclose(probe.outputs([0, 1]), bare, atol=1e-3)


def test_padding_is_never_read() -> None:
    calls = layers(pads=(0, 9))
    loud = [
        replace(
            c,
            k_BGTD=c.k_BGTD.masked_fill(~c.valid_BT[:, None, :, None], 50.0),
            v_BGTD=c.v_BGTD.masked_fill(~c.valid_BT[:, None, :, None], 1e4),
        )
        for c in calls
    ]  # type: ignore[index]
    method = TidalDecode(k_share=0.2, sparse_start=1, correction=3, select_per="kv-head")
    for a, b in zip(run(method, calls)[0][-1], run(method, loud)[0][-1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bytes_read_are_those_of_the_formula() -> None:
    """Dense and selecting layers fetch every token, the others k of each head with their places."""
    calls = layers(rows=1)
    method = TidalDecode(k_share=0.2, sparse_start=1, correction=3, select_per="kv-head")
    _, stores = run(method, calls)
    token_bytes = 2 * WIDTH * 2
    for layer, store in enumerate(stores):
        fetched = [t for s in store.all() for t in s.read_tensors()]
        count = LENGTH if layer in (0, 1, 3) else int(0.2 * LENGTH + 0.5)
        index = 0 if layer in (0, 1, 3) else 4
        assert method.read_bytes(store, fetched, 16) == GROUPS * count * (token_bytes + index)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"sparse_start": 3}, "sparse_start = 3 is no layer of 4 that attends to all tokens .*; allowed: 0, 1, 2"),
        (
            {"sparse_start": 1, "correction": 3},
            "correction = 3 is no layer of 4 behind sparse_start = 1 .*; allowed: 2, or 0 for none",
        ),
        ({"sparse_start": 2, "correction": 1}, "correction = 1 .* allowed: none of this model, or 0 for none"),
    ],
)
def test_impossible_layers_are_refused(knobs: dict[str, int], words: str, probe: KvCacheProbe) -> None:
    with pytest.raises(Infeasible, match=words):
        build("tidaldecode", knobs).check(probe.model.info)


def test_layers_within_windows_neither_select_nor_read(probe: KvCacheProbe) -> None:
    """Where every other layer has a window, the full ones select and read; the others are refused at plan."""
    info = replace(
        probe.model.info, geometry={**probe.model.info.geometry, "layers": 6, "windows": (8, None, 8, None, 8, None)}
    )
    build("tidaldecode", {"sparse_start": 1, "correction": 3}).check(info)
    for knobs, allowed in (
        ({"sparse_start": 2}, "1, 3"),
        ({"sparse_start": 1, "correction": 4}, "3, or 0"),
        ({"sparse_start": 5}, "1, 3"),
    ):
        with pytest.raises(Infeasible, match=f"has another such behind it; allowed: {allowed}"):
            build("tidaldecode", knobs).check(info)


@pytest.mark.parametrize("per", ["kv-head", "layer"])
def test_groups_choose_by_their_summed_attention(per: str) -> None:
    """Not by summed products: one query head that is sure counts once, however large its logits."""
    call = a_call(LENGTH)
    call = replace(call, q_BHTD=call.q_BHTD * torch.tensor([6.0, 1.0, 6.0, 1.0])[:, None, None])
    memory: dict[str, Any] = {}
    TidalDecode(k_share=0.2, sparse_start=0, select_per=per, force_recent=0).compress(
        replace(call, carried=memory), None
    )
    p_BGN = probabilities(call)[:, :, -1].unflatten(1, (GROUPS, -1)).sum(2)
    p_BGN = p_BGN.sum(1, keepdim=True).expand_as(p_BGN) if per == "layer" else p_BGN
    expected = torch.zeros_like(p_BGN, dtype=torch.bool).scatter(
        -1, p_BGN.topk(int(0.2 * LENGTH + 0.5), -1).indices, True
    )
    assert torch.equal(memory["chosen"][:, :, -1], expected)
