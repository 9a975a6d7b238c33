"""The conformance suite's model for codecs: an untrained tiny ViT and a few 8-bit images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import Method, build
from isoflop.methods.codecs.base import ImageCodecMethod
from isoflop.methods.codecs.one_d_piece import OneDPiece
from isoflop.methods.codecs.tokenizer_training import TokenizerStage
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.methods.vit_tokens.probe import untrained_model
from isoflop.models.hooks.pixels import PIXELS, ImageCodec, to_bytes
from isoflop.models.networks.image_tokenizer import Tokenizer
from isoflop.models.vit import VitModel
from isoflop.models.worlds.sprite_world import ImageSet


class CodecProbe(Probe):
    """Logits of an untrained ``tiny-vit`` on 8-bit sprites; the cost is the bytes of an image.

    A decoded sample that lies between two grey levels is rounded to either, by the last bit of what was added up in which order.
    One such sample moves the logits by up to 3.3e-4 of the largest, which the tolerance allows for three.
    """

    tolerance = 1e-3

    def __init__(self, size: str = "c48", examples: int = 8) -> None:
        self.model: VitModel = untrained_model(size)
        self.ctx = FolderContext.temporary()
        self.examples = examples
        images_BCHW = torch.from_numpy(next(ImageSet("sprites", "train", examples, 0.0, seed=0).images()))
        self._images = to_bytes(images_BCHW).float() / 255

    def prepared(self, method: Method, seed: int) -> Any:
        """An untrained tokenizer, or what the method's stage computes in a moment."""
        stage = method.prepare(self.model.info, None, seed)
        if isinstance(stage, TokenizerStage):
            return _untrained(stage)
        return None if stage is None else self.ctx.get(stage)

    def forget(self) -> None:
        """Compute everything anew."""
        self.ctx = FolderContext.temporary()
        _untrained.cache_clear()

    def trained(self, method: Method, prepared: Any) -> Any:
        """The tokenizer's recipe."""
        return vars(method.recipe) if isinstance(method, OneDPiece) else None

    def verify(self, method: Method, prepared: Any) -> None:
        """Bytes are all that a decoder needs: each image decodes alone to what the batch gave, in its own size.

        What the codec holds besides is counted: no tensor that can be reached from it is missing in ``tensors``.
        """
        assert isinstance(method, ImageCodecMethod)
        codec = method.codec(self.model.info, prepared)
        counted = {t.untyped_storage().data_ptr() for t in codec.tensors()}
        missing = [tuple(t.shape) for t in reachable(codec) if t.untyped_storage().data_ptr() not in counted]
        assert not missing, f"tensors of shapes {missing} are held, but tensors() does not name them"
        images_BCHW = to_bytes(self._images)
        coded = codec.encode(images_BCHW)
        together_BCHW = codec.decode([code.data for code in coded])
        assert together_BCHW.shape == images_BCHW.shape, (
            f"{tuple(images_BCHW.shape)} became {tuple(together_BCHW.shape)}"
        )
        assert together_BCHW.dtype == torch.uint8, f"decoded images are {together_BCHW.dtype}"
        for code, decoded_CHW in zip(coded, together_BCHW, strict=True):
            assert 0 <= code.header < len(code.data), f"{code.header} header bytes of {len(code.data)}"
            difference = (codec.decode([code.data])[0].int() - decoded_CHW.int()).abs().max()
            assert difference <= 1, f"an image decoded alone differs by {difference} grey levels"

    def absolute(self) -> Sequence[AbsoluteCost]:
        """Images of 3·32·32 samples at a byte each; means of squares of 2 by 2 pixels leave 3·16·16, without a header."""
        method = build("downsample", {"factor": 2})
        return (
            AbsoluteCost(method, "cost", 3 * 16 * 16),
            AbsoluteCost(method, "codec_bytes", 3 * 16 * 16),
            AbsoluteCost(method, "raw_bytes", 3 * 32 * 32),
            AbsoluteCost(method, "bits_per_pixel", 8 * 3 * 16 * 16 / 32**2),
        )

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Class logits, (B, K)."""
        index = torch.tensor(list(rows))
        return self.model.classify(self.model.seen(self._images[index], index), index)

    def cost(self) -> float:
        """Bytes of an image, a mean over the examples: of its string, or of 8-bit samples without a codec."""
        self.model.seen(self._images, torch.arange(self.examples))
        run = self.model.occupant(PIXELS)
        return float(self._images[0].numel()) if run is None else run.bytes().coded


def reachable(value: object) -> Iterator[Tensor]:
    """Tensors with elements in a value: in modules (parameters and buffers), dataclasses, sequences and mappings."""
    if isinstance(value, Tensor):
        if value.numel():
            yield value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from reachable([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, Mapping):
        yield from reachable(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from reachable(part)
    elif isinstance(value, ImageCodec):
        yield from reachable(vars(value))


@lru_cache(maxsize=64)
def _untrained(stage: TokenizerStage) -> Tokenizer:
    return stage.untrained().eval().requires_grad_(False)
