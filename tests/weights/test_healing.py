"""Methods whose stored forms are trained: what every one of them must do, whatever its forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from weight_cases import Bare, context, gpt2, llama, mixtral

from isoflop.core.errors import Infeasible
from isoflop.methods.base import METHODS, build
from isoflop.methods.own_weights import trained
from isoflop.methods.weights.healing import Form, Forms, Healed, HealedMethod, HealedStage, Whole
from isoflop.methods.weights.probe import WeightProbe, check_payload
from isoflop.methods.weights.statistics import ViewStats
from isoflop.methods.weights.svd import Factors
from isoflop.methods.weights.views import linear_views, replaceable
from isoflop.models.family import family_of
from isoflop.models.training.loop import Keeper

HEALED: dict[str, dict[str, Any]] = {
    "svd": {},
    "compactifai": {"chi": 8},
    "aqlm": {"code_bits": 4, "group": 4, "codebooks": 1, "rounds": 2, "steps": 3, "n_calib": 4},
    "obert": {"sparsity": 0.5, "grads": 3, "grad_batch": 2, "damp": 1e-4, "block": 8, "prunings": 2},
    "lr2vq": {"m": 4, "k": 16, "rank": 2, "pretrain_steps": 1},
}
"""Small enough for the models of these tests."""
SHAPES = [(1, 64), (8, 1), (1, 1), (5, 13), (24, 130)]


def method_of(name: str, **knobs: Any) -> HealedMethod:
    method = build(name, {"heal_steps": 2, "heal_batch": 2, **HEALED[name], **knobs})
    assert isinstance(method, HealedMethod)
    return method


def inputs(cols: int) -> ViewStats:
    x_NI = torch.randn(3 * cols, cols, generator=torch.Generator().manual_seed(1))
    gram_II = x_NI.T @ x_NI
    norms_I = gram_II.diagonal().sqrt()
    return ViewStats(3 * cols, 2 / (3 * cols) * gram_II, norms_I, norms_I)


def test_the_walk_leaves_no_healed_method_out() -> None:
    wanted = {name for name in METHODS.own() if issubclass(METHODS.get(name), HealedMethod)}
    assert wanted == set(HEALED)


@pytest.mark.parametrize("name", HEALED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_shape_in_any_type(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    payload = method_of(name).encode(weight, inputs(shape[1]))
    served = payload.decode()
    check_payload(payload, served.to(dtype), 16)
    assert served.shape == shape
    assert payload.nbytes(16) <= 2 * weight.numel() + 64
    assert float((served - weight.float()).norm()) <= float(weight.float().norm()) + 1e-6


@pytest.mark.parametrize("name", HEALED)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_matrices_of_one_value_stay_what_they_are(name: str, value: float) -> None:
    weight = torch.full((24, 40), value)
    found = method_of(name).encode(weight, inputs(40)).decode()
    assert torch.allclose(found, weight, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("name", HEALED)
@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_every_architecture_serves_what_its_files_hold(name: str, make: Any, tmp_path: Path) -> None:
    """Bit for bit after saving and reading again; what lies outside the matrices learns nothing, and bytes are the payloads'."""
    model, method = make(), method_of(name)
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    healed = method.calibrate(model, context(), 0)
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in model.module.named_parameters())
    healed.save(tmp_path)
    again = Healed.load(tmp_path)
    assert again.losses == healed.losses
    assert len(healed.losses) == method.heal_steps + getattr(method, "pretrain_steps", 0)
    views = linear_views(model)
    with method.apply(model, again):
        for view in views:
            assert torch.equal(view.weight(), healed.artefact[view.name].decode().to(view.holder.dtype)), view.name
        stored = sum(healed.artefact[view.name].nbytes(16) for view in views)
        assert sum(model.stored.values()) == pytest.approx(stored)
        assert set(model.stored) == {view.parameter for view in views}
        assert method.footprint(model, context())["ratio"] == pytest.approx(
            2 * sum(view.numel for view in views) / stored
        )
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())


# The training


def halves(model: Bare) -> Forms:
    views = linear_views(model)
    return Forms(views, [Factors(v.weight()[:, :8].clone(), torch.eye(8, v.cols)) for v in views])


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_a_pass_on_forms_is_the_pass_of_the_model_with_their_weights(make: Any) -> None:
    """Transposed, fused and stacked matrices included; and every form learns from it."""
    model = make()
    forms, views = halves(model), linear_views(model)
    batch = next(iter(model.calibration(None, 3, 0)))
    with torch.enable_grad():
        logits, targets = forms.supervised(model, batch)
        F.cross_entropy(logits, targets).backward()
    with replaceable(model, sorted({view.parameter for view in views})):
        for view, form in zip(views, forms.forms, strict=True):
            assert isinstance(form, Form)
            view.write(form.weight())
        expected, _ = model.supervised(batch)
    assert torch.allclose(logits, expected, atol=1e-5)
    reached = [float(form.left_OK.grad.abs().max()) > 0 for form in forms.forms]  # type: ignore[union-attr]
    assert sum(reached) >= len(views) - 4, "experts that no token is routed to apart"


def test_whole_matrices_share_a_parameter_with_trained_ones() -> None:
    """Experts of one tensor, of which one is spared."""
    model = mixtral()
    views = linear_views(model)
    expert = next(view for view in views if view.expert == 0)
    forms = Forms(
        views,
        [Factors(v.weight()[:, :8].clone(), torch.eye(8, v.cols)) if v is expert else Whole(v.weight()) for v in views],
    )
    batch = next(iter(model.calibration(None, 3, 0)))
    logits, _ = forms.supervised(model, batch)
    with replaceable(model, [expert.parameter]):
        expert.write(forms.forms[views.index(expert)].weight())  # type: ignore[operator]
        assert torch.allclose(logits, model.supervised(batch)[0], atol=1e-6)
    assert sum(p.numel() for p in forms.parameters()) == 8 * (expert.rows + expert.cols)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_loss_is_the_models_own_and_the_divergence_from_it(share: float) -> None:
    model = llama()
    forms, batch = halves(model), next(iter(model.calibration(None, 3, 0)))
    logits, targets = forms.supervised(model, batch)
    dense, _ = model.supervised(batch)
    apart = (dense.softmax(-1) * (dense.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    expected = (1 - share) * F.cross_entropy(logits, targets) + share * apart
    found = method_of("svd", heal_kd=share).loss(model, forms, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_lessons_are_batches_of_training_examples() -> None:
    model = llama()
    method = method_of("svd", heal_steps=5, heal_batch=3)
    lessons = list(method.lessons(model, context(), 0))
    assert [len(lesson) for lesson in lessons] == [3] * 5
    assert len(torch.unique(torch.cat(lessons), dim=0)) == 15
    assert method.examples == 15


def test_a_training_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    model = llama()
    method = method_of("svd", heal_steps=6)
    expected = trained(method, model, context(), 0, None, halves(model))[0]
    keeper = Keeper(tmp_path, every=0.0)
    with pytest.raises(KeyboardInterrupt):
        trained(_killed_at(method, 4), model, context(), 0, keeper, halves(model))
    begun = halves(model)
    found, losses = trained(method, model, context(), 0, Keeper(tmp_path), begun)
    assert len(losses) == 6
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def _killed_at(method: HealedMethod, step: int) -> Any:
    class Killed(type(method)):  # type: ignore[misc]
        def lessons(self, *args: Any) -> Any:
            for number, lesson in enumerate(super().lessons(*args)):
                if number == step:
                    raise KeyboardInterrupt
                yield lesson

    return Killed(**method.knobs())


def test_where_nothing_can_learn_nothing_is_trained() -> None:
    model = llama()
    assert method_of("svd", keep=1.0).calibrate(model, context(), 0).losses == []


# The stage


def test_knobs_without_effect_change_no_stage() -> None:
    for name, knobs, idle in [
        ("svd", {"heal_steps": 0}, {"heal_lr": 0.1, "heal_batch": 3, "heal_kd": 0.5, "alpha": 1.0, "n_calib": 3}),
        ("svd", {"scaling": "svd-llm"}, {"alpha": 1.0}),
        ("svd", {"keep": 1.0}, {"scaling": "asvd", "heal_steps": 7}),
        ("lr2vq", {"heal_steps": 0}, {"assign": "ste", "tau": 1.0}),
        ("aqlm", {"rounds": 0}, {"beam": 4, "steps": 3, "lr": 0.1, "tolerance": 0.5, "n_calib": 3}),
        ("lr2vq", {"assign": "ste"}, {"tau": 1.0}),
        ("lr2vq", {"heal_steps": 0, "pretrain_steps": 0}, {"heal_lr": 0.1, "heal_batch": 3, "heal_kd": 0.5}),
        ("compactifai", {"spared": 0.0}, {"spare_by": "block", "n_profile": 3}),
        ("compactifai", {"spared": 0.5}, {"n_profile": 3}),
    ]:
        found = {build(name, chosen).relevant() for chosen in (knobs, {**knobs, **idle})}  # type: ignore[attr-defined]
        assert len(found) == 1, (name, knobs)


def test_a_stage_is_computed_saved_and_served(tmp_path: Path) -> None:
    """On files in half precision: trained in float32, bytes by the checkpoint's type."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from isoflop.models.worlds import recall_world

    config = LlamaConfig(
        vocab_size=recall_world.VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, isoflop={"vocabulary": recall_world.VOCABULARY},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    ref, ctx = f"hf:{tmp_path / 'model'}", context()
    family = family_of(ref)
    info = family.info(ref, {"dtype": "bfloat16"})
    model = family.load(info, None, ctx)
    for name in HEALED:
        method = method_of(name)
        stage = method.prepare(info, None, 0)
        assert isinstance(stage, HealedStage)
        healed = ctx.get(stage)
        with method.apply(model, healed):
            found = method.footprint(model, ctx)
            assert found["training_seconds"] > 0
            assert found["ratio"] > 1
            served: Tensor = linear_views(model)[0].weight()
            assert served.dtype == torch.bfloat16
        assert method.trace(healed)["loss"] == healed.losses


def test_a_model_without_a_loss_is_refused_where_one_is_trained_on() -> None:
    class Silent(type(WeightProbe().model.info)):  # type: ignore[misc]
        has_loss = False

    info = WeightProbe().model.info
    silent = Silent(**{name: getattr(info, name) for name in info.__dataclass_fields__})
    build("svd", {}).check(silent)
    for name, knobs in [
        ("svd", {"heal_steps": 5}),
        ("lr2vq", {"heal_steps": 0, "pretrain_steps": 5}),
        ("compactifai", {"spared": 0.5, "spare_by": "block", "heal_steps": 0}),
    ]:
        with pytest.raises(Infeasible, match=f"method {name} with .* no head that predicts tokens; allowed"):
            build(name, knobs).check(silent)
