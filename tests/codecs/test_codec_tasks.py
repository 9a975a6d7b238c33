"""Distortion metrics against loops, and the tasks that look at images behind a codec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.jobs.job import Job, MethodSpec, ResolvedJob
from isoflop.jobs.runner import merge_footprints
from isoflop.methods.base import build
from isoflop.methods.codecs.base import ImageCodecMethod
from isoflop.methods.codecs.one_d_piece import TokenCodec
from isoflop.methods.vit_tokens.probe import untrained_model
from isoflop.models.family import family_of
from isoflop.models.hooks.pixels import PIXELS, ImageCodec
from isoflop.models.networks.image_tokenizer import Tokenizer
from isoflop.tasks.base import TASKS
from isoflop.tasks.classification import DigitClassification
from isoflop.tasks.distortion import mse, psnr, ssim
from isoflop.tasks.labelled_images import distortions
from isoflop.tasks.reconstruction import Reconstruction
from isoflop.testing import FolderContext


def pair(channels: int = 2, side: int = 13) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, channels, side, side, generator=generator)
    return a, (a + 0.2 * torch.rand(a.shape, generator=generator)).clamp(0, 1)


def ssim_by_loop(a_HW: np.ndarray, b_HW: np.ndarray, side: int) -> float:
    offsets = np.arange(side) - side // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(a_HW.shape[0] - side + 1):
        for left in range(a_HW.shape[1] - side + 1):
            a, b = (x[top : top + side, left : left + side] for x in (a_HW, b_HW))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(light * (2 * cov + 9e-4) / (var_a + var_b + 9e-4))
    return float(np.mean(values))


@pytest.mark.parametrize(("side", "window"), [(13, 11), (8, 7)])
def test_ssim_equals_a_loop_over_windows(side: int, window: int) -> None:
    a, b = pair(side=side)
    expected = [
        np.mean([ssim_by_loop(*(t[i, c].double().numpy() for t in (a, b)), window) for c in range(2)]) for i in range(2)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


def test_psnr_is_per_image_and_infinite_for_equal_images() -> None:
    a, b = pair()
    assert psnr(a, b).tolist() == pytest.approx([-10 * math.log10(v) for v in mse(a, b).tolist()], rel=1e-5)
    assert torch.isinf(psnr(a, a)).all()
    assert float(psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1))) == pytest.approx(20, abs=1e-4)
    whole = distortions((a * 255).round() / 255, a)  # rounding to 8 bits: 1/12 of a squared grey level
    assert whole["psnr"] == pytest.approx(10 * math.log10(12 * 255**2), abs=0.6)


def test_tasks_measure_what_the_codec_left(tmp_path: Path) -> None:
    model, ctx = untrained_model(), FolderContext(tmp_path)
    seen = DigitClassification(examples=40, shard=25)
    lost = Reconstruction(examples=40, shard=25)
    bare = list(seen.evaluate(model, ctx, 3))
    assert set(bare[0].metrics) == {"nll"}
    method = build("jpeg", {"quality": 10})
    with method.apply(model, None):
        shards = list(seen.evaluate(model, ctx, 3))
        measured = seen.measure(model, ctx)
        assert model.occupant(PIXELS) is not None
        assert model.occupant(PIXELS).bytes().examples == 40  # what is measured besides does not count
        cost = merge_footprints(measured, [(method, method.footprint(model, ctx))])
    with method.apply(model, None):
        distorted = list(lost.evaluate(model, ctx, 3))
    assert [len(s.ids) for s in shards] == [25, 15]
    assert np.array_equal(shards[0].ids, bare[0].ids)
    assert not np.array_equal(shards[0].metrics["nll"], bare[0].metrics["nll"])
    batch = seen.batch(model.info, shards[0].ids, 3)
    codec = method.codec(model.info, None)  # type: ignore[attr-defined]
    data = [c.data for c in codec.encode((batch.images_BCHW * 255).round().byte())]
    error = mse(codec.decode(data) / 255, batch.images_BCHW).double().numpy()
    assert shards[0].metrics["mse"] == pytest.approx(error, rel=1e-4)
    for shard in distorted:
        assert shard.errors == pytest.approx(shard.metrics["mse"])
        assert shard.metrics["psnr"] == pytest.approx(-10 * np.log10(shard.metrics["mse"]), rel=1e-5)
    assert cost["ratio_codecs"] == pytest.approx(3072 / cost["codec_bytes"])
    assert cost["flops_codec"] == 0
    assert cost["flops"] == cost["flops_dense"]
    structural = next(Reconstruction(examples=4, distortion="ssim").evaluate(model, ctx, 0))
    assert structural.errors == pytest.approx(1 - structural.metrics["ssim"])


def test_each_image_counts_once_whatever_a_repeat_s_order(tmp_path: Path) -> None:
    model, ctx = untrained_model(), FolderContext(tmp_path)
    sizes = []
    for seed in (0, 5):
        with build("png", {}).apply(model, None):
            list(Reconstruction(examples=30).evaluate(model, ctx, seed))
            list(Reconstruction(examples=30).evaluate(model, ctx, seed))
            assert model.occupant(PIXELS) is not None
            sizes.append(model.occupant(PIXELS).bytes())
    assert sizes[0] == sizes[1]
    assert sizes[0].examples == 30


def test_the_network_of_a_tokenizer_is_counted_and_token_reduction_is_not_blamed_for_it(tmp_path: Path) -> None:
    from isoflop.methods.codecs.probe import CodecProbe

    probe, task = CodecProbe(), DigitClassification(examples=3)
    method, reduction = build("one-d-piece", {"tokens": 4, "layers": 1}), build("pitome", {"macs": 0.6})
    with reduction.apply(probe.model, None):
        alone = reduction.footprint(probe.model, probe.ctx)
    with method.apply(probe.model, probe.prepared(method, 0)), reduction.apply(probe.model, None):
        list(task.evaluate(probe.model, probe.ctx, 0))
        measured = task.measure(probe.model, probe.ctx)
        cost = method.footprint(probe.model, probe.ctx)
        assert reduction.footprint(probe.model, probe.ctx) == alone
        merged = merge_footprints(measured, [(method, cost), (reduction, alone)])
    assert measured["flops_codec"] > 1e6
    reduced = alone["macs_share"] * measured["flops_dense"]
    assert measured["flops"] == pytest.approx(measured["flops_codec"] + reduced)
    assert merged["method_bytes"] == cost["method_bytes"] == measured["codec_weight_bytes"]
    assert merged["ratio_codecs"] == pytest.approx(3072 / 5)


def file_elements(tensors: Mapping[str, Tensor], file: Path) -> int:
    """Elements of float32 tensors by the length of the file that holds them: 8 bytes, a header of that length, data."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    data = file.read_bytes()
    return (len(data) - 8 - int.from_bytes(data[:8], "little")) // 4


@pytest.mark.parametrize("task", ["digit-classification", "reconstruction"])
@pytest.mark.parametrize(
    ("name", "knobs"),
    [("one-d-piece", {"tokens": 2, "layers": 1}), ("one-d-piece", {"tokens": 32, "layers": 1}), ("pca-codec", {})],
)
def test_weights_of_a_codec_count_with_the_model_s(tmp_path: Path, task: str, name: str, knobs: dict[str, Any]) -> None:
    """16 bits for every element that a file of the codec's real tensors holds, however many tokens are kept."""
    from isoflop.methods.codecs.probe import CodecProbe

    probe, scored = CodecProbe(), TASKS.get(task)(examples=3)
    method = build(name, knobs)
    prepared = probe.prepared(method, 0)
    if isinstance(prepared, Tokenizer):
        held = prepared.state_dict()
    else:  # 8 of 256 components
        held = {"mean": prepared.mean_I, "rows": prepared.rows_RI[:8], "deviation": prepared.deviation_R[:8]}
    bare = scored.measure(probe.model, probe.ctx)
    with method.apply(probe.model, prepared):
        list(scored.evaluate(probe.model, probe.ctx, 0))
        coded = scored.measure(probe.model, probe.ctx)
        own = method.footprint(probe.model, probe.ctx)
    elements = file_elements(held, tmp_path / "held.safetensors")
    assert own["method_params"] == elements > 1000
    assert own["method_bytes"] == coded["codec_weight_bytes"] == 2 * elements
    assert coded["weight_bytes"] == bare["weight_bytes"] + 2 * elements
    assert coded["bytes"] == coded["weight_bytes"]
    assert coded["bytes_dense"] == coded["weight_bytes_dense"] == bare["bytes"]
    assert coded["peak_bytes"] > bare["peak_bytes"] + 4 * elements - 1  # in this process an element takes 4 bytes
    assert "codec_weight_bytes" not in bare


def test_what_no_codec_trains_weighs_nothing_and_integers_weigh_what_they_take() -> None:
    from isoflop.methods.codecs.probe import CodecProbe

    probe = CodecProbe()
    with build("jpeg", {}).apply(probe.model, None):
        measured = DigitClassification(examples=3).measure(probe.model, probe.ctx)
    assert measured["codec_weight_bytes"] == 0
    assert measured["weight_bytes"] == probe.model.weight_bytes()
    method = build("one-d-piece", {"quantizer": "fsq", "layers": 1, "codebook_size": 64})
    assert isinstance(method, ImageCodecMethod)
    codec = method.codec(probe.model.info, probe.prepared(method, 0))
    parameters = sum(p.numel() for p in codec.tokenizer.parameters())  # type: ignore[attr-defined]
    assert codec.weight_bytes(16) == 2 * parameters + 8 * (2 + 2)  # two numbers per code: their levels and places
    assert codec.weight_bytes(32) == 4 * parameters + 8 * (2 + 2)


def test_a_codec_that_hides_weights_does_not_conform() -> None:
    from isoflop.methods.codecs.probe import CodecProbe, reachable

    @dataclass(frozen=True)
    class Hiding(TokenCodec):
        def tensors(self) -> list[Tensor]:
            return list(self.tokenizer.encoder.parameters())

    class Keeping(ImageCodecMethod):
        def codec(self, info: Any, prepared: Any) -> ImageCodec:
            return Hiding(prepared, 2)

    probe = CodecProbe()
    net = probe.prepared(build("one-d-piece", {"layers": 1}), 0)
    with pytest.raises(AssertionError, match="tensors of shapes"):
        probe.verify(Keeping(), net)
    assert len(list(reachable(TokenCodec(net, 2)))) == len(list(net.parameters()))
    assert [t.shape for t in reachable({"a": [torch.ones(2)], "b": (1, torch.ones(0))})] == [(2,)]


def test_what_cannot_work_is_refused_at_plan_time() -> None:
    def plan(task: str, *methods: str, model: str = "tiny-vit/c48") -> None:
        specs = tuple(MethodSpec.of(name, build(name, {}).knobs()) for name in methods)
        ResolvedJob.of(Job(model, specs, task, 0, 0))

    plan("reconstruction", "one-d-piece")
    plan("digit-classification", "one-d-piece", "pitome")
    with pytest.raises(Infeasible, match="reconstruction: method pitome does nothing to images"):
        plan("reconstruction", "pitome")
    with pytest.raises(Infeasible, match="both take pixels"):
        plan("digit-classification", "jpeg", "webp")
    with pytest.raises(Infeasible, match="jpeg needs pixels"):
        plan("reading", "jpeg", model="tiny-llava/d24")
    info = family_of("tiny-vit/c48").info("tiny-vit/c48", {})
    with pytest.raises(Infeasible, match=r"tokens = 9 exceeds n_latent = 8; allowed: 1 … 8"):
        build("one-d-piece", {"tokens": 9, "n_latent": 8}).check(info)
    assert TASKS.get("reconstruction") is Reconstruction


def test_a_codec_takes_the_hook_and_gives_it_back() -> None:
    model = untrained_model()
    with build("jpeg", {}).apply(model, None):
        with pytest.raises(Infeasible, match="pixels is taken already"), build("webp", {}).apply(model, None):
            pass
        assert model.occupant(PIXELS) is not None
        with pytest.raises(ValueError, match="no image has gone through"):
            build("jpeg", {}).footprint(model, FolderContext(Path("unused")))
    assert model.occupant(PIXELS) is None
