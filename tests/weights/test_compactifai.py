"""CompactifAI (arXiv 2401.14109): matrix product operators, what their cuts lose, and which matrices are spared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from weight_cases import context, llama, trained_decoder

from isoflop.methods.base import build
from isoflop.methods.weights.compactifai import BLOCK, MATRIX, CompactifAi, _units, most_sensitive, sensitivities
from isoflop.methods.weights.level_bank import calibration_loss
from isoflop.methods.weights.mpo import Chain, MpoPayload, bonds, contract, core_numel, decompose, site_sizes
from isoflop.methods.weights.payloads import DensePayload
from isoflop.methods.weights.probe import WeightProbe, check_payload
from isoflop.methods.weights.views import linear_views, replaceable

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "mpo.json").read_text())
FULL = 1 << 16


def matrix(rows: int = 24, cols: int = 36, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sites_of(weight: Tensor, sites: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return site_sizes(weight.shape[0], sites), site_sizes(weight.shape[1], sites)


@pytest.mark.parametrize("sites", [2, 3, 4])
@pytest.mark.parametrize("shape", [(24, 36), (7, 30), (1, 16), (16, 1), (13, 13)])
def test_whole_bonds_give_the_matrix_back(sites: int, shape: tuple[int, int]) -> None:
    """(a), with sizes that are prime or 1, too; the permutation is undone exactly."""
    weight = matrix(*shape, dtype=torch.float32)
    cores = decompose(weight, *sites_of(weight, sites), FULL)
    assert torch.allclose(contract(cores), weight, atol=1e-5)
    assert [core.shape[0] for core in cores] == list(bonds(*sites_of(weight, sites), FULL)[:-1])


def cut_by_hand(weight: np.ndarray, outs: tuple[int, ...], ins: tuple[int, ...], chi: int) -> tuple[np.ndarray, float]:
    """Index by index: entry (a, b) of the matrix lies at the digits of a and b; the squares of all values that were cut."""
    sizes = [o * i for o, i in zip(outs, ins, strict=True)]
    tensor = np.zeros(sizes)
    places = {}
    for a in range(weight.shape[0]):
        for b in range(weight.shape[1]):
            row, col = np.unravel_index(a, outs), np.unravel_index(b, ins)
            places[a, b] = tuple(int(r * i + c) for r, c, i in zip(row, col, ins, strict=True))
            tensor[places[a, b]] = weight[a, b]
    left, basis, lost = tensor, np.ones((1, 1)), 0.0
    for size in sizes[:-1]:
        u, s, vt = np.linalg.svd(left.reshape(basis.shape[1] * size, -1), full_matrices=False)
        lost += float((s[chi:] ** 2).sum())
        u, s, vt = u[:, :chi], s[:chi], vt[:chi]
        basis = np.einsum("ab,bcd->acd", basis, u.reshape(basis.shape[1], size, -1)).reshape(-1, u.shape[1])
        left = s[:, None] * vt
    tensor = (basis @ left.reshape(basis.shape[1], -1)).reshape(sizes)
    return np.array([[tensor[places[a, b]] for b in range(weight.shape[1])] for a in range(weight.shape[0])]), lost


@pytest.mark.parametrize(("sites", "chi"), [(2, 1), (2, 7), (3, 4), (4, 3), (4, 9)])
def test_what_is_lost_is_what_was_cut(sites: int, chi: int) -> None:
    """(b), and brute force."""
    weight = matrix()
    outs, ins = sites_of(weight, sites)
    found = contract(decompose(weight, outs, ins, chi))
    by_hand, lost = cut_by_hand(weight.numpy(), outs, ins, chi)
    assert found.numpy() == pytest.approx(by_hand, abs=1e-10)
    assert float((weight - found).square().sum()) == pytest.approx(lost, rel=1e-9)


def test_two_sites_that_split_rows_from_columns_are_a_truncated_svd() -> None:
    """(c)."""
    weight = matrix()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    found = contract(decompose(weight, (24, 1), (1, 36), 5))
    assert torch.allclose(found, u[:, :5] * s[:5] @ vt[:5], atol=1e-12)


def test_a_chain_is_contracted_with_inputs_as_its_matrix_is() -> None:
    """(d)."""
    weight = matrix(30, 42)
    outs, ins = sites_of(weight, 3)
    first, second, third = decompose(weight, outs, ins, 6)
    x = matrix(5, 42, seed=1)
    y = torch.einsum("bijk,Aoip,pqjr,rskt->boqs", x.view(5, *ins), first, second, third).reshape(5, 30)
    assert torch.allclose(y, x @ contract([first, second, third]).T, atol=1e-12)


def test_cores_are_orthonormal_from_the_left_and_all_of_them_learn() -> None:
    """(e); the singular values lie in the last one."""
    weight = matrix(dtype=torch.float32)
    cores = decompose(weight, *sites_of(weight, 3), 6)
    for core in cores[:-1]:
        flat = core.flatten(0, 2)
        assert torch.allclose(flat.T @ flat, torch.eye(flat.shape[1]), atol=1e-5)
    chain = Chain(cores, 16)
    (chain.weight() * matrix(seed=3, dtype=torch.float32)).sum().backward()
    assert all(core.grad is not None and float(core.grad.abs().max()) > 0 for core in chain.cores)


def test_bytes_by_hand() -> None:
    """216x216 as three sites of 6x6 has 72·χ + 36·χ² entries; at 10, 4320, of 2 bytes each.

    In 4 bits: 360, 3600 and 360 entries in half a byte, with a grid of 4 bytes for every 64: 6, 57 and 6 of them.
    """
    assert site_sizes(216, 3) == (6, 6, 6)
    weight = matrix(216, 216)
    cores = decompose(weight, *sites_of(weight, 3), 10)
    assert sum(core.numel() for core in cores) == core_numel(216, 216, 3, 10) == 72 * 10 + 36 * 100
    assert MpoPayload.of(cores, 16).nbytes(16) == MpoPayload.of(cores, 16).nbytes(32) == 8640
    assert MpoPayload.of(cores, 4).nbytes(16) == 4320 / 2 + 4 * (6 + 57 + 6)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_payload_serves_what_it_stores(bits: int) -> None:
    weight = matrix(dtype=torch.float32)
    cores = decompose(weight, *sites_of(weight, 3), 8)
    payload = MpoPayload.of(cores, bits)
    check_payload(payload, payload.decode(), 16)
    error = float((payload.decode() - contract(cores)).norm() / weight.norm())
    assert error < {16: 1e-3, 8: 0.02, 4: 0.3}[bits]


@pytest.mark.parametrize(("sites", "chi"), [(2, 6), (3, 9)])
def test_numbers_of_another_implementation(sites: int, chi: int) -> None:
    """Made by ``decompose_matrix_to_mpo`` and ``mpo_to_matrix`` of smarthi/compactifAI; the authors have released no code."""
    weight, expected = matrix(48, 90, seed=4, dtype=torch.float32), NUMBERS[f"mpo{sites}"]
    outs, ins = sites_of(weight, sites)
    cores = decompose(weight, outs, ins, chi)
    assert [list(outs), list(ins)] == [expected["outs"], expected["ins"]]
    assert sum(core.numel() for core in cores) == expected["params"]
    assert contract(cores)[:3, :4].numpy() == pytest.approx(np.array(expected["corner"]), abs=2e-5)
    assert float(contract(cores).norm()) == pytest.approx(expected["norm"], rel=1e-5)


def test_a_chain_larger_than_its_matrix_is_not_stored() -> None:
    """Trap: whole bonds take more than the matrix. In 4 bits a larger chain still pays."""
    weight = matrix(dtype=torch.float32)
    size = core_numel(24, 36, 2, 30)
    assert 24 * 36 < size < 4 * 24 * 36
    assert isinstance(CompactifAi(chi=30).encode(weight), DensePayload)
    assert isinstance(CompactifAi(chi=30, core_bits=4).encode(weight), MpoPayload)
    assert isinstance(CompactifAi(chi=8).encode(weight), MpoPayload)


def test_reported_parameters_are_those_of_the_chains() -> None:
    """(f), those of whole matrices included; the plan's ratio is theirs."""
    model = WeightProbe().model
    method = CompactifAi(chi=12, heal_steps=0)
    prepared = method.calibrate(model, context(), 0)
    by_hand = sum(min(v.numel, core_numel(v.rows, v.cols, 2, 12)) for v in linear_views(model))
    with method.apply(model, prepared):
        found = method.footprint(model, context())
    assert found["stored_params"] == by_hand
    assert found["compressed_params"] / by_hand == pytest.approx(method.axes(model.info).ratio)
    assert found["ratio"] == pytest.approx(method.axes(model.info).ratio), "at 16 bits bytes go as parameters"


def test_sensitivity_is_the_loss_of_one_cut_alone() -> None:
    """Brute force: serve every matrix but one as it is."""
    model = llama()
    views = linear_views(model)
    forms = CompactifAi(chi=2).forms(views, None, 0)
    batches = list(model.calibration(None, 6, 5))
    found = sensitivities(model, views, forms, _units(views, MATRIX), batches)
    dense = calibration_loss(model, batches)
    for number in (0, 3, len(views) - 1):
        with replaceable(model, [views[number].parameter]):
            views[number].write(forms[number].payload().decode())
            assert found[number] == pytest.approx(calibration_loss(model, batches) - dense, abs=1e-6)
    assert calibration_loss(model, batches) == dense


def test_the_most_sensitive_are_spared_while_they_fit() -> None:
    views = linear_views(llama())
    matrices = _units(views, MATRIX)
    losses = [float(number) for number in range(len(views))]
    last_two = sum(view.numel for view in views[-2:]) / sum(view.numel for view in views)
    assert most_sensitive(views, matrices, losses, last_two) == {view.name for view in views[-2:]}
    assert most_sensitive(views, matrices, losses, last_two * 0.99) == {views[-1].name}
    assert most_sensitive(views, _units(views, BLOCK), None, 0.5) == {view.name for view in views if view.layer == 0}
    assert not most_sensitive(views, matrices, losses, 0.0)
    assert len(most_sensitive(views, matrices, losses, 1.0)) == len(views)


def test_what_is_spared_is_served_as_it_was() -> None:
    model = llama()
    method = CompactifAi(chi=2, spared=0.5, heal_steps=2)
    before = {view.name: view.weight().clone() for view in linear_views(model)}
    with method.apply(model, method.calibrate(model, context(), 0)):
        same = {view.name for view in linear_views(model) if torch.equal(view.weight(), before[view.name])}
    assert same == {view.name for view in linear_views(model) if view.layer == 0}


def test_measured_sensitivities_are_traced() -> None:
    model = llama()
    method = build("compactifai", {"chi": 2, "spared": 0.4, "spare_by": "block", "n_profile": 4, "heal_steps": 0})
    trace = method.trace(method.calibrate(model, context(), 0))  # type: ignore[attr-defined]
    assert len(trace["sensitivity"]) == 2
    assert all(math.isfinite(value) for value in trace["sensitivity"])


def test_healing_wins_back_most_of_what_the_cuts_cost() -> None:
    """On a trained model: the loss on training text falls by more than half of the way to the uncompressed one."""
    model = trained_decoder()
    batches = list(model.calibration(context(), 32, 77))
    found = []
    for steps in (0, 60):
        method = CompactifAi(chi=10, heal_steps=steps, heal_lr=3e-3, heal_batch=16)
        with method.apply(model, method.calibrate(model, context(), 0)):
            found.append(calibration_loss(model, batches))
    dense = calibration_loss(model, batches)
    assert found[1] - dense < 0.5 * (found[0] - dense)
