"""MQT: a Matryoshka query transformer, any number of visual tokens from one training (arXiv 2405.19315).

Shape suffixes: B batch, P patches, M queries, V visual tokens (the first V queries), D vision width, d language width,
H heads, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.budgets import KINDS, BudgetSampler
from isoflop.methods.vision_language import vlm_info
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.visual_tokens import CompressedTokens, VisualInput
from isoflop.models.vlm_info import VlmInfo

OUT_STD = 0.64
"""Deviation of the output projection's initial weights times √D: the paper's .02 at its width of 1024."""


@METHODS.register("mqt")
@dataclass(frozen=True)
class Mqt(VisualTokenMethod):
    """The first ``m`` of M learned queries look at the patches; trained with random m, so that every prefix works.

    With learned queries Q (M, D), a frozen sine-cosine table P of √M x √M places, and P' the table at the patches'
    places (bicubic, in float32):

    1. q = LN(Q[:m] + P[:m]), k = LN(P'), v = LN(X).
    2. tokens = MultiHeadAttention(q, k, v) · W, with W of shape (D, d) in place of the model's projector; one layer, no
       residual, no feed-forward part, no norm behind it.
    3. In training m is drawn anew for each batch: even numbers up to M, and M, equally often. Later queries are not computed.

    As released, keys hold positions only, so that the attention map is the same for every image and the module is a
    learned pooling of LN(X); ``key_content: content`` is the usual resampler, k = LN(X + P').

    ``m`` acts at inference only: one training serves every m, unless ``train_m: own`` asks for one training per m. The
    paper aligns the resampler first at m = M with the language model frozen; the tiny family has no pretrained language
    model and trains everything at once, with m drawn from the first step on.
    """

    paper: ClassVar[str] = "arXiv 2405.19315"
    commutes: ClassVar[bool] = False

    m: Annotated[int, Knob(low=1, high=4096, log=True, ratio=True, unit="tokens", doc="V, at most `queries`")] = 4
    queries: Annotated[
        int, Knob(low=1, high=4096, log=True, doc="M, learned queries: a square, at most the number of patches")
    ] = 16
    train_m: Annotated[
        str,
        Knob(
            choices=KINDS,
            doc="m in training: even numbers and M equally often, log-uniform, always M, always the run's m",
        ),
    ] = "uniform"
    key_content: Annotated[
        str,
        Knob(choices=("pos_only", "content"), doc="keys of positions alone (released), or of features and positions"),
    ] = "pos_only"
    heads: Annotated[int, Knob(low=1, high=64, log=True, doc="attention heads; must divide the tower's width")] = 4
    lr: Annotated[float, Knob(low=1e-5, high=1e-1, log=True, doc="learning rate of the resampler's weights")] = 1e-2

    @property
    def learning_rate(self) -> float:
        """The knob ``lr``."""
        return self.lr

    @property
    def sampler(self) -> BudgetSampler:
        """The training's m."""
        return BudgetSampler(self.train_m, self.queries, self.m)

    def as_trained(self) -> Mqt:
        """With the largest m, where the training does not depend on it."""
        return replace(self, m=self.queries) if self.sampler.elastic else self

    def at_step(self, step: int, seed: int) -> Mqt:
        """With the m that is drawn for a step."""
        return replace(self, m=self.sampler.draw(step, seed))

    def check(self, info: ModelInfo) -> None:
        """Refuse query counts without a square table, more queries than patches, and heads that do not divide the width."""
        super().check(info)
        geometry = vlm_info(info).geometry
        patches, width = geometry["visual_tokens"], geometry["vision_width"]
        if math.isqrt(self.queries) ** 2 != self.queries or self.queries > patches:
            squares = ", ".join(str(n * n) for n in range(1, geometry["grid"] + 1))
            raise Infeasible(
                f"method mqt: queries = {self.queries} is no square up to {patches} patches; allowed: {squares}"
            )
        if width % self.heads or width % 4:
            raise Infeasible(
                f"method mqt: heads = {self.heads} does not divide the vision width {width} (a multiple of 4); allowed: "
                f"{', '.join(str(n) for n in range(1, 65) if width % n == 0)}"
            )

    def tokens_left(self, grid: int) -> int:
        """``m``."""
        if self.m > self.queries:
            raise Infeasible(
                f"method mqt: m = {self.m} exceeds the {self.queries} queries; allowed: 1 … {self.queries}"
            )
        return self.m

    def build(self, info: VlmInfo) -> Resampler:
        """The resampler for a model's widths."""
        geometry = info.geometry
        return Resampler(
            geometry["vision_width"], geometry["width"], self.queries, self.heads, self.key_content == "content"
        )

    def projector(self, module: nn.Module | None) -> nn.Module | None:
        """W."""
        return None if module is None else _resampler(module).projection

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        """Outputs of the first m queries, before W."""
        return CompressedTokens(_resampler(module)(view.x_BPD, view.grid, self.tokens_left(view.grid)))


class Resampler(nn.Module):
    """The weights of MQT and its forward pass.

    Args:
        width: D, of the vision tower.
        text_width: d, of the language model.
        queries: M, a square.
        heads: of the attention.
        content: keys hold the features besides the positions.
    """

    table_MD: Tensor

    def __init__(self, width: int, text_width: int, queries: int, heads: int, content: bool) -> None:
        super().__init__()
        self.content = content
        # rounded to half precision, in which the released table is kept
        self.register_buffer("table_MD", sine_table(math.isqrt(queries), width).half().float())
        self.query_MD = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, width), std=0.02))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.projection = nn.Linear(width, text_width, bias=False)
        nn.init.trunc_normal_(self.attention.out_proj.weight, std=OUT_STD * width**-0.5)
        nn.init.normal_(self.projection.weight, std=text_width**-0.5)

    def forward(self, x_BPD: Tensor, grid: int, count: int) -> Tensor:
        """The first ``count`` tokens, (B, V, D), of patch features.

        A prefix of what a larger ``count`` gives, up to float32 rounding (some 6e-8 at values around 1): products with
        fewer rows may add up in another order.
        """
        q_HVC, k, v_BHPC = self.attention_inputs(x_BPD, grid, count)
        q_BHVC = q_HVC.expand(len(x_BPD), -1, -1, -1)
        out_BHVC = F.scaled_dot_product_attention(q_BHVC, k.expand(len(x_BPD), -1, -1, -1), v_BHPC)
        return self.attention.out_proj(out_BHVC.transpose(1, 2).flatten(2))

    def attention_inputs(self, x_BPD: Tensor, grid: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (1, H, V, C), keys (B or 1, H, P, C) and values (B, H, P, C) behind the input projections."""
        places_PD = resized(self.table_MD, grid)
        k_in = self.norm_k(x_BPD + places_PD if self.content else places_PD[None])
        q_in = self.norm_q(self.query_MD[:count] + self.table_MD[:count])[None]
        weights, biases = self.attention.in_proj_weight.chunk(3), self.attention.in_proj_bias.chunk(3)
        inputs = (q_in, k_in, self.norm_v(x_BPD))
        heads = self.attention.num_heads
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )
        return q, k, v


def sine_table(side: int, width: int) -> Tensor:
    """Places of a ``side`` x ``side`` raster, (side², width): half of the channels for the column, half for the row.

    Each half holds sines, then cosines, of the coordinate times 10000^(-i / (width / 4)).
    """
    frequency_C = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row_M, column_M = (index.flatten().double() for index in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    halves = []
    for coordinate_M in (column_M, row_M):
        angle_MC = coordinate_M[:, None] * frequency_C
        halves += [angle_MC.sin(), angle_MC.cos()]
    return torch.cat(halves, dim=1).float()


def resized(table_MD: Tensor, grid: int) -> Tensor:
    """A square table at the places of a ``grid`` x ``grid`` raster, (P, D): bicubic, in float32."""
    side = math.isqrt(len(table_MD))
    image_1Dss = table_MD.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    image_1Dgg = F.interpolate(image_1Dss, size=(grid, grid), mode="bicubic", align_corners=False)
    return image_1Dgg[0].flatten(1).T.to(table_MD.dtype)


def _resampler(module: nn.Module | None) -> Resampler:
    if not isinstance(module, Resampler):
        raise TypeError("not a resampler of MQT")
    return module
