"""Where the masks sit and what is counted: architectures, padding, FLOPs, what a task notes, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sparsity_cases import observe, sequences, under
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.methods.activation_sparsity.base import Sparsity
from isoflop.methods.activation_sparsity.probe import ActivationProbe
from isoflop.methods.activation_sparsity.rules import nonzero, top_of_each, units_kept
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.hooks.experts import EXPERTS
from isoflop.models.hooks.feed_forward import FEED_FORWARD, mlps_of
from isoflop.models.lm import LmBatch, LmModel
from isoflop.tasks.base import TASKS
from isoflop.tasks.language_task import LanguageTask

PLAIN: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 80,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**PLAIN), 3),
    "phi3": (Phi3ForCausalLM, Phi3Config(**PLAIN), 3),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**PLAIN, hidden_act="relu"), 2),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_inner=80, activation_function="relu", bos_token_id=None, eos_token_id=None), 2),
    "opt": (OPTForCausalLM, OPTConfig(**{**PLAIN, "pad_token_id": 1}, ffn_dim=80, word_embed_proj_dim=32), 2),
}  # fmt: skip


def untrained(cls: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).eval().requires_grad_(False)


def model_of(name: str) -> LmModel:
    cls, config, _ = ARCHITECTURES[name]
    probe = ActivationProbe()
    return LmModel(dataclasses.replace(probe.model.info, ref=f"hf:{name}"), untrained(cls, config))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_blocks_of_an_architecture_are_found(name: str) -> None:
    model = model_of(name)
    mlps = mlps_of(model.decoder)
    assert [mlp.layer for mlp in mlps] == [0, 1]
    assert [tuple(mlp.out_Fd().shape) for mlp in mlps] == [(80, 32)] * 2
    assert mlps[0].weights_per_neuron == ARCHITECTURES[name][2] * 32
    assert mlps[0].act is not None


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_exact_zeros_cost_nothing_and_change_nothing(name: str, sparsity_ctx: FolderContext) -> None:
    model, batch = model_of(name), LmBatch(torch.arange(12).view(2, 6) + 2, torch.full((2, 6), -100))
    with torch.no_grad():
        dense = model.logits(batch)
    method = build("mlp-exact-zero", {})
    with method.apply(model, None), torch.no_grad():
        assert torch.equal(model.logits(batch), dense)
        observe(model)
        active = method.footprint(model, sparsity_ctx)["activation_ratio"]
    if model.module.config.model_type in ("llama", "phi3"):  # SiLU has no zeros
        assert active == 1.0
    else:
        assert 0.2 < active < 0.8


def experts() -> Any:
    return untrained(MixtralForCausalLM, MixtralConfig(**PLAIN, num_local_experts=2, num_key_value_heads=2))


def test_a_checkpoint_offers_the_hook_where_its_blocks_are_found(tmp_path: Path) -> None:
    modules = {"opt": untrained(*ARCHITECTURES["opt"][:2]), "mixtral": experts()}
    offered = {}
    for name, module in modules.items():
        module.save_pretrained(tmp_path / name)
        offered[name] = family_of("hf:x").info(f"hf:{tmp_path / name}", {}).hooks
    assert FEED_FORWARD in offered["opt"]
    assert FEED_FORWARD not in offered["mixtral"]
    assert EXPERTS in offered["mixtral"]


def test_experts_are_refused() -> None:
    module = experts()
    model = LmModel(ActivationProbe().model.info, module)
    assert mlps_of(model.decoder) == []
    with (
        pytest.raises(Infeasible, match="does not have one feed-forward block"),
        build("mlp-topk", {}).apply(model, None),
    ):
        pass


def test_a_model_takes_one_of_these_methods() -> None:
    probe = ActivationProbe()
    taken, second = build("mlp-topk", {}), build("mlp-exact-zero", {})
    with (
        taken.apply(probe.model, None),
        pytest.raises(Infeasible, match="feed_forward is taken already; a trial has one method there"),
        second.apply(probe.model, None),
    ):
        pass


def test_top_k_keeps_the_largest_of_every_token() -> None:
    score = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0)).abs()
    score[0, 0, 4:] = 0.0
    kept = top_of_each(score, 6)
    for row, mask in zip(score.flatten(0, 1), kept.flatten(0, 1), strict=True):
        best = {int(k) for k in np.argsort(-row.numpy(), kind="stable")[:6] if row[k] > 0}
        assert set(mask.nonzero().flatten().tolist()) == best
    assert torch.equal(nonzero(score), score > 0)
    assert [units_kept(share, 17) for share in (0.01, 0.35, 1.0)] == [1, 6, 17]


@pytest.mark.parametrize("score", ["gate", "value"])
def test_the_gate_is_the_output_of_the_activation_function(score: str) -> None:
    model, batch = model_of("llama"), LmBatch(torch.arange(6)[None], torch.full((1, 6), -100))
    mlp = model.decoder.layers[0].mlp
    seen: dict[str, torch.Tensor] = {}
    handles = [
        mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0])),
        mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.update(a=args[0])),
    ]
    with torch.no_grad(), build("mlp-topk", {"active": 0.25, "score": score}).apply(model, None):
        model.logits(batch)
        gate = torch.nn.functional.silu(mlp.gate_proj(seen["x"]))
        value = gate * mlp.up_proj(seen["x"])
        for handle in handles:
            handle.remove()
        mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.update(left=args[0]))
        model.logits(batch)
    expected = torch.where(top_of_each((gate if score == "gate" else value).abs(), 20), value, 0.0)
    assert torch.allclose(seen["left"], expected)
    assert torch.allclose(seen["a"], value)


def test_padding_is_not_counted() -> None:
    probe = ActivationProbe()
    model, batch = probe.model, sequences(probe.model, count=2, length=20)
    rules = [lambda a, gate: a.abs() > 0.05] * 2
    _, alone = under(model, rules, LmBatch(batch.ids_BT[1:, 8:], batch.targets_BT[1:, 8:]))
    valid_BT = torch.ones(2, 20, dtype=torch.bool)
    valid_BT[1, :8] = False
    padded = Sparsity(model, mlps_of(model.decoder), rules)
    with padded.at_work(None), torch.no_grad():
        model.logits(LmBatch(batch.ids_BT, batch.targets_BT, 0, valid_BT))
    _, first = under(model, rules, LmBatch(batch.ids_BT[:1], batch.targets_BT[:1]))
    rows = padded.observed()["activation_ratio"].tolist()
    assert rows == pytest.approx([first.active_share(), alone.active_share()], abs=2e-3)
    assert padded.active_share() == pytest.approx((20 * rows[0] + 12 * rows[1]) / 32, abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dense_flops_are_those_that_torch_counts(name: str, sparsity_ctx: FolderContext) -> None:
    model, batch = model_of(name), LmBatch(torch.arange(6)[None], torch.full((1, 6), -100))
    method = build("mlp-topk", {"active": 0.25})
    with method.apply(model, None), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model.logits(batch)
        observe(model)
        costs = method.footprint(model, sparsity_ctx)
    counted = sum(
        sum(flops.values()) for path, flops in counter.get_flop_counts().items() if path.endswith(("0.mlp", "1.mlp"))
    )
    assert costs["mlp_flops_dense"] * 6 == counted
    assert costs["activation_ratio"] == 0.25
    assert (costs["ratio"], costs["mlp_flops"]) == (4.0, costs["mlp_flops_dense"] / 4)


def test_a_task_notes_the_share_of_every_example(relu_lm: LmModel, sparsity_ctx: FolderContext) -> None:
    task = TASKS.get("bits-per-byte")(examples=6, tokens=32, prefix=0.0, shard=4)
    assert isinstance(task, LanguageTask)
    method = build("mlp-exact-zero", {})
    with method.apply(relu_lm, None):
        shards = list(task.evaluate(relu_lm, sparsity_ctx, 0))
        costs = task.measure(relu_lm, sparsity_ctx)
        found = method.footprint(relu_lm, sparsity_ctx)
    assert [len(shard.metrics["activation_ratio"]) for shard in shards] == [4, 2]
    shares = np.concatenate([shard.metrics["activation_ratio"] for shard in shards])
    assert found["activation_ratio"] == pytest.approx(
        shares.mean(), rel=1e-9
    )  # of the examples, not of what is measured
    assert len(set(shares.tolist())) > 1
    assert costs["train_tokens"] == 64 * 8 * 64
    assert (costs["width"], costs["layers"]) == (32, 2)
    plain = list(task.evaluate(relu_lm, sparsity_ctx, 0))
    assert "activation_ratio" not in plain[0].metrics
    assert [s.errors.tolist() for s in plain] == [s.errors.tolist() for s in shards]


def test_a_model_without_text_is_refused_before_it_runs() -> None:
    info = dataclasses.replace(ActivationProbe().model.info, text=None)
    with pytest.raises(Infeasible, match="method mlp-fat: model probe/llama has neither a tokenizer"):
        build("mlp-fat", {}).check(info)
    build("mlp-topk", {}).check(info)


def test_calibrated_methods_want_their_thresholds() -> None:
    probe = ActivationProbe()
    with pytest.raises(ValueError, match="is calibrated"), build("sparsing-law", {}).apply(probe.model, None):
        pass
    with pytest.raises(ValueError, match="is not applied"):
        build("mlp-fat", {}).footprint(probe.model, probe.ctx)
