"""JPEG, WebP and PNG as real files: the baselines that a learned codec is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.codecs.base import ImageCodecMethod, codec_info
from isoflop.methods.codecs.pictures import MODES, FileCodec, jpeg_header, png_header, webp_header
from isoflop.models.base import ModelInfo
from isoflop.models.vit import VitInfo


@dataclass(frozen=True)
class FileMethod(ImageCodecMethod):
    """Base class of codecs that write every image as a file of its own."""

    def check(self, info: ModelInfo) -> None:
        """Refuse images that are neither grey nor RGB."""
        super().check(info)
        channels = codec_info(info).geometry["channels"]
        if channels not in MODES:
            raise Infeasible(f"method {self.name}: images of {channels} channels; allowed: 1 (grey), 3 (RGB)")


@METHODS.register("jpeg")
@dataclass(frozen=True)
class Jpeg(FileMethod):
    """Baseline JPEG by libjpeg-turbo.

    Marker segments, sizes and quantisation tables are headers, the same for every image. So are the Huffman tables of the
    standard; tables made for the image (``optimise``) are part of its content.
    """

    quality: Annotated[int, Knob(low=1, high=95, ratio=True, doc="scales the quantisation tables")] = 50
    chroma: Annotated[
        str, Knob(choices=("4:2:0", "4:4:4"), doc="colour at half the resolution in both directions, or at the whole")
    ] = "4:2:0"
    optimise: Annotated[bool, Knob(doc="Huffman tables made for the image instead of the standard's")] = True

    def codec(self, info: VitInfo, prepared: Any) -> FileCodec:
        """Pillow's encoder and decoder."""
        options = {"quality": self.quality, "subsampling": self.chroma, "optimize": self.optimise}
        return FileCodec("JPEG", info.geometry["channels"], partial(jpeg_header, own_tables=self.optimise), options)


@METHODS.register("webp")
@dataclass(frozen=True)
class WebP(FileMethod):
    """Lossy WebP (intra frames of VP8) by libwebp; colour always at half the resolution."""

    quality: Annotated[int, Knob(low=0, high=100, ratio=True, doc="of libwebp; 100 is still lossy")] = 50
    effort: Annotated[int, Knob(low=0, high=6, doc="how long the encoder searches, libwebp's method")] = 6

    def codec(self, info: VitInfo, prepared: Any) -> FileCodec:
        """Pillow's encoder and decoder."""
        return FileCodec(
            "WEBP", info.geometry["channels"], webp_header, {"quality": self.quality, "method": self.effort}
        )


@METHODS.register("png")
@dataclass(frozen=True)
class Png(FileMethod):
    """PNG: what the images cost without any loss."""

    @classmethod
    def identity(cls, info: ModelInfo) -> Png:
        """Always: nothing is lost of 8-bit images."""
        return cls()

    def codec(self, info: VitInfo, prepared: Any) -> FileCodec:
        """Pillow's encoder, with all filters and strategies tried, and its decoder."""
        return FileCodec("PNG", info.geometry["channels"], png_header, {"optimize": True})
