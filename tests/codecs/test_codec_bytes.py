"""Bytes are real: packed codes, files of conventional encoders, and what of them is header."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isoflop.methods.base import METHODS, build
from isoflop.methods.codecs.base import ImageCodecMethod
from isoflop.methods.codecs.one_d_piece import OneDPiece, TokenCodec
from isoflop.methods.codecs.packing import packed_bytes, read_codes, write_codes
from isoflop.methods.codecs.pca import ComponentCodec, fit_basis
from isoflop.methods.codecs.pictures import FileCodec, jpeg_header
from isoflop.methods.codecs.probe import CodecProbe
from isoflop.models.hooks.pixels import ImageCodec, to_bytes
from isoflop.models.networks.image_tokenizer import Tokenizer
from isoflop.models.worlds.sprite_world import ImageSet
from isoflop.tasks.distortion import mse, psnr

CODECS = sorted(name for name in METHODS.own() if issubclass(METHODS.get(name), ImageCodecMethod))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return to_bytes(torch.from_numpy(next(ImageSet("sprites", "test", 24, 0.4, 0).images())))


@pytest.fixture(scope="module")
def probe() -> CodecProbe:
    return CodecProbe()


def codec_of(probe: CodecProbe, name: str, **knobs: Any) -> ImageCodec:
    method = build(name, knobs)
    assert isinstance(method, ImageCodecMethod)
    return method.codec(probe.model.info, probe.prepared(method, 0))


@given(bits=st.integers(1, 16), seed=st.integers(0, 10**6), count=st.integers(1, 256))
@settings(max_examples=50)
def test_codes_survive_packing_and_take_the_bytes_they_should(bits: int, seed: int, count: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count)
    data = write_codes(codes, bits)
    assert len(data) == packed_bytes(count, bits) == 1 + -(-count * bits // 8)
    assert read_codes(data, bits).tolist() == codes.tolist()


@pytest.mark.parametrize("codes", [[], [4], [-1], [0] * 257])
def test_codes_that_do_not_fit_are_refused(codes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"codes|fit"):
        write_codes(np.array(codes, dtype=np.int64), 2)


def test_bits_are_linear_in_the_tokens(probe: CodecProbe, images: Tensor) -> None:
    """K = 256: a byte per token behind the count; 12 bits per token as in the paper: 384 bytes for 256 tokens."""
    for tokens in (1, 2, 7, 32):
        coded = codec_of(probe, "one-d-piece", tokens=tokens).encode(images)
        assert {(len(c.data), c.header) for c in coded} == {(1 + tokens, 1)}
    assert [packed_bytes(tokens, 12) - 1 for tokens in (8, 16, 128, 256)] == [12, 24, 192, 384]


def test_shorter_strings_are_prefixes_and_lengths_can_be_mixed(images: Tensor) -> None:
    net = Tokenizer(OneDPiece(layers=1, width=32, patch=8).size, 0).eval().requires_grad_(False)
    strings = {keep: [c.data for c in TokenCodec(net, keep).encode(images[:4])] for keep in (3, 8)}
    assert all(short[1:] == whole[1:4] for short, whole in zip(strings[3], strings[8], strict=True))
    codec = TokenCodec(net, 3)
    mixed = codec.decode([strings[3][0], strings[8][1], strings[3][2]])
    assert torch.equal(mixed[[0, 2]], codec.decode([strings[3][0], strings[3][2]]))
    assert torch.equal(mixed[1], codec.decode([strings[8][1]])[0])


@pytest.mark.parametrize("name", CODECS)
def test_bits_per_pixel_come_from_the_length_of_the_strings(probe: CodecProbe, name: str) -> None:
    method = build(name, {})
    assert isinstance(method, ImageCodecMethod)
    prepared = probe.prepared(method, 0)
    coded = method.codec(probe.model.info, prepared).encode(to_bytes(probe._images))
    sizes = [len(c.data) for c in coded]
    with method.apply(probe.model, prepared):
        probe.cost()
        found = method.footprint(probe.model, probe.ctx)
    assert found["codec_bytes"] == pytest.approx(np.mean(sizes))
    assert found["bits_per_pixel"] == pytest.approx(8 * np.mean(sizes) / (32 * 32))
    assert found["raw_bytes"] == 32 * 32 * 3
    assert found["ratio"] == pytest.approx(3072 / np.mean(sizes))
    assert found["codec_payload_bytes"] == pytest.approx(np.mean([len(c.data) - c.header for c in coded]))


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_rate_does_not_fall_and_error_does_not_rise_with_quality(probe: CodecProbe, images: Tensor, name: str) -> None:
    sizes, errors = [], []
    for quality in (1, 5, 20, 50, 80, 95):
        codec = codec_of(probe, name, quality=quality)
        coded = codec.encode(images)
        sizes.append(sum(len(c.data) for c in coded))
        errors.append(float(mse(codec.decode([c.data for c in coded]) / 255, images / 255).mean()))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert errors == sorted(errors, reverse=True)


def test_png_is_lossless_in_pixels_and_in_predictions(probe: CodecProbe, images: Tensor) -> None:
    codec = codec_of(probe, "png")
    decoded = codec.decode([c.data for c in codec.encode(images)])
    assert torch.equal(decoded, images)
    assert torch.isinf(psnr(decoded / 255, images / 255)).all()
    rows = range(probe.examples)
    bare = probe.outputs(rows)
    with build("png", {}).apply(probe.model, None):
        assert torch.equal(probe.outputs(rows), bare)


@pytest.mark.parametrize("name", ["jpeg", "webp", "png"])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 17, 30), (1, 32, 32), (1, 5, 9)])
def test_files_keep_odd_sizes_and_grey_images(
    probe: CodecProbe, images: Tensor, name: str, channels: int, height: int, width: int
) -> None:
    part = images[:2, :channels, :height, :width]
    whole = codec_of(probe, name)
    assert isinstance(whole, FileCodec)
    codec = FileCodec(whole.format, channels, whole.header, whole.options)
    decoded = codec.decode([c.data for c in codec.encode(part)])
    assert decoded.shape == part.shape
    assert decoded.dtype == torch.uint8


def without_scan(file: bytes) -> bytes:
    """A JPEG file up to the data of its scan, found by its marker."""
    start = file.index(b"\xff\xda")
    return file[: start + 2 + int.from_bytes(file[start + 2 : start + 4], "big")]


@pytest.mark.parametrize("optimise", [False, True])
def test_jpeg_headers_are_what_two_images_have_in_common(probe: CodecProbe, images: Tensor, optimise: bool) -> None:
    files = [c.data for c in codec_of(probe, "jpeg", optimise=optimise, quality=20).encode(images[:2])]
    starts = [without_scan(file) for file in files]
    counted = [jpeg_header(file, own_tables=optimise) for file in files]
    assert counted[0] == counted[1]
    tables = sum(_segments(starts[0]).get(0xC4, []))
    assert counted[0] == len(starts[0]) + 2 - (tables if optimise else 0)
    assert (starts[0] == starts[1]) == (not optimise)
    assert tables == 432 if not optimise else tables < 432


def _segments(start: bytes) -> dict[int, list[int]]:
    """Lengths of the segments by marker, of the part of a file before its scan's data."""
    place, found = 2, dict[int, list[int]]()
    while place < len(start):
        length = 2 + int.from_bytes(start[place + 2 : place + 4], "big")
        found.setdefault(start[place + 1], []).append(length)
        place += length
    assert place == len(start)
    return found


def test_components_are_orthonormal_and_approximate_like_a_full_decomposition() -> None:
    x = torch.from_numpy(next(ImageSet("digits", "train", 256, 0.0, 0).images()))
    x = torch.cat([x, x.flip(-1)])
    basis = fit_basis(x)
    rows = basis.rows_RI.double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(256, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(basis.mean_I, x.flatten(1).mean(0))
    scores = (x.flatten(1) - basis.mean_I) @ basis.rows_RI.T
    torch.testing.assert_close(scores.square().mean(0).sqrt(), basis.deviation_R, rtol=1e-3, atol=1e-4)
    errors = []
    for keep in (1, 4, 16, 64):
        codec = ComponentCodec(basis, keep, 10)
        decoded = codec.decode([c.data for c in codec.encode(to_bytes(x))]).float() / 255
        errors.append(float((decoded - x).square().mean()))
        rest = float((x.flatten(1) - basis.mean_I).square().mean() - scores[:, :keep].square().sum(1).mean() / 3072)
        assert errors[-1] == pytest.approx(rest, rel=0.08)
    assert errors == sorted(errors, reverse=True)


def test_downsampling_stores_means_of_squares(probe: CodecProbe) -> None:
    flat = torch.full((1, 3, 32, 32), 40, dtype=torch.uint8)
    flat[:, 1, :4, :4] = torch.arange(16, dtype=torch.uint8).view(4, 4)
    codec = codec_of(probe, "downsample", factor=4)
    (coded,) = codec.encode(flat)
    assert len(coded.data) == 3 * 8 * 8
    samples = np.frombuffer(coded.data, np.uint8).reshape(3, 8, 8)
    assert samples[1, 0, 0] == 8  # 7.5, to even
    assert set(np.delete(samples.flatten(), 64).tolist()) == {40}
    same: Callable[[Tensor], Tensor] = lambda x: codec_of(probe, "downsample", factor=1).decode(  # noqa: E731
        [c.data for c in codec_of(probe, "downsample", factor=1).encode(x)]
    )
    assert torch.equal(same(flat), flat)
