"""One model over several devices: where its parts lie, and that every method works on it, with pretended devices for real ones."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from isoflop.core.errors import UserError
from isoflop.core.folder_context import FolderContext
from isoflop.jobs import Job, Runner
from isoflop.jobs.devices import devices_here
from isoflop.jobs.job import MethodSpec
from isoflop.methods.base import METHODS, build
from isoflop.methods.kv_cache.probe import PROMPT, KvCacheProbe
from isoflop.models.family import family_of
from isoflop.models.hooks.documents import DOCUMENTS
from isoflop.models.hooks.gradients import GRADIENTS
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS
from isoflop.models.lm import LmModel
from isoflop.models.spread import NoRoom, device_map
from isoflop.testing.architectures import CHECKS, Check, architectures, examine, full_attention, small_config
from isoflop.testing.architectures.small import NotSmall
from isoflop.testing.architectures.vision_language import VISION_LANGUAGE_CHECKS, examine_vision_language
from isoflop.testing.configurations import at_default
from isoflop.testing.devices import ELSEWHERE, HOST, PretendedDevices, WrongDevice, over_two_devices, place_of
from isoflop.testing.small_vision_language import SMALL

GIB = 2**30
HERE, THERE = str(HOST), str(ELSEWHERE)
SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


# Where parts lie: modules on the device ``meta``, devices by their memory alone


def skeleton(layers: int = 8, tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        **{**SHAPE, "num_hidden_layers": layers, "vocab_size": 600}, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def bytes_by_device(module: nn.Module, devices: dict[str, str], itemsize: int) -> dict[str, int]:
    """Parameter by parameter; each has exactly one part with a device."""
    held = dict.fromkeys(devices.values(), 0)
    for name, parameter in module.named_parameters():
        parts = [part for part in devices if name == part or name.startswith(f"{part}.")]
        assert len(parts) == 1, f"{name} in {parts}"
        held[devices[parts[0]]] += parameter.numel() * itemsize
    return held


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "rooms", [(1.0, 1.0), (0.4, 1.0), (1.0, 0.3, 0.5), (1.0, 1.0, 1.0, 1.0), (0.6, 0.05, 0.2, 0.9)]
)
def test_the_fullest_device_is_as_empty_as_whole_layers_allow(rooms: tuple[float, ...], tied: bool) -> None:
    """Against every way to cut the layers into runs."""
    module = skeleton(tied=tied)
    whole = sum(p.numel() for p in module.parameters()) * 2
    free = {f"cuda:{n}": room * whole for n, room in enumerate(rooms)}
    devices = device_map("x", module, module.model, free, 2)
    held = bytes_by_device(module, devices, 2)
    order = [devices[f"model.layers.{n}"] for n in range(8)]
    assert order == sorted(order)
    assert {device for part, device in devices.items() if ".layers." not in part} == {"cuda:0"}
    layer = sum(p.numel() for p in module.model.layers[0].parameters()) * 2
    around = whole - 8 * layer
    best = min(
        max((count * layer + (0 if n else around)) / (room * whole) for n, (count, room) in enumerate(zip(counts, rooms, strict=True)))
        for counts in itertools.product(range(9), repeat=len(rooms))
        if sum(counts) == 8
    )  # fmt: skip
    fullest = max(size / free[device] for device, size in held.items())
    assert fullest <= 1
    assert fullest == pytest.approx(best, rel=0.01)  # buffers count, too


def test_what_has_no_room_is_refused_in_one_line_with_the_bytes() -> None:
    with pytest.raises(NoRoom) as error:
        device_map("hf:x", module := skeleton(), module.model, {"cuda:0": 0.3 * GIB, "cuda:1": 0.0}, 2 * GIB // 1000)
    line = str(error.value)
    assert "\n" not in line
    assert "model hf:x: " in line
    assert "GiB of weights, of them " in line
    assert "2 devices with room for 307.2 MiB, 0.0 KiB; allowed: more GPUs" in line
    assert "resources: {gpus: …}" in line


def test_a_layer_is_never_cut() -> None:
    """Two devices with room for the bytes and not for whole layers."""
    module = skeleton(layers=3)
    layer = sum(p.numel() for p in module.model.layers[0].parameters()) * 2
    around = sum(p.numel() for p in module.parameters()) * 2 - 3 * layer + GIB // 10**6
    device_map("x", module, module.model, {"cuda:0": around + layer, "cuda:1": 2 * layer}, 2)
    with pytest.raises(NoRoom):
        device_map("x", module, module.model, {"cuda:0": around + 1.5 * layer, "cuda:1": 1.6 * layer}, 2)


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
            found += [probe.model.stepwise_logits(batch)[:, PROMPT:].flatten(1), probe.model.greedy(batch.ids_BT, 2)]
            found += [logits_SW for logits_SW, _ in probe.model.scored_logits(batch)]
    return torch.cat([x.flatten().double() for x in found]), costs


SEARCHES = ("evopress", "evopress-sparse")  # seconds each; evopress-drop is the same search


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SEARCHES else name for name in methods_on_decoders()],
)
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
SOME = ["gemma2", "gemma3n_text", "gpt2", "gpt_neox", "gpt_oss", "modernbert-decoder", "opt", "phi3", "qwen3_moe"]


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in set(KNOWN) - set(SOME))]
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


@pytest.mark.parametrize("architecture", SMALL)
def test_a_vision_language_model_over_two_devices_is_exact(architecture: str, tmp_path: Path) -> None:
    checks = walked(VISION_LANGUAGE_CHECKS["one pass"], VISION_LANGUAGE_CHECKS["step by step"])
    found = examine_vision_language(architecture, tmp_path, checks)
    assert str(found["over two devices"]) == "exact"


# Checkpoints


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Free bytes by device, as measured."""
    free = {HERE: float(GIB), THERE: float(GIB)}
    for place in ("models.spread", "models.budget", "jobs.warm"):
        monkeypatch.setattr(f"isoflop.{place}.memory_of", lambda device: (free[device], 4.0 * GIB))
    return free


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**SHAPE, head_dim=8)).save_pretrained(
            folder
        )
    return f"hf:{folder}"


def load(ref: str, folder: Path, *devices: str) -> Any:
    family = family_of(ref)
    return family.load(family.info(ref, {}), None, FolderContext(folder, *devices))


@torch.no_grad()
def test_a_checkpoint_is_loaded_over_the_devices_of_its_worker(
    checkpoint: str, tmp_path: Path, room: dict[str, float]
) -> None:
    ids_BT = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = load(checkpoint, tmp_path, HERE).module(input_ids=ids_BT).logits
    with PretendedDevices():
        model = load(checkpoint, tmp_path, HERE, THERE)
        assert isinstance(model, LmModel)
        assert [str(next(layer.parameters()).device) for layer in model.decoder_layers] == [HERE, HERE, THERE, THERE]
        assert model.device == HOST
        found = model.module(input_ids=ids_BT).logits
    assert torch.equal(found, expected)
    assert model.resident_bytes() == load(checkpoint, tmp_path, HERE).resident_bytes()


def test_what_does_not_fit_is_refused_before_weights_are_read(
    checkpoint: str, tmp_path: Path, room: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    room[THERE] = room[HERE] = 20_000.0
    monkeypatch.setattr(
        "isoflop.models.checkpoints.lm.require_safetensors", lambda source: pytest.fail("weights are read")
    )
    with pytest.raises(NoRoom, match="2 devices with room for"):
        load(checkpoint, tmp_path, HERE, THERE)


@pytest.mark.parametrize("methods", [(), ("h2o",), ("rtn", "zipcache")])
def test_a_job_over_two_devices_has_the_scores_and_costs_of_one(
    methods: Any, checkpoint: str, tmp_path: Path, room: dict[str, float]
) -> None:
    job = Job(
        checkpoint,
        tuple(MethodSpec.of(m, dict(build(m, {}).as_field()[2])) for m in methods),
        "generation-latency",
        0,
        0,
        task_options=(("new", 3), ("prompt", 12)),
    )
    alone = Runner(tmp_path / "one", HERE).run_job(job)
    with PretendedDevices():
        outcome = Runner(tmp_path / "two", [HERE, THERE]).run_job(job)
    assert (outcome.status, outcome.error_text) == ("ok", "")
    measured = {"seconds", "peak_bytes", "eval_seconds", "worker_peak_bytes"}
    assert {k: v for k, v in outcome.footprint.items() if k not in measured} == {
        k: v for k, v in alone.footprint.items() if k not in measured
    }


def test_warm_models_make_room_for_one_that_is_spread(checkpoint: str, tmp_path: Path, room: dict[str, float]) -> None:
    """What is free is too little as long as another model is warm, however small it was thought to be; alone it is infeasible."""
    job = Job(checkpoint, (), "generation-latency", 0, 0, task_options=(("new", 2), ("prompt", 8)))
    runner = Runner(tmp_path, [HERE, THERE])
    room[THERE] = room[HERE] = 20_000.0
    runner._models._fits = lambda needed: True  # type: ignore[method-assign]
    runner._models.put("other", object())  # type: ignore[arg-type]
    clear = runner._models.clear

    def cleared() -> None:
        clear()
        room[THERE] = room[HERE] = GIB

    runner._models.clear = cleared  # type: ignore[method-assign]
    with PretendedDevices():
        assert runner.run_job(job).status == "ok"
    assert len(runner._models) == 1
    runner = Runner(tmp_path, [HERE, THERE])
    room[THERE] = room[HERE] = 20_000.0
    outcome = runner.run_job(job)
    assert outcome.status == "infeasible"
    assert "2 devices with room for" in outcome.error_text


def test_a_job_that_ran_out_of_memory_beside_others_is_tried_alone(
    checkpoint: str, tmp_path: Path, room: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the second device, say: its model and all others go, and alone it has its result."""
    job = Job(checkpoint, (), "generation-latency", 0, 0, task_options=(("new", 2), ("prompt", 8)))
    runner = Runner(tmp_path, [HERE, THERE])
    runner._models._fits = lambda needed: True  # type: ignore[method-assign]
    runner._models.put("other", object())  # type: ignore[arg-type]
    tokens = LmModel.tokens

    def crowded(self: LmModel, ids_BT: Tensor, count: int) -> Iterator[Tensor]:
        if "other" in runner._models.held():
            raise torch.OutOfMemoryError(f"CUDA out of memory on {self.devices[-1]}")
        yield from tokens(self, ids_BT, count)

    monkeypatch.setattr(LmModel, "tokens", crowded)
    with PretendedDevices():
        first = runner.run_job(job)
        assert (first.status, first.crowded) == ("failed", True)
        assert f"on {THERE}" in first.error_text
        assert runner._models.held() == []
        assert runner.run_job(job, alone=True).status == "ok"


def test_a_worker_has_as_many_devices_as_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_here() == devices_here(0.5) == ("cuda",)
    assert devices_here(4) == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    with pytest.raises(UserError, match=r"gpus = 8, and this process sees 4"):
        devices_here(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices_here(4) == ("cpu",)
