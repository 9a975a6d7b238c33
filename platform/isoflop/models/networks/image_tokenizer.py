"""A one-dimensional image tokenizer: patches and learned latent tokens through a transformer, codes out, and back.

The layout of TiTok (arXiv 2406.07550) as One-D-Piece (arXiv 2501.10064) uses it. What the pair of networks learns, and
how many tokens are kept, is up to whoever trains and uses them: this module drops nothing by itself, in training mode
or not.

Shape suffixes: B batch, C channels, H height, W width, P patches, X numbers per patch, L latent tokens, M kept ones (the
first M), D token width, E width of the transformers, N tokens in a transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.models.networks.quantizers import FiniteScalarQuantizer, Quantizer, VectorQuantizer, fsq_levels

POSITION_SCALE = 0.5
"""Deviation of initial places and tokens: large enough that attention tells places apart from the first step on."""


@dataclass(frozen=True)
class TokenizerSize:
    """Shape of a tokenizer.

    Attributes:
        side, channels: of the images.
        patch: side of a patch in pixels; must divide ``side``.
        tokens: L, latent tokens of a whole code.
        codes: K, a power of two.
        quantizer: ``vq`` or ``fsq``.
        token_width: D of ``vq``; ``fsq`` has as many numbers as levels.
        normalise: ``vq`` compares directions.
        width, layers, heads: of the encoder and of the decoder each; their MLPs are four times as wide.
    """

    side: int
    channels: int
    patch: int
    tokens: int
    codes: int
    quantizer: str
    token_width: int
    normalise: bool
    width: int
    layers: int
    heads: int

    @property
    def patches(self) -> int:
        """P."""
        return (self.side // self.patch) ** 2

    @property
    def patch_inputs(self) -> int:
        """X."""
        return self.channels * self.patch**2


class Block(nn.Module):
    """Pre-norm attention and MLP with a residual path around each.

    Args:
        width: E.
        heads: of the attention; must divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_inputs, self.mlp_output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BNE: Tensor, seen_B11N: Tensor | None = None) -> Tensor:
        """``seen_B11N`` (bool) says which tokens can be attended to; all by default."""
        heads = self.inputs(self.norm_1(x_BNE)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=seen_B11N)
        x_BNE = x_BNE + self.output(attended.transpose(1, 2).flatten(2))
        return x_BNE + self.mlp_output(F.gelu(self.mlp_inputs(self.norm_2(x_BNE))))


class Encoder(nn.Module):
    """Patches, a class token and the latent tokens through a transformer with full attention; the latent tokens stay.

    Args:
        size: of the tokenizer.
        token_width: D.
    """

    def __init__(self, size: TokenizerSize, token_width: int) -> None:
        super().__init__()
        self.patch = size.patch
        self.embed = nn.Linear(size.patch_inputs, size.width)
        self.class_1E = _parameter(1, size.width)
        self.places_PE = _parameter(size.patches + 1, size.width)
        self.latents_LE = _parameter(size.tokens, size.width)
        self.latent_places_LE = _parameter(size.tokens, size.width)
        self.norm_in, self.norm_out = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.project = nn.Linear(size.width, token_width)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Latents (B, L, D) of images with values in [-1, 1]."""
        patches_BPE = self.embed(to_patches(images_BCHW, self.patch))
        image_BNE = torch.cat([self.class_1E.expand(len(patches_BPE), 1, -1), patches_BPE], dim=1) + self.places_PE
        latents_BLE = (self.latents_LE + self.latent_places_LE).expand(len(patches_BPE), -1, -1)
        x_BNE = self.norm_in(torch.cat([image_BNE, latents_BLE], dim=1))
        for block in self.blocks:
            x_BNE = block(x_BNE)
        return self.project(self.norm_out(x_BNE[:, image_BNE.shape[1] :]))


class Decoder(nn.Module):
    """A class token, one mask token per patch and the kept tokens through a transformer; the patches stay.

    Args:
        size: of the tokenizer.
        token_width: D.
    """

    def __init__(self, size: TokenizerSize, token_width: int) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Linear(token_width, size.width)
        self.class_1E = _parameter(1, size.width)
        self.mask_1E = _parameter(1, size.width)
        self.places_PE = _parameter(size.patches + 1, size.width)
        self.latent_places_LE = _parameter(size.tokens, size.width)
        self.norm_in, self.norm_out = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.head = nn.Sequential(
            nn.Linear(size.width, 2 * size.width), nn.Tanh(), nn.Linear(2 * size.width, size.patch_inputs)
        )

    def forward(self, q_BMD: Tensor, kept_B: Tensor | None = None) -> Tensor:
        """Images, values about [-1, 1], of the first M tokens, or of the first ``kept_B`` of them by image.

        A token behind ``kept_B`` cannot be attended to, which gives what cutting it off gives, up to rounding.
        """
        count, patches = q_BMD.shape[1], self.size.patches
        blank_PE = torch.cat([self.class_1E, self.mask_1E.expand(patches, -1)]) + self.places_PE
        tokens_BME = self.embed(q_BMD) + self.latent_places_LE[:count]
        x_BNE = self.norm_in(torch.cat([blank_PE.expand(len(q_BMD), -1, -1), tokens_BME], dim=1))
        seen_B11N = None
        if kept_B is not None:
            places_N = torch.arange(x_BNE.shape[1], device=x_BNE.device) - len(blank_PE)
            seen_B11N = (places_N < kept_B[:, None])[:, None, None]
        for block in self.blocks:
            x_BNE = block(x_BNE, seen_B11N)
        patches_BPX = self.head(self.norm_out(x_BNE[:, 1 : 1 + patches]))
        return from_patches(patches_BPX, self.size.patch, self.size.channels)


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder.

    Args:
        size: shape of the networks.
        seed: of the initial weights; torch's global random state is left alone.
    """

    def __init__(self, size: TokenizerSize, seed: int) -> None:
        super().__init__()
        self.size = size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.quantizer: Quantizer = (
                FiniteScalarQuantizer(fsq_levels(size.codes))
                if size.quantizer == "fsq"
                else VectorQuantizer(size.codes, size.token_width, size.normalise)
            )
            self.encoder = Encoder(size, self.quantizer.width)
            self.decoder = Decoder(size, self.quantizer.width)
            for network in (self.encoder, self.decoder):
                _initialise(network, size.layers)

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """Latents (B, L, D), before the quantizer, of images with values in [0, 1]."""
        return self.encoder(2 * images_BCHW - 1)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes (B, L) of images with values in [0, 1]."""
        return self.quantizer(self.latents(images_BCHW)).indices_BL

    def render(self, q_BMD: Tensor, length: int | None = None, kept_B: Tensor | None = None) -> Tensor:
        """Images, not clipped to [0, 1], of quantized tokens: all of them, the first ``length``, or ``kept_B`` by image."""
        return (self.decoder(q_BMD[:, :length], kept_B) + 1) / 2

    def decode(self, codes_BM: Tensor) -> Tensor:
        """Images in [0, 1] of the first M codes."""
        return self.render(self.quantizer.lookup(codes_BM)).clamp(0, 1)

    def freeze_encoder(self) -> None:
        """From now on only the decoder learns: encoder, latent tokens and codebook get no gradients."""
        for part in (self.encoder, self.quantizer):
            part.requires_grad_(False)
            for parameter in part.parameters():
                parameter.grad = None


def to_patches(images_BCHW: Tensor, patch: int) -> Tensor:
    """Patches in reading order, (B, P, X)."""
    return F.unfold(images_BCHW, patch, stride=patch).transpose(1, 2)


def from_patches(patches_BPX: Tensor, patch: int, channels: int) -> Tensor:
    """The square image (B, C, H, W) of patches in reading order."""
    side = patch * round(patches_BPX.shape[1] ** 0.5)
    return F.fold(patches_BPX.transpose(1, 2), (side, side), patch, stride=patch).unflatten(1, (channels,)).contiguous()


@torch.no_grad()
def _initialise(network: nn.Module, layers: int) -> None:
    """Matrices N(0, 1/fan_in), outputs of residual paths also divided by √(2·layers); biases 0.

    With the deviation of .02 that the release takes at its widths, networks as narrow as these stay at the mean image for long.
    """
    for part in network.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(std=part.in_features**-0.5)
            part.bias.zero_()
        if isinstance(part, Block):
            for path in (part.output, part.mlp_output):
                path.weight.normal_(std=(2 * layers * path.in_features) ** -0.5)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(POSITION_SCALE * torch.randn(*shape))
