"""Compress-then-prompt: the released loss, what learns and what does not, equal scored tokens, costs by hand, and transfer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from repair_cases import Bench, asked, off, texts, trial

from isoflop.core.errors import Infeasible, UserError
from isoflop.jobs.job import ResolvedJob
from isoflop.jobs.runner import Runner
from isoflop.methods.base import build
from isoflop.methods.kv_cache.probe import untrained_decoder
from isoflop.methods.own_weights import trained
from isoflop.methods.repair.base import RepairMethod
from isoflop.methods.repair.compress_then_prompt import CompressThenPrompt
from isoflop.methods.repair.soft_prompts import SoftPrompt
from isoflop.methods.weights.payloads import GridPayload
from isoflop.methods.weights.smoothquant import input_rounding
from isoflop.models.counting import flops_of
from isoflop.models.lm import NOT_SCORED, LmModel
from isoflop.tasks.language_task import score
from isoflop.testing.snapshot import Snapshot, fingerprint

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "compress_then_prompt.json").read_text())
"""``loss_func`` of soft_prompt_learning.py and ``LLamaPromptTuningLM`` of prompt/model_llama.py, zirui-ray-liu/compress-then-prompt (commit
f15c334), on the probe's decoder with the first 5 embeddings for a prompt: the loss, every 7th entry of its gradient, and every 53rd
logit behind the prompt."""
N = 5
COMPRESSIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rtn", {"bits": 3, "group": 32}),
    ("magnitude", {"sparsity": 0.5}),
)
RTN3 = "rtn?bits=3&group=32"


def prompting(**knobs: Any) -> CompressThenPrompt:
    method = build("compress-then-prompt", {"tokens": N, "steps": 3, "batch": 2, **knobs})
    assert isinstance(method, CompressThenPrompt)
    return method


def released_texts() -> torch.Tensor:
    return torch.randint(0, 48, (3, 14), generator=torch.Generator().manual_seed(3))


def test_loss_gradient_and_logits_are_those_of_the_released_code(bench: Bench) -> None:
    method, batch = prompting(), asked(released_texts())
    module = method.drawn(bench.lm, bench.ctx, 0).requires_grad_(True)
    loss = method.loss(bench.lm, module, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert isinstance(module, SoftPrompt)
    assert module.embeds_Nd.grad is not None
    assert float(loss.detach()) == pytest.approx(NUMBERS["loss"], rel=1e-5)
    found_T = module.embeds_Nd.grad.flatten()[::7]
    torch.testing.assert_close(found_T, torch.tensor(NUMBERS["gradient"]), atol=1e-4, rtol=1e-4)
    with torch.no_grad(), method.apply(bench.lm, module):
        logits_BTW = bench.lm.logits(batch)
    torch.testing.assert_close(logits_BTW.flatten()[::53], torch.tensor(NUMBERS["logits"]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prompt_without_tokens_is_the_compressed_model_bit_for_bit(bench: Bench) -> None:
    """(a) of the card."""
    batch = asked(texts(), 8)
    for compression in COMPRESSIONS:
        with bench.applied(compression):
            expected = bench.lm.logits(batch)
            with bench.applied(
                ("compress-then-prompt", {"tokens": 0, "steps": 0}), learned=SoftPrompt(bench.lm.info, 0)
            ):
                assert torch.equal(bench.lm.logits(batch), expected)


def test_nothing_but_the_prompt_learns(bench: Bench) -> None:
    """(b): weights are the same afterwards, none has a gradient, and the prompt has moved; also with a head that is tied."""
    before = Snapshot(bench.lm)
    with bench.applied(COMPRESSIONS[0]):
        module, losses = bench.learn("compress-then-prompt", tokens=N, steps=3, batch=2, lr=0.01)
    before.compare(bench.lm)
    assert all(parameter.grad is None for parameter in bench.lm.module.parameters())
    moved_Nd = (module.embeds_Nd - bench.embeds(torch.arange(N))).abs()
    assert float(moved_Nd.min(1).values.max()) > 0
    assert bool((moved_Nd.amax(1) > 0.005).all()), "each token of the prompt"
    assert len(losses) == 3


def test_the_same_tokens_are_scored_with_and_without_it(bench: Bench) -> None:
    """(d)."""
    method, batch = prompting(), asked(texts(), 6, (0, 2, 4))
    module = method.drawn(bench.lm, bench.ctx, 0)
    bare, targets_S = bench.lm.supervised(batch)
    _, _, scored_B = score(bench.lm, batch)
    with method.apply(bench.lm, module):
        found, found_S = bench.lm.supervised(batch)
        assert (score(bench.lm, batch)[2] == scored_B).all()
    assert found.shape == bare.shape
    assert torch.equal(found_S, targets_S)
    assert len(targets_S) == int((batch.targets_BT != NOT_SCORED).sum())


def test_another_width_or_vocabulary_is_refused(bench: Bench) -> None:
    """(e); also of a model of the same sizes that reads other words."""
    method = prompting()
    module = method.drawn(bench.lm, bench.ctx, 0)
    info = bench.lm.info
    others = (
        replace(info, geometry={**info.geometry, "width": 96}),
        replace(info, geometry={**info.geometry, "vocab_size": 50}),
        replace(info, vocabulary="others"),
    )
    for other in others:
        lm = LmModel(other, bench.lm.module)
        with pytest.raises(Infeasible, match="of another width or vocabulary than probe/llama"):
            method.occupants(lm, module)
    method.occupants(LmModel(replace(info, n_params=1), bench.lm.module), module)


def test_a_training_lowers_the_loss_through_the_compressed_model(bench: Bench) -> None:
    """On one batch of texts again and again, behind each compression: by 38 and 41 % in 15 steps, 10 % asked for."""
    method, lesson = prompting(tokens=8), asked(texts(4, 24, seed=11))
    for compression in COMPRESSIONS:
        with bench.applied(compression):
            module = method.drawn(bench.lm, bench.ctx, 0).requires_grad_(True)
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.03, weight_decay=0.0)
            losses = []
            for _ in range(15):
                loss = method.loss(bench.lm, module, lesson)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("at", [0, 1])
def test_what_one_compression_has_taught_is_used_behind_another(at: int, bench: Bench) -> None:
    """The prompt is learned through the named weights and nothing else; at work it stands before the trial's own."""
    (name, knobs), other = COMPRESSIONS[at], COMPRESSIONS[1 - at]
    with bench.applied((name, knobs)):
        taught, _ = trained(prompting(), bench.lm, bench.ctx, 0)
    with bench.applied(other):
        own, _ = trained(prompting(), bench.lm, bench.ctx, 0)
    dense, _ = trained(prompting(), bench.lm, bench.ctx, 0)
    assert len({fingerprint(module) for module in (taught, own, dense)}) == 3
    with torch.no_grad(), bench.applied(other):
        weights = {name: parameter.clone() for name, parameter in bench.lm.module.named_parameters()}
    fresh = untrained_decoder()
    fresh.module.load_state_dict(weights)
    ids_BT = texts(2, 12, seed=8)
    embeds_BLd = torch.cat((taught.embeds_Nd.expand(2, -1, -1), bench.embeds(ids_BT)), dim=1)
    with torch.no_grad():
        expected = fresh.module(inputs_embeds=embeds_BLd, use_cache=False).logits[:, N:]
        transferred = (
            "compress-then-prompt",
            {"tokens": N, "learned_on": f"{name}?{'&'.join(f'{k}={v}' for k, v in knobs.items())}"},
        )
        with bench.applied(other, transferred, learned=taught):
            assert off(bench.lm.logits(asked(ids_BT)), expected) < 1e-4


def stage_of(*methods: tuple[str, dict[str, Any]], model: str = "tiny-lm/text-d64") -> Any:
    resolved = ResolvedJob.of(trial(*methods, model=model))
    return next(
        stage
        for method, stage in zip(resolved.methods, resolved.prepared, strict=True)
        if isinstance(method, RepairMethod)
    )


def test_one_training_serves_all_trials_that_learn_the_same_behind_the_same() -> None:
    rtn, pruned = ("rtn", {"bits": 3, "group": 32}), ("magnitude", {"sparsity": 0.5})
    own, named, none = (("compress-then-prompt", {"learned_on": where}) for where in ("this", RTN3, "none"))
    keys = {
        "rtn, own": stage_of(rtn, own).key,
        "rtn, named": stage_of(rtn, named).key,
        "magnitude, transferred": stage_of(pruned, named).key,
        "written in the other order": stage_of(named, pruned).key,
        "beside a cache method": stage_of(rtn, ("h2o", {}), own).key,
    }
    assert len(set(keys.values())) == 1, keys
    dense = {stage_of(own).key, stage_of(none).key, stage_of(pruned, none).key, stage_of(rtn, none).key}
    assert len(dense) == 1
    assert (
        len({*keys.values(), *dense, stage_of(pruned, own).key, stage_of(("rtn", {"bits": 2, "group": 32}), own).key})
        == 4
    )
    calibrated = stage_of(("gptq", {"bits": 3}), own)
    assert calibrated.behind_prepared[0] is not None
    assert calibrated.behind_prepared[0] in calibrated.deps()


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ((("compress-then-prompt", {"tokens": 800}),), "method compress-then-prompt puts 800 tokens before every input, and then task bits-per-byte"),
        ((("compress-then-prompt", {"tokens": 1024}),), "tokens = 1024 leave nothing of the 1024 positions"),
        ((("compress-then-prompt", {"tokens": 0}),), "tokens = 0 have nothing to learn; allowed: 1 or more, or steps: 0"),
        ((("compress-then-prompt", {"learned_on": "h2o"}),), "learned_on = h2o: h2o compresses no weights; allowed: this, none, aqlm"),
        ((("compress-then-prompt", {}), ("kvzip", {})), "method kvzip has the model read a prompt again by its token ids"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_plan(methods: Any, says: str) -> None:
    with pytest.raises((Infeasible, UserError), match=says) as refused:
        ResolvedJob.of(trial(*methods))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("rtm", "compress-then-prompt: learned_on.*rtm"),
        ("rtn?bits", "compress-then-prompt: learned_on: rtn.bits: 'bits' is no option"),
        ("rtn?bits=99", "compress-then-prompt: learned_on.*bits"),
    ],
)
def test_a_compression_that_is_not_there_is_named(value: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ResolvedJob.of(trial(("compress-then-prompt", {"learned_on": value})))


def test_long_texts_are_cut_to_the_room_that_is_left(bench: Bench) -> None:
    """A checkpoint's calibration text fills its positions."""
    info = replace(bench.lm.info, geometry={**bench.lm.info.geometry, "positions": 20})
    lm = LmModel(info, bench.lm.module)
    found = list(prompting(steps=2).lessons(lm, bench.ctx, 0))
    assert [tuple(batch.ids_BT.shape) for batch in found] == [(2, 20 - N)] * 2
    assert torch.equal(found[0].targets_BT[:, :-1], found[0].ids_BT[:, 1:])
    assert trained(prompting(steps=1), lm, bench.ctx, 0)[1]


def test_gradients_pass_rounded_activations(bench: Bench) -> None:
    """SmoothQuant rounds what enters its matrices; what learns in front of it must not take that for a constant."""
    payload = GridPayload.round(torch.eye(6), 8, 8)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    rounded = input_rounding(payload, 4)(x)
    (rounded * torch.arange(6.0)).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(6.0).expand(3, -1))
    with torch.no_grad():
        assert torch.equal(rounded, input_rounding(payload, 4)(x))
    assert not torch.equal(rounded, x)


def test_a_job_from_plan_to_row(tmp_path: Path) -> None:
    """Rounded weights, a cache that evicts, and the prompt: bytes and FLOPs of the row are those of its parts."""
    base = (("rtn", {"bits": 4, "group": 32}), ("snapkv", {"keep": 0.5}))
    prompt = ("compress-then-prompt", {"tokens": 4, "steps": 2, "batch": 2})
    runner, rows = Runner(tmp_path), []
    for methods in (base, (*base, prompt)):
        job = trial(*methods, model="tiny-lm/recall-d64", task="kv-recall")
        options = (("batch", 2), ("steps", 2))
        rows.append(runner.run_job(replace(job, model_options=options, task_options=(("examples", 4), ("pairs", 8)))))
        assert rows[-1].status == "ok", rows[-1].error_text
    without, found = (row.footprint for row in rows)
    assert found["method_params"] == 4 * 64
    assert found["method_bytes"] - without.get("method_bytes", 0.0) == 4 * 64 * 2
    assert found["weight_bytes"] - without["weight_bytes"] == 4 * 64 * 2
    token = 2 * 2 * 1 * 32 * 2  # keys and values, 2 layers, a head of 32, 2 bytes
    kept, kept_with = (round(0.5 * (without["prompt_tokens"] + more)) for more in (0, 4))
    assert found["kv_prompt_bytes"] - without["kv_prompt_bytes"] == (kept_with - kept) * token
    for name in ("kv_bytes_dense", "weight_bytes_dense", "text_tokens", "prompt_tokens"):
        assert found[name] == without[name]
    assert found["flops"] > without["flops"]
    assert found["training_seconds"] > 0
    assert any(kind.startswith("own-weights") for kind, _ in rows[1].stages_computed)
    assert any(name.endswith("loss") for name in rows[1].traces)


@torch.no_grad()
def test_its_slots_and_flops_by_hand(bench: Bench) -> None:
    """2 layers of width 64 with keys of 32 and an MLP of 96; 5 tokens before a text of 16."""
    method, ids_BT = prompting(), texts(1, 16)
    module = method.drawn(bench.lm, bench.ctx, 0)
    bare, _ = flops_of(lambda: bench.lm.logits(asked(ids_BT)))
    with method.apply(bench.lm, module), build("full-cache", {}).apply(bench.lm, None):
        bench.lm.logits(asked(ids_BT, 16))
        assert bench.lm.occupant(build("full-cache", {}).hooks[0]).report().stored == (16 + N) * 2 * 2 * 32 * 2
        found, _ = flops_of(lambda: bench.lm.logits(asked(ids_BT)))
    matrices = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    pairs = (16 + N) ** 2 - 16**2  # counted whole, as the causal kernel's counter does
    assert found - bare == 2 * (2 * matrices * N + 2 * 2 * pairs * 64)
