"""Codec methods: the base class that owns the place in front of a model, where images become bytes and images again."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.pixels import PIXELS, ImageCodec, ImageCodecRun
from isoflop.models.hooks.signals import CodecRun
from isoflop.models.vit import VitInfo

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class ImageCodecMethod(Method):
    """Base class of methods that send images through bytes before the model sees them.

    The model stays as it is: its input is rounded to 8 bits, encoded, decoded from nothing but the bytes, and rounded to 8
    bits again. The ratio is that of raw 8-bit samples to real bytes, headers included; what headers cost, which is
    most of a conventional file on a tiny image, is told beside it.
    """

    family: ClassVar[str] = "codecs"
    ratio_of: ClassVar[str] = "bytes of an image"
    version: ClassVar[str] = "2"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (PIXELS,)

    @abstractmethod
    def codec(self, info: VitInfo, prepared: Any) -> ImageCodec:
        """The codec of this configuration.

        Args:
            prepared: the value of the ``prepare`` stage, or None.
        """

    def check(self, info: ModelInfo) -> None:
        """Refuse models without the hook."""
        super().check(info)
        codec_info(info)

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """Every image goes through the codec."""
        return {PIXELS: ImageCodecRun(self.codec(codec_info(model.info), prepared))}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Real bytes, means over the images that were evaluated since ``apply``.

        ``codec_bytes`` is the length of the byte string, ``codec_payload_bytes`` the same without what is equal for every
        image (see :class:`isoflop.models.hooks.signals.Coded`), ``raw_bytes`` that of 8-bit samples; ``ratio`` and
        ``ratio_payload`` are the raw bytes over either, ``bits_per_pixel`` and ``payload_bits_per_pixel`` eight times
        either over the pixels. ``method_params`` and ``method_bytes`` are elements and bytes of what the codec itself
        must hold (``ImageCodec.tensors``), once for all images; the task has them in ``weight_bytes``, too.
        """
        run = run_of(model)
        mean = run.bytes()
        payload = mean.coded - mean.header
        return {
            "ratio": mean.raw / mean.coded,
            "ratio_payload": mean.raw / payload,
            "raw_bytes": mean.raw,
            "codec_bytes": mean.coded,
            "codec_payload_bytes": payload,
            "bits_per_pixel": 8 * mean.coded / mean.elements,
            "payload_bits_per_pixel": 8 * payload / mean.elements,
            "method_params": float(sum(t.numel() for t in run.codec.tensors())),
            "method_bytes": run.codec.weight_bytes(model.info.dense_bits),
        }

    @classmethod
    def probe(cls) -> Probe:
        """An untrained tiny vision transformer on which the conformance suite runs."""
        from isoflop.methods.codecs.probe import CodecProbe

        return CodecProbe()


def codec_info(info: ModelInfo) -> VitInfo:
    """``info`` as that of an image classifier; Infeasible otherwise."""
    if not isinstance(info, VitInfo):
        raise Infeasible(f"model {info.ref} is no image classifier: codecs do not apply")
    return info


def run_of(model: Model) -> CodecRun:
    """The codec at work in a model.

    Raises:
        ValueError: there is none.
    """
    run = model.occupant(PIXELS)
    if run is None:
        raise ValueError(f"no codec is applied to model {model.info.ref}")
    return run
