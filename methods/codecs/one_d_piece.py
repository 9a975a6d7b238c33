"""One-D-Piece: an image as an ordered string of tokens that can be cut anywhere (arXiv 2501.10064).

Shape suffixes: B batch, C channels, H height, W width, L latent tokens, M kept ones, D token width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.codecs.base import ImageCodecMethod, codec_info
from isoflop.methods.codecs.packing import COUNT_BYTES, MOST_CODES, packed_bytes, read_codes, write_codes
from isoflop.methods.codecs.tokenizer_training import Recipe, TokenizerStage
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.pixels import ImageCodec, to_bytes
from isoflop.models.hooks.signals import Coded
from isoflop.models.networks.image_tokenizer import Tokenizer, TokenizerSize
from isoflop.models.networks.quantizers import KINDS
from isoflop.models.vit import LABELLED_IMAGES, VitInfo
from isoflop.models.worlds import sprite_world as world

DROPS = {"uniform": "every", "pow2": "powers", "none": "full"}
"""The knob ``tail_drop`` as kinds of ``BudgetSampler``."""
HEAD = 16
"""Channels per attention head."""


@METHODS.register("one-d-piece")
@dataclass(frozen=True)
class OneDPiece(ImageCodecMethod):
    """The first ``tokens`` of L codes of a trained tokenizer, packed; one training serves every count.

    1. Patches, a class token and L learned latent tokens pass a transformer with full attention; the latent tokens are
       projected to D numbers each.
    2. Each is replaced by its nearest codebook row, both scaled to length 1; gradients pass straight through.
    3. Tail drop, in training only, behind the quantizer: a length is drawn and the tokens behind it are cut off; the
       quantizer's loss still sees all.
    4. The kept tokens, with mask tokens in place of the patches, pass a second transformer, and a head gives the patches.

    An image costs one byte for the count and ⌈tokens · log2 K / 8⌉ bytes.

    Different from the release: the networks are small; the loss is the squared error of pixels from the start, where the
    release first predicts the codes of a pretrained tokenizer and then trains a convolutional pixel decoder with
    perceptual and adversarial losses (what remains of its stage two is that encoder and codebook are frozen for the last
    ``second`` of the steps); no average of the weights is kept; codes that fall out of use early are revived
    (``revive``). The released encoder reads its latent tokens through a reshape that mixes tokens and channels before the
    projection; here, as the paper says, each token is projected by itself.
    """

    paper: ClassVar[str] = "arXiv 2501.10064"
    needs: ClassVar[frozenset[str]] = frozenset({LABELLED_IMAGES})

    tokens: Annotated[
        int, Knob(low=1, high=MOST_CODES, log=True, ratio=True, unit="tokens", doc="kept, at most n_latent")
    ] = 8
    tail_drop: Annotated[
        str,
        Knob(choices=tuple(DROPS), doc="lengths drawn in training: 1 … n_latent, powers of two, or always n_latent"),
    ] = "uniform"
    drop_scope: Annotated[
        str, Knob(choices=("batch", "sample"), doc="one length for a batch, as released, or one for every image")
    ] = "batch"
    n_latent: Annotated[int, Knob(low=1, high=MOST_CODES, log=True, unit="tokens", doc="L, of the whole code")] = 32
    codebook_size: Annotated[int, Knob(choices=(16, 64, 256, 1024, 4096), doc="K")] = 256
    quantizer: Annotated[
        str,
        Knob(choices=KINDS, doc="a learned codebook, or finite scalar quantization, which has no use for token_dim"),
    ] = "vq"
    token_dim: Annotated[int, Knob(low=1, high=256, log=True, doc="D, numbers per token of a learned codebook")] = 12
    l2_norm: Annotated[bool, Knob(doc="a learned codebook compares directions")] = True
    patch: Annotated[int, Knob(choices=(2, 4, 8, 16), unit="pixels", doc="side of a patch")] = 8
    width: Annotated[int, Knob(choices=(32, 64, 96, 128, 256), doc="of both transformers; heads have 16 channels")] = 64
    layers: Annotated[int, Knob(low=1, high=24, log=True, doc="of each transformer")] = 2
    steps: Annotated[int, Knob(low=1, high=1_000_000, log=True, doc="optimiser steps")] = 1500
    batch: Annotated[int, Knob(choices=(8, 16, 32, 64, 128, 256), doc="images per step")] = 32
    lr: Annotated[float, Knob(low=1e-5, high=1e-1, log=True, doc="peak learning rate")] = 3e-3
    second: Annotated[float, Knob(low=0.0, high=0.9, doc="share of the steps with encoder and codebook frozen")] = 0.2
    quantizer_weight: Annotated[
        float, Knob(low=0.0, high=10.0, doc="of the quantizer's loss; the pixels' is their squared error in [-1, 1]")
    ] = 0.1
    revive: Annotated[
        int, Knob(low=0, high=10_000, doc="codes unused for so many steps move to where latents are; 0 never")
    ] = 25

    def axes(self, info: ModelInfo) -> Axes:
        """A byte for the count, and the packed codes; raw bytes over them."""
        size = packed_bytes(self.tokens, math.ceil(math.log2(self.codebook_size)))
        geometry = info.geometry
        return Axes(bytes=float(size), ratio=geometry["channels"] * geometry["image_side"] ** 2 / size)

    def check(self, info: ModelInfo) -> None:
        """Refuse more tokens than the code has."""
        super().check(info)
        if self.tokens > self.n_latent:
            raise Infeasible(
                f"method {self.name}: tokens = {self.tokens} exceeds n_latent = {self.n_latent}; allowed: 1 … {self.n_latent}"
            )

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> TokenizerStage:
        """The training, on the kind of images that the model classifies; equal for all values of ``tokens``."""
        data = codec_info(info).data
        assert data is not None, "the offer labelled-images says that there are images"
        return TokenizerStage(_fields(self.size), _fields(self.recipe), data, seed, world.VERSION)

    @property
    def size(self) -> TokenizerSize:
        """Shape of the networks; knobs of a learned codebook are left out for the other quantizer."""
        learned = self.quantizer == "vq"
        return TokenizerSize(
            side=world.SIDE,
            channels=world.CHANNELS,
            patch=self.patch,
            tokens=self.n_latent,
            codes=self.codebook_size,
            quantizer=self.quantizer,
            token_width=self.token_dim if learned else 0,
            normalise=self.l2_norm and learned,
            width=self.width,
            layers=self.layers,
            heads=self.width // HEAD,
        )

    @property
    def recipe(self) -> Recipe:
        """The training."""
        return Recipe(
            steps=self.steps,
            batch=self.batch,
            lr=self.lr,
            drop=DROPS[self.tail_drop],
            each=self.drop_scope == "sample" and self.tail_drop != "none",
            second=self.second,
            quantizer_weight=self.quantizer_weight if self.quantizer == "vq" else 0.0,
            revive=self.revive if self.quantizer == "vq" else 0,
        )

    def codec(self, info: VitInfo, prepared: Any) -> TokenCodec:
        """The trained tokenizer, cut to ``tokens``."""
        if not isinstance(prepared, Tokenizer):
            raise TypeError("not the tokenizer of One-D-Piece")
        return TokenCodec(prepared, self.tokens)

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Besides the bytes the number of tokens of an image."""
        return {**super().footprint(model, ctx), "codec_tokens": float(self.tokens)}


@dataclass(frozen=True)
class TokenCodec(ImageCodec):
    """A tokenizer as a codec.

    Args:
        tokenizer: trained, shared by encoder and decoder.
        keep: tokens that ``encode`` writes. ``decode`` reads how many there are from the bytes.
    """

    tokenizer: Tokenizer
    keep: int

    def encode(self, images_BCHW: Tensor) -> list[Coded]:
        """The count, and the first codes packed."""
        bits = self.tokenizer.quantizer.bits
        with torch.no_grad():
            codes_BL = self.tokenizer.encode(self._floats(images_BCHW)).cpu().numpy()
        return [Coded(write_codes(codes_L[: self.keep], bits), COUNT_BYTES) for codes_L in codes_BL]

    def decode(self, data: Sequence[bytes]) -> Tensor:
        """Images of strings of any lengths; equal lengths share a pass."""
        codes = [read_codes(string, self.tokenizer.quantizer.bits) for string in data]
        size = self.tokenizer.size
        images_BCHW = torch.zeros(len(data), size.channels, size.side, size.side, dtype=torch.uint8)
        for length in sorted({len(codes_M) for codes_M in codes}):
            rows = [row for row, codes_M in enumerate(codes) if len(codes_M) == length]
            codes_RM = torch.from_numpy(np.stack([codes[row] for row in rows])).to(self._device)
            with torch.no_grad():
                images_BCHW[rows] = to_bytes(self.tokenizer.decode(codes_RM)).cpu()
        return images_BCHW

    def tensors(self) -> list[Tensor]:
        """The whole tokenizer, whatever ``keep`` is: encoder, quantizer and decoder, and places of tokens that are cut off."""
        return [*self.tokenizer.parameters(), *self.tokenizer.buffers()]

    @property
    def _device(self) -> torch.device:
        return next(self.tokenizer.parameters()).device

    def _floats(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.to(self._device).float() / 255


@torch.no_grad()
def contributions(tokenizer: Tokenizer, images_BCHW: Tensor, seed: int = 0) -> Tensor:
    """How much each token matters, (L,): mean squared change of the image when its code is replaced by a random one.

    Args:
        images_BCHW: values in [0, 1].
        seed: of the random codes.
    """
    codes_BL = tokenizer.encode(images_BCHW)
    whole_BCHW = tokenizer.decode(codes_BL)
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for place in range(codes_BL.shape[1]):
        changed_BL = codes_BL.clone()
        changed_BL[:, place] = torch.randint(tokenizer.quantizer.codes, (len(codes_BL),), generator=generator)
        changes.append((tokenizer.decode(changed_BL) - whole_BCHW).square().mean())
    return torch.stack(changes)


def _fields(settings: TokenizerSize | Recipe) -> tuple[tuple[str, Any], ...]:
    return tuple(dataclasses.asdict(settings).items())
