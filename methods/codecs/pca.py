"""Principal components with rounded coefficients: what a linear tokenizer reaches at the same bits.

Shape suffixes: N images, B batch, C channels, H height, W width, I numbers per image (C·H·W), R components, M kept ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Method
from isoflop.methods.codecs.base import ImageCodecMethod, codec_info
from isoflop.methods.codecs.packing import COUNT_BYTES, MOST_CODES, read_codes, write_codes
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.pixels import ImageCodec, to_bytes
from isoflop.models.hooks.signals import Coded
from isoflop.models.vit import LABELLED_IMAGES, VitInfo
from isoflop.models.worlds import sprite_world as world

RANGE = 3.0
"""Coefficients are rounded within so many standard deviations of their component, and clipped outside."""


@METHODS.register("pca-codec")
@dataclass(frozen=True)
class PcaCodec(ImageCodecMethod):
    """The first coefficients in the basis of the training images' principal components, rounded to ``bits`` bits each.

    An image costs one byte for the count and ⌈components · bits / 8⌉ bytes.
    """

    needs: ClassVar[frozenset[str]] = frozenset({LABELLED_IMAGES})

    components: Annotated[
        int, Knob(low=1, high=MOST_CODES, log=True, ratio=True, unit="numbers", doc="kept coefficients")
    ] = 8
    bits: Annotated[int, Knob(low=1, high=16, unit="bits", doc="per coefficient")] = 6
    examples: Annotated[int, Knob(low=MOST_CODES + 1, high=2048, log=True, doc="training images")] = 1024

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> PcaStage:
        """The basis; equal for all values of ``components`` and ``bits``."""
        data = codec_info(info).data
        assert data is not None, "the offer labelled-images says that there are images"
        return PcaStage(data, self.examples, seed, world.VERSION)

    def codec(self, info: VitInfo, prepared: Any) -> ComponentCodec:
        """The basis, cut to ``components``."""
        if not isinstance(prepared, Basis):
            raise TypeError("not a basis of principal components")
        return ComponentCodec(prepared, self.components, self.bits)


@dataclass(frozen=True)
class Basis:
    """Mean image, components as orthonormal rows, and standard deviations of their coefficients, largest first."""

    mean_I: Tensor
    rows_RI: Tensor
    deviation_R: Tensor


@dataclass(frozen=True)
class PcaStage(Stage):
    """Principal components of training images."""

    version: ClassVar[str] = "1"
    kind: ClassVar[str] = "image-components"

    data: str
    examples: int
    seed: int
    images: str

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Decompose and save."""
        from safetensors.torch import save_file

        images = world.ImageSet(self.data, "train", self.examples, 0.0, derive_seed("component images", self.seed))
        basis = fit_basis(torch.from_numpy(np.concatenate(list(images.images()))))
        save_file(vars(basis), folder / "basis.safetensors")

    def load(self, ctx: StageContext, folder: Path) -> Basis:
        """The basis, on the CPU."""
        from safetensors.torch import load_file

        return Basis(**load_file(folder / "basis.safetensors"))


def fit_basis(images_NCHW: Tensor) -> Basis:
    """The first 256 principal components of images in [0, 1]."""
    x_NI = images_NCHW.flatten(1).double()
    mean_I = x_NI.mean(0)
    centred_NI = x_NI - mean_I
    # images are fewer than numbers per image, so that their products are the smaller problem
    energy_N, left_NN = torch.linalg.eigh(centred_NI @ centred_NI.T)
    scale_R, left_NR = energy_N.flip(0)[:MOST_CODES].sqrt(), left_NN.flip(1)[:, :MOST_CODES]
    rows_RI = left_NR.T @ centred_NI / scale_R[:, None]
    return Basis(mean_I.float(), rows_RI.float().contiguous(), (scale_R / len(x_NI) ** 0.5).float())


@dataclass(frozen=True)
class ComponentCodec(ImageCodec):
    """Rounded coefficients as a codec.

    Args:
        basis: shared by encoder and decoder.
        keep: coefficients that are written.
        bits: per coefficient.
    """

    basis: Basis
    keep: int
    bits: int

    def encode(self, images_BCHW: Tensor) -> list[Coded]:
        """The count, and the packed numbers of the intervals that coefficients lie in."""
        x_BI = images_BCHW.cpu().flatten(1).float() / 255
        scores_BM = (x_BI - self.basis.mean_I) @ self.basis.rows_RI[: self.keep].T
        levels_BM = (scores_BM / self._step(self.keep)).floor().long() + 2**self.bits // 2
        codes_BM = levels_BM.clamp(0, 2**self.bits - 1).numpy()
        return [Coded(write_codes(codes_M, self.bits), COUNT_BYTES) for codes_M in codes_BM]

    def decode(self, data: Sequence[bytes]) -> Tensor:
        """Images of the intervals' centres."""
        images = []
        for string in data:
            codes_M = torch.from_numpy(read_codes(string, self.bits))
            count = len(codes_M)
            scores_M = (codes_M - 2**self.bits // 2 + 0.5) * self._step(count)
            images.append(self.basis.mean_I + scores_M @ self.basis.rows_RI[:count])
        return to_bytes(torch.stack(images)).unflatten(1, (world.CHANNELS, world.SIDE, world.SIDE))

    def tensors(self) -> tuple[Tensor, ...]:
        """The basis as far as ``keep`` uses it."""
        return self.basis.mean_I, self.basis.rows_RI[: self.keep], self.basis.deviation_R[: self.keep]

    def _step(self, count: int) -> Tensor:
        """Width of an interval of the first coefficients."""
        return self.basis.deviation_R[:count] * (2 * RANGE / 2**self.bits)
