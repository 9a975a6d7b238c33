"""MC-MoE over transformers' classes of mixtures: their experts are rounded as a loop over experts does it; the rest is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from weight_cases import context

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.experts.odp import Odp
from isoflop.methods.weights.artefact import Artefact
from isoflop.methods.weights.expert_grid import swept
from isoflop.methods.weights.mc_moe import McMoe
from isoflop.methods.weights.mixture_probe import SHAPE, mixture_of
from isoflop.methods.weights.obs import Curvature
from isoflop.methods.weights.views import linear_views
from isoflop.models.hooks.experts import routers_of
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel

PLAIN: dict[str, Any] = {
    **SHAPE, "num_hidden_layers": 2, "intermediate_size": 32, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**PLAIN, num_local_experts=4),
    "qwen2-moe": lambda: Qwen2MoeConfig(**PLAIN),
    "qwen2-moe, four of six": lambda: Qwen2MoeConfig(**{**PLAIN, "num_experts": 6, "num_experts_per_tok": 4}),
    "qwen3-moe": lambda: Qwen3MoeConfig(**PLAIN, norm_topk_prob=True),
    "qwen3-moe, first layer dense": lambda: Qwen3MoeConfig(**PLAIN, mlp_only_layers=[0]),
}
METHOD = McMoe(bits=2.0, group=32, n_calib=6)


@cache
def compressed(name: str) -> tuple[LmModel, Artefact]:
    model = mixture_of(CONFIGS[name]())
    return model, METHOD.calibrate(model, context(), 0)


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest) -> tuple[LmModel, Artefact]:
    return compressed(request.param)


def first_mixture(model: LmModel) -> tuple[int, Any]:
    layer = min(routers_of(model.decoder))
    return layer, model.decoder.layers[layer].mlp


def entering(model: LmModel, layer: int, batch: Any) -> Tensor:
    """Hidden states (S, d) that enter a layer's mixture."""
    seen: list[Tensor] = []
    block = model.decoder.layers[layer].mlp
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model.logits(batch)
    handle.remove()
    return seen[0]


def gated(x_NI: Tensor, first_OI: Tensor) -> Tensor:
    gate, up = (x_NI @ first_OI.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def test_every_expert_is_stored_and_routers_are_not(case: tuple[LmModel, Artefact]) -> None:
    model, artefact = case
    names = {view.name for view in linear_views(model)}
    assert set(artefact.names) == names
    experts = {name for name in names if name.endswith("]")}
    count = model.info.geometry["experts"]
    assert len(experts) == 2 * count * len(routers_of(model.decoder))
    assert not any("gate.weight" in name or name.endswith((".gate", "shared_expert_gate")) for name in names)


@torch.no_grad()
def test_a_served_block_is_the_loop_over_experts_as_they_are_stored(case: tuple[LmModel, Artefact]) -> None:
    model, artefact = case
    layer, block = first_mixture(model)
    x_Sd = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    payload = {view.name: artefact[view.name].decode() for view in linear_views(model) if view.layer == layer}
    with METHOD.apply(model, artefact):
        found_Sd = block(x_Sd[None])[0]
    _, weights_Sk, chosen_Sk = routers_of(model.decoder)[layer](x_Sd)
    expected_Sd = torch.zeros_like(x_Sd)
    for token in range(len(x_Sd)):
        for expert, weight in zip(chosen_Sk[token].tolist(), weights_Sk[token].tolist(), strict=True):
            first, second = (
                next(w for name, w in payload.items() if name.endswith(f"mlp.experts.{part}[{expert}]"))
                for part in ("gate_up_proj", "down_proj")
            )
            expected_Sd[token] += weight * (gated(x_Sd[token : token + 1], first) @ second.T)[0]
    if hasattr(block, "shared_expert"):
        gate, up, down = (
            next(w for name, w in payload.items() if name.endswith(f"shared_expert.{part}_proj"))
            for part in ("gate", "up", "down")
        )
        shared_Sd = (F.silu(x_Sd @ gate.T) * (x_Sd @ up.T)) @ down.T
        expected_Sd += torch.sigmoid(block.shared_expert_gate(x_Sd)) * shared_Sd
    torch.testing.assert_close(found_Sd, expected_Sd, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [name for name in CONFIGS if "dense" not in name], indirect=True)
@torch.no_grad()
def test_rounding_is_a_sweep_of_each_expert_on_its_own_tokens(case: tuple[LmModel, Artefact]) -> None:
    """In the first layer, whose inputs nothing before it has changed. A code may fall on either side of a tie."""
    model, artefact = case
    from isoflop.methods.weights.statistics import calibration_seed

    batches = list(model.calibration(context(), METHOD.n_calib, calibration_seed(0)))
    x_Sd = torch.cat([entering(model, 0, batch) for batch in batches])
    chosen_Sk = routers_of(model.decoder)[0](x_Sd)[2]
    widths = set()
    for expert in range(model.info.geometry["experts"]):
        tokens_NI = x_Sd[(chosen_Sk == expert).any(-1)]
        first, second = (
            next(v for v in linear_views(model) if v.layer == 0 and v.expert == expert and v.role == role)
            for role in ("gate_up_proj", "down_proj")
        )
        bits = round((artefact[first.name].nbytes(32) - first.numel / 32 * 4) * 8 / first.numel)
        widths.add(bits)
        for view, inputs in ((first, tokens_NI), (second, gated(tokens_NI, first.weight()))):
            hessian = (inputs.T @ inputs).double().float()
            expected = swept(view.weight(), Curvature.of(hessian, METHOD.damp), bits, METHOD.group).decode()
            found = artefact[view.name].decode()
            assert float((found == expected).float().mean()) > 0.97
            errors = [float(((w - view.weight()) @ inputs.T).square().sum()) for w in (found, expected)]
            assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert widths <= {1, 2, 3}
    assert {2, 3} <= widths


@torch.no_grad()
def test_odp_prunes_what_sends_tokens_to_two_and_refuses_the_rest_in_a_line(case: tuple[LmModel, Artefact]) -> None:
    """Weights that a router does not make sum to 1 stay what they are."""
    model, artefact = case
    method = Odp(n_calib=4, protect=0.1)
    if model.info.geometry["experts_per_token"] != 2:
        with pytest.raises(
            Infeasible, match=r"^method odp: .* sends a token to 4 experts; allowed: 2 experts per token$"
        ):
            method.check(model.info)
        return
    ratios = method.calibrate(model, context(), 0)
    ids_BT = torch.arange(60).view(2, 30) * 5 % 48
    batch = LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED))
    seen: list[Tensor] = []
    experts = first_mixture(model)[1].experts
    with METHOD.apply(model, artefact), method.apply(model, ratios):
        handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
        model.logits(batch)
        handle.remove()
        active = method.footprint(model, context())["active_experts"]
    alone_S = seen[0][(seen[0] == 0).any(-1)].sum(-1)
    assert 1 < active < 2
    router = routers_of(model.decoder)[first_mixture(model)[0]]
    if getattr(router, "norm_topk_prob", True):
        assert bool((alone_S == 1).all())
    else:
        assert bool((alone_S < 1).all())


def test_other_models_are_refused_at_plan_in_a_line(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from isoflop.models.family import family_of

    for name, config in {
        "llama": LlamaConfig(**SHAPE, num_hidden_layers=1, intermediate_size=32),
        "mixtral": MixtralConfig(**PLAIN, num_local_experts=4),
    }.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        ref = f"hf:{tmp_path / name}"
        info = family_of(ref).info(ref, {})
        if name == "llama":
            for method in ("mc-moe", "odp"):
                with pytest.raises(
                    Infeasible, match=f"^method {method}: model .* is no mixture of experts; allowed: "
                ) as refused:
                    build(method, {}).check(info)
                assert "\n" not in str(refused.value)
        else:
            build("mc-moe", {}).check(info)
            build("odp", {}).check(info)
            assert info.geometry["experts"] == 4
            assert info.geometry["experts_per_token"] == 2
