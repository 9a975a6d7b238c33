"""Quantizers of learned tokenizers: a latent vector becomes one of K codes, with a gradient that passes straight through.

Shape suffixes: B batch, L tokens, D token width, K codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("vq", "fsq")
COMMITMENT = 0.25
"""Weight of the encoder's part of the loss of a codebook."""


@dataclass(frozen=True)
class Quantized:
    """Quantized latents.

    Attributes:
        values_BLD: what the decoder sees; the gradient with respect to them reaches the encoder unchanged.
        indices_BL: the codes, int64.
        inputs_BLD: what was compared with the codebook: normalised latents where the quantizer normalises.
        loss: that moves codebook and encoder towards each other; 0 where there is no codebook to train.
    """

    values_BLD: Tensor
    indices_BL: Tensor
    inputs_BLD: Tensor
    loss: Tensor


class Quantizer(nn.Module, ABC):
    """Base class: K codes of ``width`` numbers.

    Attributes:
        codes: K, a power of two, so that a code packs into ``bits`` bits without waste.
        width: D, numbers per latent.
    """

    codes: int
    width: int

    @property
    def bits(self) -> int:
        """Bits per code, ⌈log2 K⌉."""
        return (self.codes - 1).bit_length()

    @abstractmethod
    def forward(self, z_BLD: Tensor) -> Quantized:
        """Quantize latents."""

    @abstractmethod
    def lookup(self, indices_BL: Tensor) -> Tensor:
        """Values (B, L, D) of codes, as ``forward`` gives them."""


class VectorQuantizer(Quantizer):
    """Nearest row of a learned codebook (VQ-VAE), in float32 whatever the autocast mode.

    With ``normalise`` latents and rows are scaled to length 1 first, so that the nearest row is the one of the largest
    cosine. The loss is ``COMMITMENT`` · mean (sg[q] - z)² + mean (q - sg[z])²; the codebook learns by gradient.

    Args:
        codes: K.
        width: D.
        normalise: compare directions.
    """

    def __init__(self, codes: int, width: int, normalise: bool = True) -> None:
        super().__init__()
        self.codes, self.width, self.normalise = codes, width, normalise
        self.codebook_KD = nn.Parameter(torch.empty(codes, width).uniform_(-1 / codes, 1 / codes))

    def forward(self, z_BLD: Tensor) -> Quantized:
        """The nearest rows."""
        with torch.autocast(z_BLD.device.type, enabled=False):
            z_BLD = self._scaled(z_BLD.float())
            rows_KD = self._scaled(self.codebook_KD.float())
            indices_BL = self.nearest(z_BLD.detach(), rows_KD.detach())
            q_BLD = F.embedding(indices_BL, rows_KD)
            loss = COMMITMENT * F.mse_loss(z_BLD, q_BLD.detach()) + F.mse_loss(q_BLD, z_BLD.detach())
            return Quantized(z_BLD + (q_BLD - z_BLD).detach(), indices_BL, z_BLD, loss)

    @staticmethod
    def nearest(z_BLD: Tensor, rows_KD: Tensor) -> Tensor:
        """Index (B, L) of the row with the smallest Euclidean distance; the first of equals."""
        scores_BLK = 2 * z_BLD @ rows_KD.T - rows_KD.square().sum(-1)
        return scores_BLK.argmax(-1)

    def lookup(self, indices_BL: Tensor) -> Tensor:
        """Rows of the codebook, of length 1 where directions are compared."""
        return F.embedding(indices_BL, self._scaled(self.codebook_KD.float()))

    @torch.no_grad()
    def revive(self, used_K: Tensor, z_BLD: Tensor, generator: torch.Generator) -> int:
        """Put the rows that are not ``used_K`` (bool) on latents of a batch, drawn at random; returns how many."""
        unused_U = (~used_K).nonzero()[:, 0]
        latents_ND = z_BLD.detach().flatten(0, 1)
        picked_U = torch.randint(len(latents_ND), (len(unused_U),), generator=generator)
        self.codebook_KD[unused_U] = latents_ND[picked_U].to(self.codebook_KD)
        return len(unused_U)

    def _scaled(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.normalise else x


class FiniteScalarQuantizer(Quantizer):
    """Every number of a latent is bounded and rounded to one of a few levels (FSQ, arXiv 2309.15505); nothing to train.

    With l levels of a number, h = (l - 1)(1 + ε)/2 and o = ½ for even l, otherwise 0: the number z becomes
    round(tanh(z + atanh(o/h))·h - o) / ⌊l/2⌋. The first number is the lowest digit of the index.

    Args:
        levels: of each number; their product is K, their count D.
    """

    MARGIN = 1e-3
    """ε: keeps the outermost values away from .5, where rounding would be a matter of chance."""
    levels_D: Tensor
    basis_D: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.width = len(levels)
        basis = [1]
        for level in levels:
            basis.append(basis[-1] * level)
        self.codes = basis.pop()
        self.register_buffer("levels_D", torch.tensor(levels), persistent=False)
        self.register_buffer("basis_D", torch.tensor(basis), persistent=False)

    def bound(self, z_BLD: Tensor) -> Tensor:
        """Latents squeezed to where rounding gives one of the levels."""
        half_D = (self.levels_D - 1) * (1 + self.MARGIN) / 2
        offset_D = 0.5 * (self.levels_D % 2 == 0)
        return torch.tanh(z_BLD + torch.atanh(offset_D / half_D)) * half_D - offset_D

    def forward(self, z_BLD: Tensor) -> Quantized:
        """Round every number."""
        with torch.autocast(z_BLD.device.type, enabled=False):
            bounded_BLD = self.bound(z_BLD.float())
            half_D = self.levels_D // 2
            rounded_BLD = bounded_BLD.round()
            indices_BL = ((rounded_BLD.long() + half_D) * self.basis_D).sum(-1)
            values_BLD = (bounded_BLD + (rounded_BLD - bounded_BLD).detach()) / half_D
            return Quantized(values_BLD, indices_BL, z_BLD, z_BLD.new_zeros(()))

    def lookup(self, indices_BL: Tensor) -> Tensor:
        """The digits of the index as values."""
        half_D = self.levels_D // 2
        digits_BLD = indices_BL[..., None] // self.basis_D % self.levels_D
        return (digits_BLD - half_D) / half_D


def fsq_levels(codes: int) -> tuple[int, ...]:
    """Levels 4 to 8 (2 or 3 bits each, larger ones first) whose product is K, a power of two of at least 4."""
    bits = codes.bit_length() - 1
    count = -(-bits // 3)
    return tuple(2 ** (bits // count + (place < bits % count)) for place in range(count))


def usage_of(indices: Tensor, codes: int) -> dict[str, float]:
    """How the codes are used: share of K that occurs, perplexity, and entropy in bits per code."""
    counts_K = torch.bincount(indices.flatten(), minlength=codes).double()
    shares_U = counts_K[counts_K > 0] / counts_K.sum()
    entropy = float(-(shares_U * shares_U.log2()).sum())
    return {"usage": len(shares_U) / codes, "perplexity": 2**entropy, "entropy_bits": entropy}
