"""Codes, tables and k-means, which every codebook method shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.methods.weights.codebooks import (
    CodebookPayload,
    code_bits,
    groups_of,
    k_means,
    looked_up,
    matrix_of,
    nearest,
    pack_codes,
    unpack_codes,
)
from isoflop.methods.weights.probe import check_payload


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 16))
def test_codes_of_any_width_come_back(count: int, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=drawn(count))
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed, bits, count), codes)
    assert packed.numel() <= count * bits / 8 + 14, "whole units at the ends, and no more"


@pytest.mark.parametrize(("entries", "bits"), [(1, 1), (2, 1), (3, 2), (16, 4), (17, 5), (256, 8), (1024, 10)])
def test_bits_of_a_code(entries: int, bits: int) -> None:
    assert code_bits(entries) == bits


def test_groups_lie_along_the_inputs_of_a_row() -> None:
    weight = torch.arange(14.0).view(2, 7)
    groups = groups_of(weight, 4)
    assert groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 0], [7, 8, 9, 10], [11, 12, 13, 0]]
    assert torch.equal(matrix_of(groups, 2, 7), weight)


@pytest.mark.parametrize("basis", [None, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tables", [1, 2])
def test_a_payload_decodes_to_sums_of_entries(basis: int | None, scaled: bool, tables: int) -> None:
    """Brute force, group by group; and what is counted is what is stored."""
    rows, cols, group, entries = 6, 22, 4, 300
    width = basis or group
    table = torch.randn(tables, entries, width, generator=drawn(1))
    codes = torch.randint(0, entries, (rows * 6, tables), generator=drawn(2))
    base = None if basis is None else torch.randn(basis, group, generator=drawn(3))
    scales = torch.rand(rows, generator=drawn(4)) if scaled else None
    payload = CodebookPayload.of((rows, cols), codes, table, base, scales, group)
    served = payload.decode()
    check_payload(payload, served, 16)
    for row in range(rows):
        for place in range(6):
            wanted = torch.zeros(width)
            for number in range(tables):
                wanted += table[number, codes[row * 6 + place, number]].half().float()
            wanted = wanted if base is None else wanted @ base.half().float()
            wanted = wanted if scales is None else wanted * scales[row].half().float()
            found = served[row, place * 4 : place * 4 + 4]
            assert torch.allclose(found, wanted[: len(found)], atol=1e-5)
    stored = rows * 6 * tables * 9 / 8 + 2 * (tables * entries * width + (basis or 0) * group + rows * scaled)
    assert payload.nbytes(16) == pytest.approx(stored, abs=2)


def test_a_basis_is_multiplied_in_where_that_is_smaller() -> None:
    """8 entries of 3 numbers and 3·4 of the basis are 36; fused they are 32."""
    codes = torch.zeros(4, 1, dtype=torch.long)
    for width, held in ((3, False), (2, True)):
        table, basis = torch.randn(1, 8, width), torch.randn(width, 4)
        payload = CodebookPayload.of((4, 4), codes, table, basis, None, 4)
        assert (payload.basis_DG is not None) == held
        assert payload.tables_MKD.numel() + (0 if payload.basis_DG is None else payload.basis_DG.numel()) == min(
            32, 8 * width + width * 4
        )


def test_nearest_is_the_brute_force_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from isoflop.methods.weights import codebooks

    points, table = torch.randn(50, 3, generator=drawn()), torch.randn(9, 3, generator=drawn(1))
    by_hand = [min(range(9), key=lambda k: float((p - table[k]).square().sum())) for p in points]
    assert nearest(points, table).tolist() == by_hand
    monkeypatch.setattr(codebooks, "MOST", 20)
    assert nearest(points, table).tolist() == by_hand, "in parts, too"


def lloyd_by_hand(points: np.ndarray, table: np.ndarray) -> np.ndarray:
    for _ in range(200):
        codes = ((points[:, None] - table[None]) ** 2).sum(-1).argmin(1)
        table = np.stack([points[codes == k].mean(0) if (codes == k).any() else table[k] for k in range(len(table))])
    return table


def test_k_means_ends_where_lloyds_rounds_do() -> None:
    points = torch.randn(80, 2, generator=drawn(), dtype=torch.float64)
    table = k_means(points, 6, drawn(5))
    error = float((points - table[nearest(points, table)]).square().sum())
    rested = torch.from_numpy(lloyd_by_hand(points.numpy(), table.numpy()))
    least = float((points - rested[nearest(points, rested)]).square().sum())
    assert error <= 1.01 * least
    assert torch.equal(table, k_means(points, 6, drawn(5))), "the same seed, the same entries"


@pytest.mark.parametrize("points", [1, 3, 8])
def test_as_many_entries_as_points_leave_no_error(points: int) -> None:
    """30 (b), repeated points among them."""
    distinct = torch.randn(points, 4, generator=drawn())
    repeated = distinct.repeat(3, 1)
    table = k_means(repeated, 8, drawn(1))
    assert torch.allclose(table[nearest(repeated, table)], repeated)


@pytest.mark.parametrize("seed", range(4))
def test_entries_begin_at_points_that_are_apart(seed: int) -> None:
    """k-means++: a point that an entry lies on is never drawn again."""
    from isoflop.methods.weights.codebooks import _spread

    points = torch.arange(6.0)[:, None].repeat(4, 2)
    assert sorted(_spread(points, 6, drawn(seed))[:, 0].tolist()) == list(range(6))


def test_an_entry_that_nobody_is_near_takes_a_point_of_the_fullest() -> None:
    """Trap: dead entries."""
    from isoflop.methods.weights.codebooks import _reseed

    points = torch.tensor([[0.0], [0.1], [3.0], [9.0], [9.1]])
    table = torch.tensor([[1.0], [100.0], [9.0]])
    codes = nearest(points, table)
    apart = (points - table[codes]).square().sum(1)
    _reseed(table, torch.bincount(codes, minlength=3), codes, apart, points)
    assert table.flatten().tolist() == [1.0, 3.0, 9.0]


def test_sums_are_over_tables() -> None:
    tables = torch.tensor([[[1.0], [2.0]], [[10.0], [20.0]]])
    assert looked_up(tables, torch.tensor([[0, 1], [1, 0]])).flatten().tolist() == [21.0, 12.0]
