"""Low-rank adapters: merged and beside the weights they are the same, their numbers and FLOPs by hand, and the names of projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from repair_cases import Bench, asked, off, texts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.repair.lora import Lora, LowRank, LowRanks
from isoflop.models.checkpoints.decoder import decoder_geometry
from isoflop.models.checkpoints.lm import hooks_of
from isoflop.models.counting import flops_of
from isoflop.models.decoder_model import decoder_of
from isoflop.models.family import family_of
from isoflop.models.lm import LmInfo, LmModel
from isoflop.testing.snapshot import Snapshot

COMPRESSIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rtn", {"bits": 3, "group": 32}),
    ("magnitude", {"sparsity": 0.5}),
)


def lora(**knobs: Any) -> Lora:
    method = build("lora", {"rank": 3, "steps": 3, "batch": 2, **knobs})
    assert isinstance(method, Lora)
    return method


@torch.no_grad()
def filled(method: Lora, info: LmInfo, seed: int = 0) -> LowRanks:
    """Adapters of which neither factor is zero."""
    module, rng = method.untrained(info, seed), torch.Generator().manual_seed(seed)
    assert isinstance(module, LowRanks)
    for parameter in module.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return module.requires_grad_(False)


def product(module: LowRanks, layer: int, target: str) -> Tensor:
    """B A."""
    part = module.parts[f"{layer}_{target}"]
    assert isinstance(part, LowRank)
    return part.b_Or @ part.a_rI


@torch.no_grad()
@pytest.mark.parametrize("targets", ["q", "qv", "qkvo"])
def test_adapters_are_what_they_are_merged_into_the_weights(targets: str, bench: Bench) -> None:
    """W + alpha / r B A (Hu et al. 2021, equation 3), behind compressed weights as behind whole ones, padded and step by step."""
    method, batch, steps = lora(targets=targets, alpha=6.0), asked(texts(), 9, (0, 3, 5)), asked(texts(), 9)
    module, found = filled(method, bench.lm.info), []
    for compression in (None, *COMPRESSIONS):
        with bench.applied(*[compression] if compression else []):
            bare = bench.lm.logits(batch)
            with method.apply(bench.lm, module):
                found = [bench.lm.logits(batch)]
                with build("full-cache", {}).apply(bench.lm, None):
                    found += [bench.lm.logits(batch), bench.lm.stepwise_logits(steps)]
            places = [
                (layer, getattr(layer.self_attn, f"{target}_proj").weight, target)
                for layer in bench.lm.decoder_layers
                for target in targets
            ]
            before = [weight.clone() for _, weight, _ in places]
            numbers = [n for n in range(len(bench.lm.decoder_layers)) for _ in targets]
            for number, (_, weight, target) in zip(numbers, places, strict=True):
                weight += 6.0 / 3 * product(module, number, target)
            merged = [bench.lm.logits(batch)] * 2 + [bench.lm.logits(steps)]
            for (_, weight, _), held in zip(places, before, strict=True):
                weight.copy_(held)
        real_BT = batch.valid_BT
        assert real_BT is not None
        for x, y, where in zip(found, merged, (real_BT, real_BT, torch.ones_like(real_BT)), strict=True):
            assert off(x[where], y[where]) < 1e-4
        assert off(found[0][real_BT], bare[real_BT]) > 0.01


@torch.no_grad()
def test_untrained_adapters_change_nothing(bench: Bench) -> None:
    """B is zero."""
    method, batch = lora(steps=0, targets="qkvo"), asked(texts())
    with bench.applied(COMPRESSIONS[0]):
        bare = bench.lm.logits(batch)
        with method.apply(bench.lm, method.untrained(bench.lm.info, 0)):
            assert torch.equal(bench.lm.logits(batch), bare)


def test_nothing_but_the_adapters_learns(bench: Bench) -> None:
    before = Snapshot(bench.lm)
    with bench.applied(COMPRESSIONS[1]):
        module, losses = bench.learn("lora", targets="qkvo", steps=4, batch=2, lr=0.01)
    before.compare(bench.lm)
    assert all(parameter.grad is None for parameter in bench.lm.module.parameters())
    drawn = lora(targets="qkvo", rank=2).untrained(bench.lm.info, 0)
    assert drawn is not None
    for (name, now), was in zip(module.named_parameters(), drawn.parameters(), strict=True):
        assert not torch.equal(now, was), name
    assert len(losses) == 4


@torch.no_grad()
def test_numbers_bytes_and_flops_by_hand(bench: Bench) -> None:
    """2 layers; queries 64 by 64, values 32 by 64; 3 ranks: 3 (64 + 64 + 64 + 32) a layer, twice that in operations per token."""
    method, batch = lora(), asked(texts(1, 16))
    module = filled(method, bench.lm.info)
    bare, _ = flops_of(lambda: bench.lm.logits(batch))
    with method.apply(bench.lm, module):
        found, _ = flops_of(lambda: bench.lm.logits(batch))
        costs = method.footprint(bench.lm, bench.ctx)
        held = bench.lm.served_bytes() - bench.lm.dense_weight_bytes()
    numbers = 2 * 3 * (64 + 64 + 64 + 32)
    assert costs["method_params"] == numbers
    assert costs["method_bytes"] == held == 2 * numbers
    assert found - bare == 2 * numbers * 16


@pytest.mark.parametrize("member", ["text-d64", "text-d128", "recall-d128x4"])
def test_as_many_numbers_as_a_prompt_at_every_width(member: str) -> None:
    """Of queries alone 2 r layers for each number of the width: r = n / (2 layers)."""
    info = family_of(f"tiny-lm/{member}").info(f"tiny-lm/{member}", {})
    assert info.geometry["layers"] == 4
    prompt, adapters = build("compress-then-prompt", {"tokens": 16}), build("lora", {"targets": "q", "rank": 2})
    numbers = [sum(p.numel() for p in method.untrained(info, 0).parameters()) for method in (prompt, adapters)]  # type: ignore[union-attr]
    assert numbers[0] == numbers[1] == 16 * info.geometry["width"]


def other(config: Any) -> LmModel:
    """A small checkpoint's decoder with weights that attend unevenly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for weight in module.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.2)
    with torch.device("meta"):
        decoder = decoder_of(AutoModelForCausalLM.from_config(config))
    info = LmInfo(
        ref="hf:x", family="hf", version="1", n_params=1, hooks=hooks_of(decoder, reads_text=False),
        geometry={**decoder_geometry("hf:x", decoder, type(module).__name__), "positions": 64}, text=None,
    )  # fmt: skip
    return LmModel(info, module)


@torch.no_grad()
@pytest.mark.parametrize("target", ["q", "k", "v", "o"])
@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_projections_side_by_side_in_one_matrix(kind: str, target: str) -> None:
    """GPT-2 has queries, keys and values in one matrix that is stored transposed, Phi-3 with fewer keys."""
    small = {"vocab_size": 48, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    lm = other(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **small)
        if kind == "gpt2"
        else Phi3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **small)
    )  # fmt: skip
    method, batch = lora(targets="qkvo", alpha=3.0), asked(texts(2, 12))
    module = filled(method, lm.info)
    for name, part in module.parts.items():
        assert isinstance(part, LowRank)
        if not name.endswith(target):
            part.b_Or.zero_()
    bare = lm.logits(batch)
    with method.apply(lm, module):
        found = lm.logits(batch)
    for number, layer in enumerate(lm.decoder_layers):
        if kind == "gpt2":
            fused, out, sizes = layer.attn.c_attn.weight.T, layer.attn.c_proj.weight.T, (32, 32, 32)
        else:
            fused, out, sizes = layer.self_attn.qkv_proj.weight, layer.self_attn.o_proj.weight, (32, 16, 16)
        rows = dict(zip("qkv", fused.split(sizes), strict=True)) | {"o": out}
        rows[target] += product(module, number, target)
    assert off(found, lm.logits(batch)) < 1e-4
    assert off(found, bare) > 0.01


def test_a_projection_of_an_unknown_name_is_refused_in_one_line(bench: Bench) -> None:
    method, info = lora(), bench.lm.info
    wide = replace(info, geometry={**info.geometry, "heads": 8})
    lm = LmModel(wide, bench.lm.module)
    with (
        pytest.raises(
            Infeasible, match="layer 0 of model probe/llama has no projection q under a known name"
        ) as refused,
        method.apply(lm, method.untrained(wide, 0)),
    ):
        pass
    assert "\n" not in str(refused.value)
