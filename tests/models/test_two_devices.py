"""Devices that are pretended, and every method and every architecture on a model over two of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isoflop.methods.base import METHODS, build
from isoflop.methods.decoder_tokens.probe import DecoderTokenProbe
from isoflop.methods.kv_cache.probe import PROMPT, KvCacheProbe
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.documents import DOCUMENTS
from isoflop.models.hooks.gradients import GRADIENTS
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS
from isoflop.testing.architectures import CHECKS, Check, architectures, examine, full_attention, small_config
from isoflop.testing.architectures.small import NotSmall
from isoflop.testing.architectures.vision_language import VISION_LANGUAGE_CHECKS, examine_vision_language
from isoflop.testing.configurations import at_default
from isoflop.testing.devices import ELSEWHERE, HOST, PretendedDevices, WrongDevice, over_two_devices, place_of
from isoflop.testing.small_vision_language import SMALL

HERE, THERE = str(HOST), str(ELSEWHERE)


# What pretended devices refuse


def there(*shape: int) -> Tensor:
    return torch.ones(*shape, device=THERE)


REFUSED: dict[str, Callable[[], Any]] = {
    "sum": lambda: there(2) + torch.ones(2),
    "a matrix": lambda: nn.functional.linear(there(1, 2), torch.ones(2, 2)),
    "embedding": lambda: nn.functional.embedding(there(2).long(), torch.ones(4, 2)),
    "joining": lambda: torch.cat([there(2), torch.ones(2)]),
    "an index": lambda: there(3)[torch.tensor([0, 1])],
    "a mask": lambda: there(3)[torch.ones(3, dtype=torch.bool)],
    "assignment": lambda: there(3).__setitem__(slice(None), torch.ones(3)),
    "in place": lambda: there(3).mul_(torch.ones(3)),
    "numpy": lambda: there(3).numpy(),
    "what was computed there": lambda: (there(3) * 2)[:2] + torch.ones(2),
    "a new tensor here": lambda: there(3) + torch.arange(3),
    "attention": lambda: nn.functional.scaled_dot_product_attention(there(1, 1, 2, 4), torch.ones(1, 1, 2, 4), there(1, 1, 2, 4)),
}  # fmt: skip
ALLOWED: dict[str, Callable[[], Tensor]] = {
    "a number of the host": lambda: there(3) * torch.tensor(2.0),
    "a new tensor there": lambda: there(3) + torch.arange(3, device=there(1).device),
    "moving": lambda: there(3) + torch.ones(3).to(THERE),
    "like another": lambda: there(3) + torch.ones(3).to(there(1)),
    "copying": lambda: there(3).copy_(torch.zeros(3)),
    "filled like": lambda: torch.zeros_like(there(3)) + there(3).new_ones(3),
    "a module": lambda: nn.Linear(2, 2).to(THERE)(there(1, 2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pretended_devices_refuse_what_gpus_refuse(name: str) -> None:
    with PretendedDevices(), pytest.raises(WrongDevice):
        REFUSED[name]()


@pytest.mark.parametrize("name", ALLOWED)
def test_pretended_devices_allow_what_gpus_allow(name: str) -> None:
    with PretendedDevices():
        assert ALLOWED[name]().device == torch.device(THERE)


def test_what_moved_has_memory_of_its_own() -> None:
    with PretendedDevices():
        x = torch.zeros(3)
        moved = x.to(THERE)
        moved += 1
        assert x.sum() == 0
        assert moved.cpu().device == HOST


# Every method on a model of which every second layer lies elsewhere


def methods_on_decoders() -> Iterator[str]:
    """Without those that train copies of a model, and those of vision transformers: these fit one device."""
    for name in METHODS.names():
        cls = METHODS.get(name)
        if not cls.__module__.startswith("isoflop.methods."):  # registered by other tests
            continue
        if not {DOCUMENTS, GRADIENTS, PIXELS, VISION_BLOCKS} & set(cls.hooks):
            yield name


def a_probe(name: str) -> Any:
    made = METHODS.get(name).probe()
    deeper = "layers" in inspect.signature(type(made)).parameters and len(made.model.decoder_layers) < 2
    return type(made)(layers=2) if deeper else made


def everything(name: str, probe: Any) -> tuple[Tensor, Any]:
    """What a method prepares, gives and measures; and token by token, where it acts on a cache."""
    method = at_default(METHODS.get(name), probe)
    given: Any = {"bitstack": {"n_iter": 1}}.get(name)
    method = build(name, given) if given else method
    rows = range(2)
    with method.apply(probe.model, probe.prepared(method, 0)):
        found = [probe.outputs(rows)]
        costs = probe.cost(), method.footprint(probe.model, probe.ctx)
        if isinstance(probe, KvCacheProbe):
            batch = probe.batch(rows)
            if probe.model.occupant(ATTENTION) is not None:
                found.append(probe.model.stepwise_logits(batch)[:, PROMPT:].flatten(1))
            found.append(probe.model.greedy(batch.ids_BT, 2))
            found += [logits_SW for logits_SW, _ in probe.model.scored_logits(batch)]
    return torch.cat([x.flatten().double() for x in found]), costs


INSIDE = ("kv-cache", "sparse-attention", "weights", "repair", "activation-sparsity", "decoder-tokens")
"""Families that act on layers; of the others, which act before them, one method each."""
SEARCHES = ("evopress", "evopress-sparse")  # seconds each; evopress-drop is the same search


def sorted_by_speed() -> Iterator[Any]:
    seen: set[str] = set()
    for name in methods_on_decoders():
        family = METHODS.get(name).family
        slow = name in SEARCHES or (family in seen and family not in INSIDE)
        seen.add(family)
        yield pytest.param(name, marks=pytest.mark.slow) if slow else name


@pytest.mark.parametrize("name", list(sorted_by_speed()))
def test_every_method_works_on_a_model_over_two_devices(name: str) -> None:
    """The same numbers and costs, and no operation over tensors of two devices."""
    probe = a_probe(name)
    expected, costs = everything(name, probe)
    probe = a_probe(name)
    with over_two_devices(probe.model):
        assert set(probe.model.devices) == {torch.device(HERE), torch.device(THERE)}
        found, found_costs = everything(name, probe)
        assert place_of(found) == HOST
    assert torch.equal(found, expected)
    assert found_costs == costs


def test_the_walk_sees_what_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random scores without the ids moved to where the layer is."""
    monkeypatch.setattr(
        "isoflop.methods.kv_cache.chance.row_keys", lambda call: torch.zeros(call.k_BGTD.shape[0]).long()
    )
    with pytest.raises(WrongDevice):
        test_every_method_works_on_a_model_over_two_devices("kv-random")


# Every architecture


def walked(one_pass: Check, step_by_step: Check) -> dict[str, Check]:
    """What a walk over architectures looks at, on two devices."""

    def check(subject: Any) -> None:
        with over_two_devices(subject.model):
            one_pass(subject)
            step_by_step(subject)

    return {"over two devices": check}


LM_CHECKS = walked(CHECKS["one pass"], CHECKS["step by step"])
KNOWN = {architecture.model_type: architecture for architecture in architectures()}
SOME = ["gemma2", "gpt2", "gpt_oss", "opt", "qwen3_moe"]


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(KNOWN) - set(SOME)))]
)
def test_a_language_model_over_two_devices_is_exact_or_refused(name: str, tmp_path: Path) -> None:
    try:
        full = full_attention(small_config(name))
    except NotSmall:
        full = {}
    for folder, changes in (("own", {}), ("full", full)):
        found = examine(KNOWN[name], tmp_path / folder, LM_CHECKS, **changes)
        assert found["over two devices"].fine, found
        if name in SOME and changes:
            assert str(found["over two devices"]) == "exact"


FEW = ("LlavaForConditionalGeneration", "Idefics3ForConditionalGeneration", "Qwen3VLForConditionalGeneration")


@pytest.mark.parametrize(
    "architecture", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name not in FEW)]
)
def test_a_vision_language_model_over_two_devices_is_exact(architecture: str, tmp_path: Path) -> None:
    checks = walked(VISION_LANGUAGE_CHECKS["one pass"], VISION_LANGUAGE_CHECKS["step by step"])
    found = examine_vision_language(architecture, tmp_path, checks)
    assert str(found["over two devices"]) == "exact"


# Methods beside one another


def beside(model: Any, methods: list[tuple[str, dict[str, Any]]], probe: Any) -> Tensor:
    """The answer at once, and a token at a time."""
    answer_BS = torch.tensor([[3, 4, 5], [4, 5, 6]])
    with ExitStack() as stack:
        for name, knobs in methods:
            method = build(name, knobs)
            stack.enter_context(method.apply(model, probe.prepared(method, 0)))
        batch = probe.batch(range(2))
        found = probe.outputs(range(2)), model.stepwise(model.prompt_of(batch), answer_BS)
    return torch.cat([x.flatten() for x in found])


@pytest.mark.parametrize(
    "cache", [("h2o", {}), ("kv-random", {}), ("double-sparsity", {"channel": "random", "dense_layers": 1})]
)
@pytest.mark.parametrize("dropping", ["fastv", "drop-random"])
def test_methods_beside_one_another_on_two_devices(dropping: str, cache: tuple[str, dict[str, Any]]) -> None:
    """Tokens leave at a border, behind a choice of the layer before it, and what is left is compressed on either side."""
    methods = [("vtc-cls", {}), (dropping, {"layer": 2}), cache]
    expected = beside((probe := DecoderTokenProbe()).model, methods, probe)
    probe = DecoderTokenProbe()
    with over_two_devices(probe.model):
        assert torch.equal(beside(probe.model, methods, probe), expected)
