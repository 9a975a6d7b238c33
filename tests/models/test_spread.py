"""One model over several devices: where its parts lie, what has no room, and jobs on it, with pretended devices for real ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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
from isoflop.models.family import family_of
from isoflop.models.lm import LmModel
from isoflop.models.spread import NoRoom, device_map
from isoflop.models.worlds import recall_world
from isoflop.sweep.api import RunOptions, make_executor
from isoflop.sweep.blocks import ResourcesBlock
from isoflop.testing.devices import ELSEWHERE, HOST, PretendedDevices

GIB = 2**30
HERE, THERE = str(HOST), str(ELSEWHERE)
SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
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
    """With the vocabulary of a built-in world, whose text calibrates."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.Qwen3Config(**SHAPE, head_dim=8)
    config.isoflop = {"vocabulary": recall_world.VOCABULARY}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
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
        assert [str(next(layer.parameters()).device) for layer in model.decoder_layers] == [HERE, THERE, THERE, THERE]
        assert model.device == HOST
        found = model.module(input_ids=ids_BT).logits
    assert torch.equal(found, expected)
    assert model.resident_bytes() == load(checkpoint, tmp_path, HERE).resident_bytes()


def test_what_does_not_fit_is_refused_before_weights_are_read(
    checkpoint: str, tmp_path: Path, room: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    room[THERE] = room[HERE] = 20_000.0
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights are read")
    )
    with pytest.raises(NoRoom, match="2 devices with room for"):
        load(checkpoint, tmp_path, HERE, THERE)


def a_job(ref: str, task: str, *methods: str) -> Job:
    """Methods at their defaults, with less to calibrate and to search."""
    specs = []
    for name in methods:
        knobs: dict[str, Any] = dict(build(name, {}).as_field()[2])
        specs.append(MethodSpec.of(name, {**knobs, **{k: v for k, v in LITTLE.items() if k in knobs}}))
    options = {"kv-recall": {"examples": 16}, "generation-latency": {"new": 3, "prompt": 12}}[task]
    return Job(ref, tuple(specs), task, 0, 0, task_options=tuple(options.items()))


LITTLE = {"n_calib": 8, "texts": 8, "generations": 1, "offspring": 2, "n_iter": 1, "dense_layers": 1}
FAMILIES = ("kv-cache", "sparse-attention", "weights", "activation-sparsity")
QUICK = (("gptq", "double-sparsity"), ("mlp-cett",))
REST = [(name,) for name in METHODS.names() if METHODS.get(name).family in FAMILIES and (name,) not in QUICK]
MEASURED = {"seconds", "peak_bytes", "eval_seconds", "worker_peak_bytes"}


@pytest.mark.parametrize("methods", [(), *QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in REST)])
def test_a_job_over_two_devices_has_the_scores_and_costs_of_one(
    methods: tuple[str, ...], checkpoint: str, tmp_path: Path, room: dict[str, float]
) -> None:
    """Stages, calibration, task and footprint; every figure but those of clocks and allocators."""
    for task in ("kv-recall", "generation-latency") if not methods else ("kv-recall",):
        job = a_job(checkpoint, task, *methods)
        alone = Runner(tmp_path / "one", HERE).run_job(job)
        with PretendedDevices():
            found = Runner(tmp_path / "two", [HERE, THERE]).run_job(job)
        assert (found.status, found.error_text) == ("ok", "")
        if task == "kv-recall":
            assert found.errors == alone.errors
        one, two = ({k: v for k, v in o.footprint.items() if k not in MEASURED} for o in (alone, found))
        assert one == two


def test_warm_models_make_room_for_one_that_is_spread(checkpoint: str, tmp_path: Path, room: dict[str, float]) -> None:
    """What is free is too little as long as another model is warm, however small it was thought to be; alone it is infeasible."""
    job = a_job(checkpoint, "generation-latency")
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
    job = a_job(checkpoint, "generation-latency")
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
    with pytest.raises(UserError, match=r"resources\.gpus = 8: this process sees 4 GPUs; allowed: up to 4"):
        devices_here(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices_here(4) == ("cpu",)


@pytest.mark.parametrize("gpus", [0.5, 1, 2])
def test_this_process_refuses_gpus_that_it_does_not_see(gpus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray does, instead of computing on the processor; and 0 hides those that are there."""
    sweep: Any = SimpleNamespace(spec=SimpleNamespace(resources=ResourcesBlock(gpus=gpus)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"resources\.gpus = {gpus:g}: this process sees no GPU; allowed: 0"):
        make_executor(sweep, RunOptions(executor="local"))


def test_workers_are_given_their_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Ray by what an actor has, in this process by what a job wants."""
    from isoflop.execute.ray_worker import RayWorker

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    two = ("cuda:0", "cuda:1")
    assert RayWorker("w", str(tmp_path), (), None, None, gpus=2)._runner.cache.devices == two
    assert RayWorker("w", str(tmp_path), (), None, None, gpus=0.5)._runner.cache.devices == ("cuda",)
    sweep: Any = SimpleNamespace(spec=SimpleNamespace(resources=ResourcesBlock(gpus=2)))
    executor: Any = make_executor(sweep, RunOptions(executor="local", cache_dir=str(tmp_path)))
    assert executor._runner.cache.devices == two
    none: Any = SimpleNamespace(spec=SimpleNamespace(resources=ResourcesBlock(gpus=0)))
    executor = make_executor(none, RunOptions(executor="local", cache_dir=str(tmp_path)))
    assert executor._runner.cache.devices == ("cpu",)
