"""Column sums against loops over heads, queries and keys, and against what they must be in closed form."""

from __future__ import annotations

import pytest
import torch
from softmaxes import a_softmax, softmax_by_hand
from torch import Tensor

from isoflop.kernels import blocks
from isoflop.kernels.column_scores import column_scores
from isoflop.kernels.softmax import Softmax


def brute_force(
    q: Tensor, k: Tensor, softmax: Softmax, weight: Tensor, q_at: Tensor, k_at: Tensor, valid: Tensor | None
) -> Tensor:
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    out = torch.zeros(batch, groups, weight.shape[1], keys)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for t in range(queries):
                seen = [s for s in range(keys) if k_at[b, s] <= q_at[b, t] and (valid is None or valid[b, s])]
                if not seen:
                    continue
                p = softmax_by_hand(q[b : b + 1, h : h + 1, t : t + 1], k[b : b + 1, g : g + 1, seen], softmax, h)[
                    0, 0, 0
                ]
                for i, s in enumerate(seen):
                    out[b, g, :, s] += weight[b, :, t] * p[i]
    return out


def made(
    batch: int, heads: int, groups: int, queries: int, keys: int, sets: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, heads, queries, 8, generator=g),
        torch.randn(batch, groups, keys, 8, generator=g),
        torch.rand(batch, sets, queries, generator=g),
    )


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("kind", ["plain", "both"])
@pytest.mark.parametrize("heads, groups, sets", [(4, 2, 1), (3, 1, 2), (2, 2, 3)])
def test_scores_equal_loops(
    heads: int, groups: int, sets: int, kind: str, padded: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With grouped heads, padding on either side per row, and queries that see nothing; in one block and row by row."""
    monkeypatch.setattr(blocks, "BLOCK_VALUES", dict.fromkeys(("cpu", "cuda"), block))
    q, k, weight = made(2, heads, groups, 9, 9, sets)
    at = torch.arange(9).expand(2, -1)
    valid = torch.stack([at[0] >= padded, at[0] < 9 - padded]) if padded else None
    softmax = a_softmax(kind, 0.3, heads)
    found = column_scores(q, k, softmax, weight, at, at, valid)
    torch.testing.assert_close(found, brute_force(q, k, softmax, weight, at, at, valid), rtol=1e-5, atol=1e-6)


def test_probes_are_rows_of_the_whole() -> None:
    """Probe queries alone, in any order, score as all queries do with weights only on the probes."""
    q, k, weight = made(2, 4, 2, 20, 20, 2)
    at = torch.arange(20)[None]
    probes = torch.tensor([17, 3, 11])
    only = torch.zeros_like(weight)
    only[:, :, probes] = weight[:, :, probes]
    torch.testing.assert_close(
        column_scores(q[:, :, probes], k, Softmax(0.5), weight[:, :, probes], at[:, probes], at),
        column_scores(q, k, Softmax(0.5), only, at, at),
    )


def test_even_attention_sums_to_harmonic_differences() -> None:
    """Zero queries spread evenly: key j receives 1/(j+1) + ... + 1/L from each head."""
    length, heads, groups = 31, 4, 2
    at = torch.arange(length)[None]
    found = column_scores(
        torch.zeros(1, heads, length, 8),
        torch.randn(1, groups, length, 8),
        Softmax(1.0),
        torch.ones(1, 1, length),
        at,
        at,
    )
    shares = 1 / torch.arange(1, length + 1, dtype=torch.float64)
    expected = heads // groups * shares.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(found[0, 1, 0].double(), expected, rtol=1e-6, atol=0)


def test_each_query_gives_away_its_whole_weight() -> None:
    q, k, weight = made(2, 6, 3, 15, 15, 2)
    at = torch.arange(15)[None]
    total = column_scores(q, k, Softmax(0.7), weight, at, at).sum(-1)
    torch.testing.assert_close(total, (2 * weight.sum(-1))[:, None].expand(-1, 3, -1))


def test_a_batch_mate_changes_nothing() -> None:
    q, k, weight = made(3, 4, 2, 12, 12, 1)
    at = torch.arange(12)[None]
    valid = torch.arange(12) >= torch.tensor([[0], [4], [7]])
    together = column_scores(q, k, Softmax(0.4), weight, at, at, valid)
    alone = column_scores(q[1:2, :, 4:], k[1:2, :, 4:], Softmax(0.4), weight[1:2, :, 4:], at[:, :8], at[:, :8])
    torch.testing.assert_close(together[1, :, :, 4:], alone[0])
    assert not together[1, :, :, :4].any()


def test_no_keys_give_no_scores() -> None:
    q, k, weight = made(1, 2, 1, 4, 0, 1)
    assert column_scores(q, k, Softmax(1.0), weight, torch.arange(4)[None], torch.zeros(1, 0)).shape == (1, 1, 1, 0)


@pytest.mark.parametrize("batch, queries", [(2, 0), (0, 3), (0, 0)])
def test_no_queries_give_scores_of_0(batch: int, queries: int) -> None:
    q, k, weight = made(batch, 4, 2, queries, 5, 1)
    at_q, at_k = (torch.arange(n).expand(batch, -1) for n in (queries, 5))
    found = column_scores(q, k, Softmax(1.0), weight, at_q, at_k)
    assert torch.equal(found, torch.zeros(batch, 2, 1, 5))
