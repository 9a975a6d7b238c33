"""Matching and merging against loops, and what every merge conserves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from isoflop.kernels.merge import bipartite_match, merge_tokens

Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """(x, size, keep, src, dst) in which every token is kept or merged."""
    batch, kept, merged = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(batch, kept + merged, 3, generator=g)
    size = torch.randint(1, 6, (batch, kept + merged, 1), generator=g).float()
    order = torch.rand(batch, kept + merged, generator=g).argsort(1)
    keep, src = order[:, :kept], order[:, kept:]
    return x, size, keep, src, keep.gather(1, torch.randint(0, kept, (batch, merged), generator=g))


def brute_force(x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    out, sizes = torch.zeros(*keep.shape, x.shape[2]), torch.zeros(*keep.shape, 1)
    for b in range(len(x)):
        for k, token in enumerate(keep[b].tolist()):
            members = [token, *(s for s, d in zip(src[b].tolist(), dst[b].tolist(), strict=True) if d == token)]
            sizes[b, k] = sum(size[b, i] for i in members)
            weighted = sum(x[b, i] * (size[b, i] if mode == "mean" else 1.0) for i in members)
            out[b, k] = weighted / sizes[b, k] if mode == "mean" else weighted
    return out, sizes


@given(plans(), st.sampled_from(["mean", "sum"]))
def test_merging_equals_loops(plan: Plan, mode: str) -> None:
    torch.testing.assert_close(merge_tokens(*plan, mode), brute_force(*plan, mode), rtol=1e-5, atol=1e-5)


@given(plans())
def test_sizes_and_weighted_sums_are_conserved(plan: Plan) -> None:
    x, size, *_ = plan
    out, sizes = merge_tokens(*plan)
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    torch.testing.assert_close((out * sizes).sum(1), (x * size).sum(1), rtol=1e-5, atol=1e-4)


def test_untouched_tokens_of_size_one_come_out_bit_by_bit() -> None:
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[0, 3, 1, 8], [2, 7, 0, 4]])
    out, _ = merge_tokens(x, torch.ones(2, 9, 1), keep, torch.tensor([[5, 6], [5, 6]]), keep[:, [2, 2]])
    for b in range(2):
        for k in (0, 1, 3):
            assert torch.equal(out[b, k], x[b, keep[b, k]])


def test_merges_carry_gradients() -> None:
    x = torch.randn(1, 4, 3, requires_grad=True)
    out, _ = merge_tokens(
        x, torch.ones(1, 4, 1), torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), torch.tensor([[1, 1]])
    )
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, :, 0], torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3]))


def test_an_unknown_mode_is_refused() -> None:
    index = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="mode='max': allowed are 'mean' and 'sum'"):
        merge_tokens(torch.ones(1, 1, 1), torch.ones(1, 1, 1), index, index[:, :0], index[:, :0], "max")


def test_matches_equal_a_double_loop() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 6, generator=g), torch.randn(2, 5, 6, generator=g)
    similarity, index = bipartite_match(a, b)
    for i in range(2):
        for n in range(7):
            cosines = [float(F.cosine_similarity(a[i, n], b[i, m], dim=0)) for m in range(5)]
            assert index[i, n] == max(range(5), key=cosines.__getitem__)
            assert similarity[i, n] == pytest.approx(max(cosines), abs=1e-6)


def test_of_equal_destinations_the_first_wins_and_padding_never() -> None:
    b = torch.eye(3)[None, [0, 1, 1, 2]]
    a = torch.tensor([[[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]])
    assert bipartite_match(a, b)[1].tolist() == [[1, 0]]
    valid = torch.tensor([[True, False, True, False]])
    similarity, index = bipartite_match(a, b, valid)
    assert index.tolist() == [[2, 0]]
    assert similarity.tolist() == [[1.0, 0.0]]
    similarity, index = bipartite_match(a, b, torch.zeros(1, 4, dtype=torch.bool))
    assert similarity.tolist() == [[-torch.inf, -torch.inf]]
    assert index.tolist() == [[0, 0]]


def test_no_destination_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one destination"):
        bipartite_match(torch.ones(1, 2, 3), torch.ones(1, 0, 3))


def test_lengths_of_tokens_do_not_matter() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(1, 6, 4, generator=g), torch.randn(1, 5, 4, generator=g)
    longer = bipartite_match(a * 100, b * torch.rand(1, 5, 1, generator=g).add(0.1))
    torch.testing.assert_close(longer[0], bipartite_match(a, b)[0])
    assert torch.equal(longer[1], bipartite_match(a, b)[1])
