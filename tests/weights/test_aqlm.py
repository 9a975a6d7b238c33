"""AQLM (arXiv 2401.06118): additive codebooks against the released search and fit, and against every code there is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from weight_cases import context, held_out_loss, llama, trained_decoder

from isoflop.methods.weights.additive import Additive, fit, search
from isoflop.methods.weights.aqlm import Aqlm
from isoflop.methods.weights.codebooks import CodebookPayload
from isoflop.methods.weights.healing import Forms
from isoflop.methods.weights.payloads import DensePayload
from isoflop.methods.weights.probe import WeightProbe
from isoflop.methods.weights.statistics import ViewStats
from isoflop.methods.weights.views import linear_views

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "aqlm.json").read_text())
ROWS, COLS, GROUP, ENTRIES, TABLES = 6, 20, 4, 8, 2


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def weight() -> Tensor:
    return drawn(ROWS, COLS, seed=1)


def gram() -> Tensor:
    x = drawn(64, COLS, seed=2) * torch.linspace(0.2, 2, COLS)
    return x.T @ x / 64


def beginning() -> Additive:
    codes = torch.randint(0, ENTRIES, (ROWS, COLS // GROUP, TABLES), generator=torch.Generator().manual_seed(4))
    return Additive((ROWS, COLS), codes, drawn(TABLES, ENTRIES, GROUP, seed=3) * 0.3, weight().norm(dim=1) + 1e-9)


def errors(form: Additive, target: Tensor, gram_II: Tensor) -> Tensor:
    apart = (form.weight() - target).detach().double()
    return torch.stack([row @ gram_II.double() @ row for row in apart])


@pytest.mark.parametrize("beam", [1, 4])
def test_codes_of_the_released_search(beam: int) -> None:
    """Made by ``beam_search_optimal_codes`` (src/beam_search_xtx.py) of Vahe1994/AQLM, with nothing shuffled."""
    form, expected = beginning(), NUMBERS[f"beam {beam}"]
    losses = search(form, weight(), gram(), beam)
    assert form.codes_ONM.flatten().tolist() == expected["codes"]
    assert float(losses.sum()) == pytest.approx(expected["loss"], rel=1e-5)


def test_numbers_of_the_released_fit() -> None:
    """Made by ``AQEngine.quantize`` of Vahe1994/AQLM from these codes and tables: two rounds of ten steps and a search of 2 beams."""
    form, expected = beginning(), NUMBERS["engine"]
    fit(form, weight(), gram(), rounds=2, steps=10, lr=1e-3, beam=2, tolerance=-1.0, generator=None)
    assert form.codes_ONM.flatten().tolist() == expected["codes"]
    assert form.weight()[:3, :4].tolist() == [pytest.approx(row, abs=1e-4) for row in expected["corner"]]
    assert form.loss(weight(), gram()).item() == pytest.approx(expected["loss"], rel=1e-4)


def test_reported_errors_are_those_of_the_codes() -> None:
    for beam in (1, 3):
        form = beginning()
        losses = search(form, weight(), gram(), beam, torch.Generator().manual_seed(7))
        assert torch.allclose(losses.double(), errors(form, weight(), gram()), rtol=1e-4)


def test_a_search_makes_no_row_worse() -> None:
    form = beginning()
    before = errors(form, weight(), gram())
    for _ in range(3):
        search(form, weight(), gram(), 1)
        now = errors(form, weight(), gram())
        assert bool((now <= before * (1 + 1e-5)).all())
        before = now


def test_enough_beams_find_the_best_of_all_codes() -> None:
    """Brute force over 8² codes of a group of its own."""
    target, inner = drawn(5, GROUP, seed=8), gram()[:GROUP, :GROUP]
    scales = target.norm(dim=1)
    form = Additive((5, GROUP), torch.zeros(5, 1, 2, dtype=torch.long), drawn(2, ENTRIES, GROUP, seed=9) * 0.5, scales)
    search(form, target, inner, ENTRIES)
    best = []
    for row in range(5):
        found = {}
        for first, second in itertools.product(range(ENTRIES), repeat=2):
            apart = target[row] - scales[row] * (form.tables_MKG[0, first] + form.tables_MKG[1, second])
            found[first, second] = (apart @ inner @ apart).item()
        best.append(list(min(found, key=found.__getitem__)))
    assert form.codes_ONM[:, 0].tolist() == best


def test_more_beams_find_lower_errors() -> None:
    losses = [float(search(beginning(), weight(), gram(), beam).sum()) for beam in (1, 4, 16)]
    assert losses[2] < losses[1] < losses[0]


def test_the_loss_is_the_outputs_squared_error() -> None:
    x, form = drawn(64, COLS, seed=2), beginning()
    apart = x @ (form.weight() - weight()).T
    assert form.loss(weight(), x.T @ x / 64).item() == pytest.approx(apart.square().mean().item(), rel=1e-4)


def test_tables_begin_as_clusters_of_what_is_left() -> None:
    """Each further table lowers the error; rows have norm 1 before, whatever their size."""
    target = drawn(40, 24, seed=5) * torch.logspace(-2, 2, 40)[:, None]
    left = []
    for tables in (1, 2, 3):
        form = Additive.begun(target, tables, 16, 4, torch.Generator().manual_seed(0))
        left.append(((form.weight() - target).norm(dim=1) / target.norm(dim=1)).max().item())
        assert torch.allclose(form.scales_O, target.norm(dim=1))
    assert left == sorted(left, reverse=True)
    assert left[2] < 0.5


def test_a_group_that_reaches_beyond_the_inputs() -> None:
    """What fills it is no input: the fit is that of the inputs that are there."""
    target, inner = weight()[:, :18], gram()[:18, :18]
    form = Additive.begun(target, 2, 8, 4, torch.Generator().manual_seed(0))
    before = errors(form, target, inner).sum()
    fit(form, target, inner, rounds=2, steps=20, lr=1e-3, beam=2, tolerance=0.0, generator=None)
    assert form.weight().shape == (ROWS, 18)
    assert errors(form, target, inner).sum() < 0.9 * before


def test_rounds_end_when_one_gains_little() -> None:
    settings = {"steps": 5, "lr": 1e-4, "beam": 1, "generator": None}
    losses = fit(beginning(), weight(), gram(), rounds=50, tolerance=0.05, **settings)  # type: ignore[arg-type]
    assert 2 < len(losses) < 50
    assert losses[-1] > 0.95 * losses[-2]
    assert all(b <= 0.95 * a for a, b in itertools.pairwise(losses[:-1]))
    assert len(fit(beginning(), weight(), gram(), rounds=3, tolerance=0.0, **settings)) == 3  # type: ignore[arg-type]


def test_bytes_by_hand() -> None:
    """64x96 in groups of 8: 768 groups. Two tables of 16 entries: 2·768·4 bits, 2·16·8 and 64 numbers of 2 bytes."""
    seen = ViewStats(0, torch.zeros(96, 96), torch.zeros(96), torch.zeros(96))
    payload = Aqlm(code_bits=4, rounds=1, steps=1).encode(drawn(64, 96, seed=1), seen)
    assert isinstance(payload, CodebookPayload)
    assert payload.nbytes(16) == payload.nbytes(32) == 768 + 2 * (256 + 64)
    assert isinstance(Aqlm(code_bits=12).encode(drawn(16, 32, seed=1), seen), DensePayload), (
        "tables outweigh the matrix"
    )


def test_plans_count_tables_and_scales() -> None:
    model = WeightProbe().model
    method = Aqlm(code_bits=4, rounds=0, heal_steps=0)
    with method.apply(model, method.calibrate(model, context(), 0)):
        assert method.footprint(model, context())["bits"] == pytest.approx(method.axes(model.info).bits)


def test_healing_leaves_the_codes_and_moves_tables_and_scales() -> None:
    model = llama()
    views = linear_views(model)
    method = Aqlm(code_bits=4, group=4, rounds=0, heal_steps=3, heal_batch=2)
    forms = [form for form in method.forms(views, None, 0) if isinstance(form, Additive)]
    assert len(forms) == len(views)
    before = [(f.codes_ONM.clone(), f.tables_MKG.detach().clone(), f.scales_O.detach().clone()) for f in forms]
    method.heal(model, context(), Forms(views, forms), 0, None)
    for form, (codes, tables, scales) in zip(forms, before, strict=True):
        assert torch.equal(form.codes_ONM, codes)
        assert not torch.equal(form.tables_MKG, tables)
        assert not torch.equal(form.scales_O, scales)


def test_fitting_loses_less_than_clusters_on_a_trained_model() -> None:
    model, loss = trained_decoder(), {}
    for rounds in (0, 4):
        method = Aqlm(code_bits=6, group=8, rounds=rounds, steps=20, lr=1e-3, beam=2, n_calib=64, heal_steps=0)
        with method.apply(model, method.calibrate(model, context(), 0)):
            loss[rounds] = held_out_loss(model)
    dense = held_out_loss(model)
    assert dense < loss[4]
    assert loss[4] - dense < 0.8 * (loss[0] - dense)
