"""CPTQuant: three scores by brute force, allocations, and what is served (arXiv 2412.03599)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from weight_cases import Bare, context, gpt2, llama

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.methods.base import build
from isoflop.methods.weights.cptquant import LEAST_SHARE, CptQuant
from isoflop.methods.weights.level_bank import calibration_loss
from isoflop.methods.weights.probe import WeightProbe
from isoflop.methods.weights.sensitivity import (
    Sensitivity,
    blocks_of,
    correlation_scores,
    first_correlation,
    in_groups,
    mean_states,
    perturbation_scores,
    principal_directions,
    pruning_scores,
)
from isoflop.methods.weights.tensor_grid import TensorGridPayload
from isoflop.methods.weights.views import linear_views
from isoflop.models.family import family_of


def draws(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, cols)))


def correlation(one: Tensor, other: Tensor) -> float:
    return first_correlation(principal_directions(one), principal_directions(other))


def test_states_and_any_invertible_map_of_them_correlate_fully() -> None:
    """(a), also with an offset; states that have nothing to do with each other hardly correlate."""
    states, mixing = draws(2000, 8), draws(8, 8, 1)
    assert correlation(states, states @ mixing + 3.0) == pytest.approx(1, abs=1e-4)
    assert correlation(states, draws(2000, 8, 2)) < 0.2


def test_one_component_is_the_best_pair_of_directions() -> None:
    """Brute force: the least squares of the best direction, refined alternately, as in NIPALS."""
    one, shared = draws(600, 5), draws(600, 1, 1)
    other = torch.cat((0.6 * shared + 0.4 * draws(600, 1, 2), draws(600, 3, 3)), 1)
    one[:, :1] += shared
    a, b = (x - x.mean(0) for x in (one, other))
    direction = b[:, :1]
    for _ in range(200):
        direction = a @ torch.linalg.lstsq(a, direction).solution
        direction = b @ torch.linalg.lstsq(b, direction / direction.norm()).solution
    pair = a @ torch.linalg.lstsq(a, direction).solution
    brute = float((pair * direction).sum() / (pair.norm() * direction.norm()))
    assert correlation(one, other) == pytest.approx(brute, abs=1e-6)


def test_correlations_of_the_released_code() -> None:
    """As ``compute_layer_sensitivity`` of amitashnanda/Mixed_Precision_Quantization has them from scikit-learn.

    Which iterates, and stops too early where two pairs of directions correlate almost alike; here one stands out.
    """
    from sklearn.cross_decomposition import CCA

    one, other = draws(400, 6), draws(400, 5, 1)
    other[:, :1] += 2 * one[:, 1:2]
    a_N1, b_N1 = CCA(n_components=1).fit(one.numpy(), other.numpy()).transform(one.numpy(), other.numpy())
    released = float(np.corrcoef(a_N1.T, b_N1.T)[0, 1])
    assert correlation(one, other) == pytest.approx(released, abs=1e-3)


def test_scaling_a_layers_states_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """(b)."""
    model = llama()
    batches = list(model.calibration(None, 60, 0))
    views = linear_views(model)
    plain = correlation_scores(model, views, batches)
    states = mean_states(model, views, batches)
    scaled = [states[0], states[1] * 50.0, *states[2:]]
    monkeypatch.setattr("isoflop.methods.weights.sensitivity.mean_states", lambda *_: scaled)
    assert correlation_scores(model, views, batches) == pytest.approx(plain, abs=1e-9)


def test_states_are_those_of_the_model_and_padding_stays_out() -> None:
    model = llama()
    ids = next(iter(model.calibration(None, 3, 0)))
    expected = model.module(input_ids=ids, output_hidden_states=True).hidden_states
    found = mean_states(model, linear_views(model), [ids])
    for place in range(2):  # the last is normed there
        assert torch.allclose(found[place].float(), expected[place].mean(1), atol=1e-6)


def test_padding_stays_out_of_mean_states() -> None:
    probe = WeightProbe(layers=2)
    batch = next(iter(probe.model.calibration(probe.ctx, 2, 0)))
    tokens = batch.ids_BT.shape[1]
    valid_BT = torch.stack([torch.arange(tokens) >= start for start in (3, tokens // 2)])
    padded = replace(batch, valid_BT=valid_BT)
    given: list[Tensor] = []
    handle = probe.model.decoder_layers[0].register_forward_hook(lambda _m, _a, output: given.append(output))
    with torch.no_grad():
        probe.model.supervised(padded)
    handle.remove()
    states_BTd = given[0][0] if isinstance(given[0], tuple) else given[0]
    expected = torch.stack([states_BTd[row, valid_BT[row]].mean(0) for row in range(2)])
    assert torch.allclose(mean_states(probe.model, linear_views(probe.model), [padded])[1].float(), expected, atol=1e-5)


def test_cmpq_is_one_minus_the_mean_correlation_with_all_other_layers() -> None:
    model = llama()
    batches, views = list(model.calibration(None, 60, 0)), linear_views(model)
    states = mean_states(model, views, batches)
    pairs = {(i, j): correlation(states[i], states[j]) for i, j in product(range(3), range(3))}
    expected = {layer - 1: 1 - sum(pairs[layer, j] for j in range(3) if j != layer) / 2 for layer in (1, 2)}
    assert correlation_scores(model, views, batches) == pytest.approx(expected)


def rise(model: Bare, layer: int, batches: list[Any], change: Any) -> float:
    """The loss behind a change to every parameter of a layer, less the loss before."""
    before = calibration_loss(model, batches)
    block = model.module.get_submodule(blocks_of(linear_views(model))[layer])
    kept = {name: p.clone() for name, p in block.named_parameters()}
    for p in block.parameters():
        p.data.copy_(change(p.data))
    after = calibration_loss(model, batches)
    block.load_state_dict(kept, strict=False)
    return after - before


def smallest_gone(p: Tensor) -> Tensor:
    flat = p.flatten().clone()
    flat[flat.abs().argsort(stable=True)[: int(0.3 * flat.numel() + 1e-9)]] = 0
    return flat.view(p.shape)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_pmpq_prunes_every_parameter_of_one_layer(make: Any) -> None:
    model = make()
    batches, views = list(model.calibration(None, 4, 0)), linear_views(model)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    found = pruning_scores(model, views, batches, 0.3)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert found == pytest.approx({layer: rise(model, layer, batches, smallest_gone) for layer in (0, 1)}, abs=1e-5)
    assert pruning_scores(model, views, batches, 0.0) == pytest.approx({0: 0.0, 1: 0.0}, abs=1e-7)


def test_tdmpq_is_the_mean_change_of_the_loss_in_either_direction() -> None:
    model = llama()
    batches, views = list(model.calibration(None, 4, 0)), linear_views(model)
    expected: dict[int, list[float]] = {0: [], 1: []}
    for number in range(3):
        generator = torch.Generator().manual_seed(derive_seed("cptquant noise", number, 7))

        def noisy(p: Tensor, generator: torch.Generator = generator) -> Tensor:
            return p + 0.2 * p.square().mean().sqrt() * torch.randn(p.shape, generator=generator)

        for layer in (0, 1):
            expected[layer].append(abs(rise(model, layer, batches, noisy)))
    found = perturbation_scores(model, views, batches, 0.2, 3, 7)
    assert found == pytest.approx({layer: sum(rises) / 3 for layer, rises in expected.items()}, abs=1e-5)


def test_a_layer_that_does_nothing_scores_nothing() -> None:
    """The second layer's outputs never reach the stream: no pruning and no noise of its matrices moves the loss."""
    model = llama()
    block = model.module.model.layers[1]  # type: ignore[union-attr, index]
    for part in (block.self_attn.o_proj, block.mlp.down_proj):  # type: ignore[union-attr]
        nn.init.zeros_(part.weight)  # type: ignore[arg-type]
    batches, views = list(model.calibration(None, 4, 0)), linear_views(model)
    for found in (pruning_scores(model, views, batches, 0.3), perturbation_scores(model, views, batches, 0.1, 2, 0)):
        assert found[1] == 0
        assert abs(found[0]) > 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_clusters_by_brute_force(seed: int) -> None:
    """(c): every assignment to three groups is tried; the most sensitive group gets the most bits."""
    scores = np.random.default_rng(seed).exponential(size=7).tolist()

    def spread(groups: tuple[int, ...]) -> float:
        parts = [[s for s, g in zip(scores, groups, strict=True) if g == number] for number in range(3)]
        return math.inf if not all(parts) else sum(float(np.var(part)) * len(part) for part in parts)

    best = min(product(range(3), repeat=7), key=spread)
    found = in_groups(scores, 3)
    assert spread(tuple(found)) == pytest.approx(spread(best))
    widths = CptQuant(allocation="clusters").allocated(dict(enumerate(scores)), dict.fromkeys(range(7), 10))
    for i, j in product(range(7), range(7)):
        assert scores[i] <= scores[j] or widths[i] >= widths[j]
    assert set(widths.values()) == {8, 4, 2}


@pytest.mark.parametrize("menu", ["16/8/4", "8/4/2", "4/3/2"])
@pytest.mark.parametrize("spare", [0.0, 0.9, 2.3])
def test_dp_by_brute_force(menu: str, spare: float) -> None:
    scores = dict(enumerate([0.3, -0.1, 0.8, 0.3, 0.5]))
    sizes = dict(enumerate([10, 30, 5, 25, 10]))
    method = CptQuant(menu=menu, bits=min(CptQuant(menu=menu).widths) + spare)
    floor = LEAST_SHARE * 0.9

    def loss(widths: tuple[int, ...]) -> float:
        return sum((scores[i] + 0.1 + floor) * sizes[i] * 4.0**-width for i, width in enumerate(widths))

    def fits(widths: tuple[int, ...]) -> bool:
        return sum(sizes[i] * width for i, width in enumerate(widths)) <= method.bits * 80 + 1e-9

    best = min(filter(fits, product(method.widths, repeat=5)), key=loss)
    found = method.allocated(scores, sizes)
    assert fits(tuple(found.values()))
    assert loss(tuple(found.values())) == pytest.approx(loss(best))


def test_among_layers_of_one_size_more_sensitive_ones_never_get_fewer_bits() -> None:
    scores = dict(enumerate(np.random.default_rng(3).normal(size=12).tolist()))
    for bits in (2.0, 3.0, 4.5, 7.9):
        widths = CptQuant(bits=bits).allocated(scores, dict.fromkeys(scores, 5))
        for i, j in product(scores, scores):
            assert scores[i] <= scores[j] or widths[i] >= widths[j]


def test_equal_scores_share_the_bits_evenly() -> None:
    widths = CptQuant(menu="4/3/2", bits=3.5).allocated(dict.fromkeys(range(6), 1.0), dict.fromkeys(range(6), 8))
    assert sorted(widths.values()) == [3, 3, 3, 4, 4, 4]


def test_rounding_errs_by_half_a_step_at_most() -> None:
    """(d), and bytes by hand: 3-bit codes of 20 x 30 weights in one row of 225 bytes, and one grid of 4."""
    weight = draws(20, 30).float()
    payload = TensorGridPayload.round(weight, 3)
    step = (weight.max() - weight.min()) / 7
    assert float((payload.decode() - weight).abs().max()) <= float(step) / 2 * 1.002
    assert len(payload.decode().unique()) <= 8
    assert payload.nbytes(16) == len(payload.serialise()) == 225 + 4


def test_all_layers_at_16_bits_change_nothing() -> None:
    """(e)."""
    model = llama()
    batch = next(iter(model.calibration(None, 3, 0)))
    dense, _ = model.supervised(batch)
    method = build("cptquant", {"menu": "16/8/4", "bits": 16.0, "n_calib": 30})
    with method.apply(model, method.calibrate(model, context(), 0)):  # type: ignore[attr-defined]
        assert torch.equal(model.supervised(batch)[0], dense)
        assert model.weight_bytes() == model.dense_weight_bytes()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_bits_are_those_of_matrices_that_the_forward_pass_uses(make: Any) -> None:
    """(f): each layer's matrices have no more values than its width allows, and the model computes with just these."""
    model = make()
    method = CptQuant(bits=5.0, n_calib=30)
    scores = Sensitivity({0: 0.01, 1: 0.9})
    batch = next(iter(model.calibration(None, 3, 0)))
    dense, _ = model.supervised(batch)
    stored = 0.0
    with method.apply(model, scores):
        for view in linear_views(model):
            width = {0: 2, 1: 8}[view.layer]
            assert len(view.weight().unique()) <= 2**width
            assert len(view.weight().unique()) > 2 ** (width - 1) or width == 8
            stored += math.ceil(view.numel * width / 8) + 4
        assert method.footprint(model, context())["bits"] == pytest.approx(
            8 * stored / sum(v.numel for v in linear_views(model))
        )
        assert not torch.allclose(model.supervised(batch)[0], dense, atol=1e-3)


def test_one_scoring_serves_every_mean_and_menu() -> None:
    family = family_of("tiny-lm/text-d64")
    info = family.info("tiny-lm/text-d64", {})
    weights = family.weights(info, (), 0)

    def key(**knobs: Any) -> str:
        stage = build("cptquant", knobs).prepare(info, weights, 0)
        assert stage is not None
        return stage.key

    assert key() == key(bits=6.0, menu="16/8/4", allocation="clusters", group=64, sigma=0.5, probe_sparsity=0.1)
    assert key(scorer="pmpq") == key(scorer="pmpq", sigma=0.5, draws=9) != key(scorer="pmpq", probe_sparsity=0.1)
    assert key(scorer="alone") != key(scorer="alone", menu="4/3/2")
    assert len({key(scorer=scorer) for scorer in ("cmpq", "pmpq", "tdmpq", "alone", "random", "uniform")}) == 6


@pytest.mark.parametrize(("knobs", "message"), [
    ({"menu": "16/8/4", "bits": 3.0}, r"bits = 3 is less than the narrowest of menu = 16/8/4; allowed: bits from 4"),
    ({"scorer": "uniform", "allocation": "clusters"}, r"scorer = uniform .* allocation = clusters; allowed: dp"),
])  # fmt: skip
def test_what_cannot_work_is_refused_at_plan(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(Infeasible, match=message):
        build("cptquant", knobs).check(WeightProbe().model.info)


def test_scores_are_kept(tmp_path: Path) -> None:
    scores = Sensitivity({0: 0.25, 11: -1.5})
    scores.save(tmp_path)
    assert Sensitivity.load(tmp_path) == scores
    assert CptQuant().trace(scores) == {"sensitivity": [0.25, -1.5]}


def test_random_scores_depend_on_the_seed_alone() -> None:
    model, method = llama(), CptQuant(scorer="random")
    first, again, other = (method.calibrate(model, context(), seed) for seed in (0, 0, 1))
    assert first == again != other
