"""QueCC: query-conditioned compression by window-local cross-attention (arXiv 2411.03312).

Shape suffixes: B batch, P patches, V visual tokens (= windows), K patches of a window, D vision width, M channels of
the concatenated layers, Q question tokens, d language width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.vision_language import vlm_info
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.visual_tokens import CompressedTokens, VisualInput
from isoflop.models.vlm_info import VlmInfo

DEPTHS = (0.50, 0.67, 0.92, 0.96)
"""Relative depths of the layers that keys and values read; 12, 16, 22, 23 of CLIP-L's 24."""


@METHODS.register("quecc")
@dataclass(frozen=True)
class QueCC(VisualTokenMethod):
    """One token per k x k window: the window attends to itself, with a query that knows the question.

    1. x: patch features of the layer that feeds the projector; x_multi: hidden states of several layers side by side.
    2. The question runs through the same language model, text alone, without gradients; the hidden state of its last
       real token gives t, and x + LayerNorm(Linear(t)) goes on.
    3. Queries: MLP, then a depthwise k x k convolution with stride k, one query per window. Keys and values: one MLP
       each on x_multi. MLP is Linear-GELU-Linear-LayerNorm.
    4. Multi-head attention with projections of its own, one query against the k² keys of its window; no residual.

    Layers are taken at the relative depths .50, .67, .92, .96 of the tower, rounded to existing layers, each once: the
    tiny tower has one layer, which leaves the patch embedding (0) and the layer's output (1).

    Inputs are shifted and scaled per channel by statistics of the training images before the first linear layers; that
    changes how they train, not what they can express. A k that does not divide the grid would misalign the windows of
    queries and keys (the released code runs on silently) and is refused.
    """

    paper: ClassVar[str] = "arXiv 2411.03312"
    version: ClassVar[str] = "2"
    commutes: ClassVar[bool] = False

    k: Annotated[int, Knob(low=1, high=64, ratio=True, unit="patches", doc="side of a window; V = (grid / k)²")] = 6
    heads: Annotated[int, Knob(low=1, high=64, log=True, doc="attention heads; must divide the tower's width")] = 8
    text_source: Annotated[
        str,
        Knob(
            choices=("llm_last", "token_mean", "none"),
            doc="what the query knows of the question: its last hidden state in the language model, its mean token embedding, nothing",
        ),
    ] = "llm_last"
    lr: Annotated[float, Knob(low=1e-5, high=1e-1, log=True, doc="learning rate of the compressor's weights")] = 1e-3

    @property
    def learning_rate(self) -> float:
        """The knob ``lr``."""
        return self.lr

    def check(self, info: ModelInfo) -> None:
        """Refuse windows that do not tile the grid, and heads that do not divide the width."""
        super().check(info)
        width = vlm_info(info).geometry["vision_width"]
        if width % self.heads:
            raise Infeasible(
                f"method quecc: heads = {self.heads} does not divide the vision width {width}; allowed: {_divisors(width)}"
            )

    def tokens_left(self, grid: int) -> int:
        """(grid / k)²."""
        if grid % self.k:
            raise Infeasible(
                f"method quecc: k = {self.k} does not divide the {grid}x{grid} patch grid; allowed: {_divisors(grid)}"
            )
        return (grid // self.k) ** 2

    def layers(self, info: VlmInfo) -> tuple[int, ...]:
        """Layers at the relative depths, each once."""
        return layers_at(DEPTHS, info.geometry["vision_layers"])

    def build(self, info: VlmInfo) -> QueCCModule:
        """The compressor's weights for a model's widths."""
        geometry = info.geometry
        text_width = geometry["width"] if self.text_source != "none" else None
        return QueCCModule(geometry["vision_width"], self.layers(info), text_width, self.k, self.heads)

    def fit_inputs(self, module: nn.Module, view: VisualInput) -> None:
        """Channel means and deviations of the training images."""
        if not isinstance(module, QueCCModule):
            raise TypeError("not a QueCC module")
        module.scale_x.fit(view.x_BPD)
        module.scale_multi.fit(module.multi(view))

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        """One token per window, in raster order of the windows."""
        if not isinstance(module, QueCCModule):
            raise TypeError("not a QueCC module")
        return CompressedTokens(module(view.x_BPD, module.multi(view), self._text(view), view.grid))

    def _text(self, view: VisualInput) -> Tensor | None:
        if self.text_source == "none":
            return None
        if view.question_BQ is None:
            raise Infeasible(
                f"method quecc: text_source = {self.text_source} needs a question, and this task asks none; use none"
            )
        if self.text_source == "token_mean":
            return masked_mean(view.embed_text(view.question_BQ), view.question_mask_BQ)
        return last_real(view.encode_text(view.question_BQ, view.question_mask_BQ), view.question_mask_BQ)


class QueCCModule(nn.Module):
    """The compressor's weights and its forward pass.

    Args:
        width: D, of the vision tower.
        layers: numbers of the tower's hidden states that make x_multi.
        text_width: d, of the language model; None for a compressor that does not see the question.
        k: side of a window.
        heads: of the attention.
    """

    def __init__(self, width: int, layers: tuple[int, ...], text_width: int | None, k: int, heads: int) -> None:
        super().__init__()
        self.k = k
        self.layers = layers
        self.scale_x = ChannelScale(width)
        self.scale_multi = ChannelScale(len(layers) * width)
        self.text = None if text_width is None else nn.Sequential(nn.Linear(text_width, width), _norm(width))
        self.query = _mlp(width, width)
        self.key = _mlp(len(layers) * width, width)
        self.value = _mlp(len(layers) * width, width)
        self.downsample = nn.Conv2d(width, width, kernel_size=k, stride=k, groups=width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def multi(self, view: VisualInput) -> Tensor:
        """x_multi: the hidden states of ``layers`` side by side, (B, P, M)."""
        return torch.cat([view.hidden[layer] for layer in self.layers], dim=-1)

    def forward(self, x_BPD: Tensor, multi_BPM: Tensor, text_Bd: Tensor | None, grid: int) -> Tensor:
        """Tokens (B, V, D) of patch features (B, P, D), multi-layer features (B, P, M) and the question (B, d)."""
        x_BPD = self.scale_x(x_BPD)
        if self.text is not None:
            x_BPD = x_BPD + self.text(text_Bd)[:, None]
        multi_BPM = self.scale_multi(multi_BPM)
        q_BDgg = self.query(x_BPD).transpose(1, 2).unflatten(2, (grid, grid))
        q_BVD = self.downsample(q_BDgg).flatten(2).transpose(1, 2)
        batch, windows, width = q_BVD.shape
        q = q_BVD.reshape(batch * windows, 1, width)
        keys, values = (fold_windows(mlp(multi_BPM), grid, self.k) for mlp in (self.key, self.value))
        tokens, _ = self.attention(q, keys, values, need_weights=False)
        return tokens.view(batch, windows, width)


class ChannelScale(nn.Module):
    """Shift and scale per channel, fixed after ``fit``; the identity before."""

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("std_D", torch.ones(width))

    @torch.no_grad()
    def fit(self, x_BPD: Tensor) -> None:
        """Take mean and deviation of each channel."""
        self.mean_D.copy_(x_BPD.mean((0, 1)))
        self.std_D.copy_(x_BPD.std((0, 1)).clamp(min=1e-6))

    def forward(self, x_BPD: Tensor) -> Tensor:
        """Channels with mean 0 and deviation 1, as far as the batch is like the training images."""
        return (x_BPD - self.mean_D) / self.std_D


def layers_at(depths: Sequence[float], count: int) -> tuple[int, ...]:
    """Hidden-state numbers at relative depths of a tower with ``count`` layers, ascending, each once."""
    return tuple(sorted({round(depth * count) for depth in depths}))


def fold_windows(x_BPD: Tensor, grid: int, k: int) -> Tensor:
    """(B, P, D) in raster order → (B·V, k², D), windows in raster order, patches of a window in raster order."""
    side = grid // k
    return x_BPD.unflatten(1, (side, k, side, k)).transpose(2, 3).flatten(0, 2).flatten(1, 2)


def last_real(h_BQd: Tensor, mask_BQ: Tensor | None) -> Tensor:
    """Hidden state of the last token whose mask is 1, whichever side is padded: (B, Q, d) → (B, d)."""
    if mask_BQ is None:
        return h_BQd[:, -1]
    places_Q = torch.arange(mask_BQ.shape[1], device=mask_BQ.device)
    last_B = (mask_BQ * places_Q).argmax(-1)
    return h_BQd[torch.arange(len(h_BQd), device=h_BQd.device), last_B]


def masked_mean(h_BQd: Tensor, mask_BQ: Tensor | None) -> Tensor:
    """Mean over the tokens whose mask is 1: (B, Q, d) → (B, d)."""
    if mask_BQ is None:
        return h_BQd.mean(1)
    weight_BQ1 = mask_BQ.to(h_BQd.dtype)[:, :, None]
    return (h_BQd * weight_BQ1).sum(1) / weight_BQ1.sum(1)


def _mlp(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width), _norm(width))


def _norm(width: int) -> nn.LayerNorm:
    """The released code's, for the question as well as for queries, keys and values."""
    return nn.LayerNorm(width, eps=1e-6)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
