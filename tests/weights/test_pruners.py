"""Magnitude, Wanda, SparseGPT, RTN and GPTQ as comparisons of compressors use them (arXiv 2310.01382)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weight_cases import context, gpt2, held_out_loss, llama, mixtral, trained_decoder

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import knob_specs
from isoflop.methods.base import METHODS, build
from isoflop.methods.weights.base import CalibratedMethod, MatrixCodecMethod
from isoflop.methods.weights.magnitude import Magnitude
from isoflop.methods.weights.probe import WeightProbe
from isoflop.methods.weights.rules import keep_highest
from isoflop.methods.weights.sparse import Pruner
from isoflop.methods.weights.statistics import ViewStats, collect
from isoflop.methods.weights.views import linear_views
from isoflop.methods.weights.wanda import Wanda
from isoflop.models.base import Model

NAMES = ("rtn", "gptq", "magnitude", "wanda", "sparsegpt")


def prepared(method: object, model: Model) -> object:
    return method.calibrate(model, context(), 0) if isinstance(method, CalibratedMethod) else None


def matrix(rows: int = 12, cols: int = 32) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def with_norms(norms: Tensor) -> ViewStats:
    return ViewStats(10, torch.diag(norms**2), norms, norms)


@pytest.mark.parametrize(("name", "knobs"), [
    ("rtn", {"bits": 16}), ("gptq", {"bits": 16}), ("magnitude", {"sparsity": 0.0}), ("wanda", {"sparsity": 0.0}),
    ("sparsegpt", {"sparsity": 0.0}),
])  # fmt: skip
def test_nothing_compressed_gives_the_same_generations(name: str, knobs: dict[str, float]) -> None:
    """27 (a)."""
    model = llama()
    ids = torch.arange(8)[None]
    dense = model.module.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    method = build(name, {**knobs, **({"n_calib": 2} if name in ("gptq", "wanda", "sparsegpt") else {})})
    with method.apply(model, prepared(method, model)):
        assert torch.equal(model.module.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0), dense)
        assert model.weight_bytes() == model.dense_weight_bytes()


def test_magnitude_and_wanda_coincide_when_inputs_are_alike_and_rows_are_compared() -> None:
    """27 (b), and that neither condition can be left out."""
    weight = matrix()
    alike, unlike = with_norms(torch.full((32,), 3.0)), with_norms(torch.linspace(0.1, 5, 32))
    by_row = Magnitude(compare="row").encode(weight).decode()
    assert torch.equal(Wanda().encode(weight, alike).decode(), by_row)
    assert not torch.equal(Wanda().encode(weight, unlike).decode(), by_row)
    assert not torch.equal(Magnitude(compare="matrix").encode(weight).decode(), by_row)


def test_wanda_follows_its_score() -> None:
    weight, stats = matrix(), with_norms(torch.linspace(0.1, 5, 32))
    kept = Wanda(sparsity=0.75).encode(weight, stats).decode() != 0
    score = weight.abs() * stats.norms_I
    for row in range(12):
        assert set(kept[row].nonzero().flatten().tolist()) == set(score[row].topk(8).indices.tolist())


@pytest.mark.parametrize(
    "knobs", [{"sparsity": 0.5}, {"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": 0.25, "compare": "matrix"}]
)
def test_wanda_prunes_by_magnitude_where_no_input_was_seen(knobs: dict[str, Any]) -> None:
    weight, unseen = matrix(), ViewStats(0, torch.zeros(32, 32), torch.zeros(32), torch.zeros(32))
    by_magnitude = Magnitude(**{"compare": "row", **knobs}).encode(weight).decode()
    assert torch.equal(Wanda(**knobs).encode(weight, unseen).decode(), by_magnitude)


def test_wanda_prunes_dead_inputs_first_and_the_smallest_of_them_before_others() -> None:
    weight, norms = matrix(), torch.ones(32)
    norms[:20] = 0
    kept = Wanda(sparsity=0.5).encode(weight, with_norms(norms)).decode() != 0
    assert bool(kept[:, 20:].all())
    for row in range(12):
        assert set(kept[row, :20].nonzero().flatten().tolist()) == set(weight[row, :20].abs().topk(4).indices.tolist())


def test_wanda_prunes_an_expert_that_saw_nothing_by_magnitude() -> None:
    model = mixtral()
    for layer in model.module.model.layers:  # all scores equal: the first experts are chosen, the last see nothing
        layer.mlp.gate.weight.data.zero_()
    stats = collect(model, context(), 4, 0)
    views = [v for v in linear_views(model) if v.expert is not None]
    unseen = [v for v in views if stats.of(v).tokens == 0]
    assert 0 < len(unseen) < len(views)
    for view in unseen:
        expected = Magnitude(compare="row").encode(view.weight()).decode()
        assert torch.equal(Wanda().encode(view.weight(), stats.of(view)).decode(), expected)


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.booleans())
def test_sparsity_is_exact_also_with_ties(rows: int, cols: int, sparsity: float, by_row: bool) -> None:
    """27, trap (v)."""
    keep = keep_highest(torch.ones(rows, cols), sparsity, by_row)
    removed = int(sparsity * cols + 1e-9) * rows if by_row else int(sparsity * rows * cols + 1e-9)
    assert int((~keep).sum()) == removed


PRUNERS = sorted(name for name in METHODS.own() if issubclass(METHODS.get(name), Pruner))


def test_pruners_are_met_here() -> None:
    """Every method that sets weights to zero, whoever adds one, offers the patterns that hardware knows."""
    assert {"magnitude", "wanda", "sparsegpt"} <= set(PRUNERS)
    for name in PRUNERS:
        assert {"2:4", "4:8"} <= set(knob_specs(METHODS.get(name))["pattern"].knob.choices or ())


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize(("pattern", "bits"), [("1:2", 8 + 0.5), ("2:4", 8 + 1.0), ("4:8", 8 + 1.5)])
@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_patterns_hold_along_the_inputs(name: str, pattern: str, bits: float, make: object) -> None:
    """27 (c); GPT-2 stores its matrices the other way round (trap vi), experts stack them.

    Half of the 16-bit weights are kept, each with its place among M in log2 M bits: half a bit, one bit, one and a half per weight.
    """
    model = make()  # type: ignore[operator]
    n, m = (int(part) for part in pattern.split(":"))
    method = build(name, {"pattern": pattern, **({} if name == "magnitude" else {"n_calib": 2})})
    with method.apply(model, prepared(method, model)):
        for view in linear_views(model):
            groups = view.weight().unflatten(1, (-1, m))
            assert bool(((groups != 0).sum(-1) == n).all()), view.name
        assert method.footprint(model, context())["bits"] == pytest.approx(bits)


def test_a_pattern_with_another_sparsity_is_refused() -> None:
    """27, trap (iv)."""
    info = WeightProbe().model.info
    with pytest.raises(Infeasible, match=r"sparsity = 0\.2 does not fit pattern = 2:4.*allowed: sparsity 0\.5"):
        build("magnitude", {"sparsity": 0.2, "pattern": "2:4"}).check(info)


def test_a_pattern_that_does_not_divide_the_inputs_is_refused() -> None:
    info = replace(WeightProbe().model.info, geometry={"matrices": ((8, 12, 1),)})
    with pytest.raises(Infeasible, match=r"pattern = 4:8 needs inputs in multiples of 8.*12.*unstructured, 1:2, 2:4$"):
        build("wanda", {"pattern": "4:8"}).check(info)


def test_a_tied_head_is_neither_compressed_nor_counted_twice() -> None:
    """27, trap (vii)."""
    model = gpt2()
    dense = model.dense_weight_bytes()
    assert dense == 2 * sum(p.numel() for p in {id(p): p for p in model.module.parameters()}.values())
    views = linear_views(model)
    embedding = model.module.get_input_embeddings().weight.clone()  # type: ignore[operator]
    method = build("rtn", {"bits": 4, "group": 32})
    with method.apply(model, None):
        assert torch.equal(model.module.get_output_embeddings().weight, embedding)  # type: ignore[operator]
        saved = sum(view.numel for view in views) * (16 - 5) / 8
        assert model.weight_bytes() == pytest.approx(dense - saved)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_bytes_are_those_of_the_payloads(name: str, make: object) -> None:
    """Also where a parameter holds several matrices; the footprint's two ratios agree with the bytes."""
    model = make()  # type: ignore[operator]
    method = build(name, {} if name in ("rtn", "magnitude") else {"n_calib": 2})
    assert isinstance(method, MatrixCodecMethod)
    artefact = prepared(method, model) or method.encode_model(model)
    dense_views = sum(view.numel for view in linear_views(model)) * 2
    dense = model.dense_weight_bytes()
    with method.apply(model, artefact):
        stored = sum(artefact[view.name].nbytes(16) for view in linear_views(model))  # type: ignore[index]
        assert model.weight_bytes() == pytest.approx(dense - dense_views + stored)
        costs = method.footprint(model, context())
        for view in linear_views(model):
            assert torch.equal(view.weight(), artefact[view.name].decode()), "served is what is stored"  # type: ignore[index]
    assert costs["ratio"] == pytest.approx(dense_views / stored)
    assert costs["bits"] == pytest.approx(8 * stored / (dense_views / 2))
    assert costs["model_ratio"] == pytest.approx(dense / (dense - dense_views + stored))


def test_bits_of_quantisers_and_pruners() -> None:
    model = WeightProbe().model
    for name, knobs, bits in [
        ("rtn", {"bits": 3, "group": 32}, 3 + 32 / 32),
        ("rtn", {"bits": 4, "group": 16}, 4 + 32 / 16),
        ("magnitude", {"sparsity": 0.75}, 16 * 0.25 + 1),
        ("magnitude", {"pattern": "2:4"}, 9.0),
        ("magnitude", {"sparsity": 0.02}, 16.0),
    ]:
        method = build(name, knobs)
        with method.apply(model, None):
            assert method.footprint(model, context())["bits"] == pytest.approx(bits), (name, knobs)


def test_two_weight_methods_are_refused() -> None:
    model = llama()
    first, second = build("rtn", {}), build("magnitude", {})
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    with (
        pytest.raises(Infeasible, match="matrices is taken already; a trial has one method there"),
        first.apply(model, None),
        second.apply(model, None),
    ):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert not model.stored


def test_the_calibrated_methods_lose_less_on_a_trained_model() -> None:
    """GPTQ against rounding, and SparseGPT against Wanda and magnitude, on held-out sequences."""
    model = trained_decoder()
    loss = {}
    for name, knobs in [
        ("rtn", {"bits": 2}), ("gptq", {"bits": 2, "n_calib": 64}), ("magnitude", {"sparsity": 0.7}),
        ("wanda", {"sparsity": 0.7, "n_calib": 64}), ("sparsegpt", {"sparsity": 0.7, "n_calib": 64, "mask_block": 16}),
    ]:  # fmt: skip
        method = build(name, knobs)
        with method.apply(model, prepared(method, model)):
            loss[name] = held_out_loss(model)
    dense = held_out_loss(model)
    assert dense < loss["gptq"] < loss["rtn"]
    assert dense < loss["sparsegpt"] < min(loss["wanda"], loss["magnitude"])
