"""Calibration statistics against what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from weight_cases import context, gpt2, llama, mixtral

from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.statistics import CalibrationStage, Statistics, collect
from isoflop.methods.weights.views import LinearView, linear_views, observed
from isoflop.models.family import family_of


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_statistics_are_those_of_the_inputs(make: object, tmp_path: Path) -> None:
    model = make()  # type: ignore[operator]
    views = linear_views(model)
    inputs: dict[str, list[Tensor]] = {}

    def observe(view: LinearView, x: Tensor) -> None:
        inputs.setdefault(view.name, []).append(x.clone())

    with observed(views, observe):
        for batch in model.calibration(None, 6, 5):
            model.supervised(batch)
    collect(model, context(), 6, 5).save(tmp_path)
    statistics = Statistics.load(tmp_path)
    for view in views:
        stats = statistics.of(view)
        x_NI = torch.cat([x.flatten(0, -2) for x in inputs[view.name]]).double()
        assert stats.tokens == len(x_NI)
        assert torch.allclose(stats.hessian_II.double(), 2 / len(x_NI) * x_NI.T @ x_NI, rtol=1e-4, atol=1e-5)
        assert torch.allclose(stats.norms_I.double(), x_NI.norm(dim=0), rtol=1e-4, atol=1e-5)
        samples = [s.double() for x in inputs[view.name] for s in (x if x.dim() == 3 else [x])]
        assert torch.allclose(stats.scales_I.double(), torch.stack([s.norm(dim=0) for s in samples]).mean(0), rtol=1e-4)
        assert stats.means_I is not None
        assert stats.maxima_I is not None
        assert torch.allclose(stats.means_I.double(), x_NI.abs().mean(0), rtol=1e-4, atol=1e-6)
        assert torch.equal(stats.maxima_I, x_NI.abs().amax(0).float())


def test_what_older_versions_calibrated_is_read_and_keeps_its_key(tmp_path: Path) -> None:
    """They kept no magnitudes; a stage that asks for them is another one."""
    from safetensors.torch import load_file, save_file

    collect(llama(), context(), 2, 0).save(tmp_path)
    file = tmp_path / "statistics-0.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.endswith(("/means", "/maxima"))}, file)
    stats = Statistics.load(tmp_path).of(linear_views(llama())[0])
    assert stats.means_I is None
    assert stats.maxima_I is None
    info = family_of("tiny-lm/text-d64").info("tiny-lm/text-d64", {})
    source = OnModel.source(info, family_of("tiny-lm/text-d64").weights(info, (), 0), 0)
    plain, more = (CalibrationStage(**source, n_calib=8, sizes=sizes) for sizes in (False, True))
    assert "sizes" not in plain.spec()
    assert plain.key != more.key


def test_matrices_with_one_input_share_one_hessian(tmp_path: Path) -> None:
    model = llama()
    statistics = collect(model, context(), 2, 0)
    assert len(set(statistics.owner.values())) == 2 * 4, "qkv, o, gate and up, down"
    statistics.save(tmp_path)
    owners = {name.rsplit(".", 1)[1] for name in statistics.owner.values()}
    assert owners == {"q_proj", "o_proj", "gate_proj", "down_proj"}


def test_an_expert_without_tokens_has_zeros() -> None:
    model = mixtral(experts=4, tokens_per=1)
    for layer in model.module.model.layers:  # type: ignore[union-attr]
        layer.mlp.gate.weight.zero_()  # type: ignore[union-attr]
        layer.mlp.gate.weight[0] = 1.0  # type: ignore[union-attr, index]
    statistics = collect(model, context(), 2, 0)
    counts = {v.name: statistics.of(v).tokens for v in linear_views(model) if v.role == "down_proj" and v.layer == 0}
    assert sum(counts.values()) == 2 * 24
    idle = next(view for view in linear_views(model) if counts.get(view.name) == 0)
    assert not statistics.of(idle).hessian_II.any()
