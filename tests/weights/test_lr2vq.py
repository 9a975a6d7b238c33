"""LR²VQ (arXiv 2211.11397): points in few dimensions, clustered and trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from weight_cases import context, llama, trained_decoder

from isoflop.core.errors import Infeasible
from isoflop.methods.weights.codebooks import CodebookPayload, groups_of, k_means, matrix_of, nearest
from isoflop.methods.weights.level_bank import calibration_loss
from isoflop.methods.weights.lr2vq import DKM, STE, Clustered, Lr2Vq, Points, principal, stored_bits
from isoflop.methods.weights.payloads import DensePayload
from isoflop.methods.weights.probe import WeightProbe, check_payload
from isoflop.methods.weights.views import linear_views

BARE = {"heal_steps": 0, "pretrain_steps": 0}


def matrix(rows: int = 32, cols: int = 48, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def points_of(weight: Tensor, m: int = 8, rank: int = 3) -> Points:
    form = Lr2Vq(m=m, k=16, rank=rank).points(weight)
    assert isinstance(form, Points)
    return form


def clustered(weight: Tensor, assign: str, m: int = 8, rank: int = 3, tau: float = 0.01) -> Clustered:
    method = Lr2Vq(m=m, k=16, rank=rank, assign=assign, tau=tau)
    return method.clustered(points_of(weight, m, rank), 0)


def test_errors_of_projection_and_clustering_add_up() -> None:
    """(a): ‖V - Z^B‖² = ‖V - ZB‖² + ‖Z - Z^‖², the basis being orthonormal."""
    groups = groups_of(matrix(dtype=torch.float64), 8)
    basis = principal(groups, 3)
    assert torch.allclose(basis @ basis.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    points = groups @ basis.T
    table = k_means(points, 16, torch.Generator().manual_seed(0))
    there = table[nearest(points, table)]
    parts = (groups - points @ basis).square().sum() + (points - there).square().sum()
    assert float((groups - there @ basis).square().sum()) == pytest.approx(float(parts), rel=1e-6)


def test_the_basis_spans_the_best_subspace() -> None:
    groups = groups_of(matrix(dtype=torch.float64), 8)
    basis = principal(groups, 3)
    lost = (groups - groups @ basis.T @ basis).square().sum()
    assert float(lost) == pytest.approx(float(torch.linalg.svdvals(groups)[3:].square().sum()), rel=1e-9)


def test_as_many_entries_as_groups_cluster_without_error() -> None:
    """(b): what is left is the projection's error alone."""
    weight = matrix(16, 8).repeat(1, 8)  # 128 groups, 16 of them distinct
    found = Lr2Vq(m=8, k=16, rank=8, **BARE).encode(weight)  # type: ignore[arg-type]
    assert isinstance(found, CodebookPayload)
    assert torch.allclose(found.decode(), weight, atol=2e-3)


def test_all_dimensions_are_plain_vector_quantisation() -> None:
    """(c): the codes and the table of k-means on the groups themselves, from the same seed."""
    weight = matrix()
    payload = clustered(weight, DKM, rank=8).payload()
    groups = groups_of(weight, 8)
    table = k_means(groups, 16, torch.Generator().manual_seed(0))
    assert torch.equal(payload.codes_NM()[:, 0], nearest(groups, table))
    assert torch.equal(payload.tables_MKD[0], table.half())
    assert payload.basis_DG is None
    assert torch.equal(payload.decode(), matrix_of(table.half().float()[nearest(groups, table)], 32, 48))


@pytest.mark.parametrize(("m", "k", "rank", "bits"), [
    (8, 16, 3, 192 * 4 + 16 * (16 * 3 + 3 * 8)), (8, 16, 8, 192 * 4 + 16 * 16 * 8), (8, 16, 7, 192 * 4 + 16 * 16 * 8),
    (16, 64, 2, 96 * 6 + 16 * (64 * 2 + 2 * 16)), (32, 64, 4, 64 * 6 + 16 * (64 * 4 + 4 * 32)),
])  # fmt: skip
def test_bytes_are_the_formulas(m: int, k: int, rank: int, bits: int) -> None:
    """(d), by hand for a 32x48 matrix: n·⌈log2 k⌉ + 16·min(k·D + D·m, k·m); 48 does not divide by 32, and padding is counted."""
    payload = Lr2Vq(m=m, k=k, rank=rank, **BARE).encode(matrix())  # type: ignore[arg-type]
    assert isinstance(payload, CodebookPayload)
    assert 8 * payload.nbytes(16) == 8 * payload.nbytes(32) == bits == stored_bits(32, 48, m, k, rank)
    check_payload(payload, payload.decode(), 16)


def test_a_matrix_that_its_tables_would_outweigh_stays_whole() -> None:
    """Trap: codebooks dominate small matrices. Of 16 groups at most 16 entries are kept."""
    assert isinstance(Lr2Vq(m=8, k=256, rank=8, **BARE).encode(matrix(4, 32)), DensePayload)  # type: ignore[arg-type]
    assert isinstance(Lr2Vq(m=8, k=256, rank=1, **BARE).encode(matrix(4, 32)), CodebookPayload)  # type: ignore[arg-type]
    assert stored_bits(4, 32, 8, 256, 1) == 16 * 4 + 16 * (16 + 8)


@pytest.mark.parametrize("assign", [DKM, STE])
def test_assignments_behind_a_training_are_the_nearest_entries(assign: str) -> None:
    """(e): brute force on the trained points."""
    model = llama()
    method = Lr2Vq(m=4, k=16, rank=2, assign=assign, heal_steps=3, heal_batch=2, pretrain_steps=1, heal_lr=0.05)
    forms = [method.clustered(points_of(v.weight(), 4, 2), n) for n, v in enumerate(linear_views(model))]
    before = [form.points.points_ND.detach().clone() for form in forms]
    from isoflop.methods.weights.healing import Forms

    method.heal(model, context(), Forms(linear_views(model), forms), 0, None)
    for form, old in zip(forms, before, strict=True):
        points, table = form.points.points_ND, form.table_KD
        assert not torch.equal(points, old), "it has learned"
        by_hand = torch.cdist(points.double(), table.double()).argmin(1)
        assert torch.equal(form.payload().codes_NM()[:, 0], by_hand)


def test_soft_assignments_by_hand() -> None:
    """DKM: shares e^(-|z-c|²/τ') over their sum, with τ' relative to the points' mean square; entries are means by these."""
    form = clustered(matrix(8, 16), DKM, tau=0.3)
    points = form.points.points_ND.detach()
    start, temperature = form.table_KD.clone(), 0.3 * float(points.square().sum(1).mean())

    def shares(table: Tensor) -> Tensor:
        found = torch.stack([torch.exp(-(points - entry).square().sum(1) / temperature) for entry in table], 1)
        return found / found.sum(1, keepdim=True)

    def centres(found: Tensor) -> Tensor:
        return torch.stack([(points * column[:, None]).sum(0) / column.sum() for column in found.T])

    table = start
    for _ in range(5):
        moved = centres(shares(table))
        rested = float((moved - table).norm()) <= 1e-4 * float(table.norm())
        table = moved
        if rested:
            break
    found = shares(table)
    expected = found @ centres(found)
    assert torch.allclose(form.weight(), form.points.spanned(expected), atol=1e-4)
    assert torch.allclose(form.table_KD, table, atol=1e-4), "the entries are kept for the next step"


def test_cold_soft_assignments_are_hard_ones() -> None:
    """And the served matrix is then what training saw."""
    form = clustered(matrix(), DKM, tau=1e-4)
    assert torch.allclose(form.weight(), form.payload().decode(), atol=5e-3)


def test_hard_assignments_pass_gradients_to_points_and_entries() -> None:
    """Straight through: a point's gradient is its group's, an entry's the sum over those that follow it."""
    form = clustered(matrix(), STE)
    assert torch.allclose(form.weight(), form.payload().decode(), atol=5e-3), "forward is what is stored"
    slope = torch.randn(32, 48, generator=torch.Generator().manual_seed(3))
    (form.weight() * slope).sum().backward()
    basis = form.points.basis_DG
    assert basis is not None
    by_point = groups_of(slope, 8) @ basis.detach().T
    assert torch.allclose(form.points.points_ND.grad, by_point, atol=1e-5)  # type: ignore[arg-type]
    codes = nearest(form.points.points_ND.detach(), form.table_KD.detach())
    by_entry = torch.zeros_like(form.table_KD).index_add_(0, codes, by_point)
    assert torch.allclose(form.table_KD.grad, by_entry, atol=1e-4)  # type: ignore[arg-type]
    assert float(basis.grad.abs().max()) > 0  # type: ignore[union-attr]


def test_without_training_all_dimensions_lose_least() -> None:
    """Trap: that is mathematics, and says nothing against the method."""
    weight = matrix(64, 64)
    errors = [
        float((Lr2Vq(m=8, k=64, rank=rank, **BARE).encode(weight).decode() - weight).norm()) for rank in (1, 2, 4, 8)
    ]  # type: ignore[arg-type]
    assert errors == sorted(errors, reverse=True)


def test_more_dimensions_than_weights_are_refused() -> None:
    with pytest.raises(Infeasible, match="rank = 9 exceeds m = 8; allowed: rank up to 8, or a larger m"):
        Lr2Vq(m=8, rank=9).check(WeightProbe().model.info)


def test_soft_assignments_that_no_memory_holds_are_refused() -> None:
    """A checkpoint's matrices: 2·4096² weights in groups of 8, 256 entries each, 100 blocks."""
    info = replace(WeightProbe().model.info, geometry={"matrices": ((4096, 4096, 200),)})
    with pytest.raises(Infeasible, match=r"assign = dkm holds 1\.1e\+11 shares .* allowed: assign = ste, a larger m"):
        Lr2Vq().check(info)
    Lr2Vq(assign=STE).check(info)
    Lr2Vq(heal_steps=0).check(info)


def test_plans_count_the_tables() -> None:
    model = WeightProbe().model
    method = Lr2Vq(m=8, k=64, rank=4, **BARE)  # type: ignore[arg-type]
    with method.apply(model, method.calibrate(model, context(), 0)):
        found = method.footprint(model, context())
    assert found["bits"] == pytest.approx(method.axes(model.info).bits)
    assert method.axes(replace(model.info, geometry={})).bits == 6 / 8, "codes alone, where matrices are not known"


@pytest.mark.slow
@pytest.mark.parametrize("assign", [DKM, STE])
def test_training_wins_back_most_of_what_the_codes_cost(assign: str) -> None:
    """On training text of a trained model, both trainings against none."""
    model = trained_decoder()
    batches = list(model.calibration(context(), 32, 77))
    found = []
    for steps in (0, 60):
        method = Lr2Vq(m=8, k=64, rank=4, assign=assign, heal_steps=steps, pretrain_steps=steps, heal_lr=3e-3)
        with method.apply(model, method.calibrate(model, context(), 0)):
            found.append(calibration_loss(model, batches))
    assert found[1] - calibration_loss(model, batches) < 0.5 * (found[0] - calibration_loss(model, batches))
