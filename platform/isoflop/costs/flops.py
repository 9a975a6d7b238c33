"""FLOPs per answer, from a model's sizes: prefill and decode apart, vision tower in or out, tokens per layer.

One multiply-add counts 2. Counted: all matrix products (projections, attention scores and their product with the values, MLP, output head,
patch embedding, projector). Left out, as torch.utils.flop_counter does: norms, softmax, activations, rotary embedding, residual
sums, biases and table look-ups; together below 1 % for real models and a few per cent of the time.

With ``causal=False`` attention is charged as full T x T matrices, which is what dense kernels compute and what the counter counts;
``causal=True`` charges the lower triangle, which is what a causal flash kernel computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isoflop.core.errors import UserError
from isoflop.costs.shapes import DecoderShape, VisionShape

Tokens = int | Sequence[int]


@dataclass(frozen=True)
class AnswerFlops:
    """FLOPs of one answer by part."""

    vision: float
    projector: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.vision + self.projector + self.prefill + self.decode

    @property
    def language(self) -> float:
        """Without vision tower and projector."""
        return self.prefill + self.decode


def per_layer(tokens: Tokens, layers: int, what: str = "tokens") -> list[int]:
    """One count per layer: a number is the same everywhere; methods that drop tokens on the way give a list."""
    counts = [int(tokens)] * layers if isinstance(tokens, int) else [int(t) for t in tokens]
    if len(counts) != layers:
        raise UserError(f"costs: {len(counts)} per-layer {what} for {layers} layers")
    if min(counts) < 0:
        raise UserError(f"costs: {what} = {min(counts)} must be >= 0")
    return counts


def prefill_flops(shape: DecoderShape, tokens: Tokens, logits: int = 1, causal: bool = False) -> float:
    """Processing a prompt.

    Args:
        tokens: prompt tokens (text and visual), one number or one per layer.
        logits: positions for which the output head is computed (1 in generation, all in training and scoring).
        causal: charge half of the attention matrix.
    """
    total = 0.0
    for t in per_layer(tokens, shape.layers):
        pairs = t * (t + 1) / 2 if causal else t * t
        total += 2 * t * (shape.attention_params + shape.mlp_params) + 4 * pairs * shape.heads * shape.head_dim
    return total + 2 * logits * shape.hidden * shape.vocab


def decode_flops(shape: DecoderShape, cached: Tokens, new_tokens: int) -> float:
    """Generating ``new_tokens`` one at a time on a cache that starts with ``cached`` entries (per layer, if they differ).

    The first new token comes from the prefill's logits, so ``new_tokens`` steps produce ``new_tokens`` further ones.
    """
    total = 0.0
    for length in per_layer(cached, shape.layers, "cache lengths"):
        attended = new_tokens * length + new_tokens * (new_tokens + 1) / 2
        total += (
            2 * new_tokens * (shape.attention_params + shape.mlp_params) + 4 * attended * shape.heads * shape.head_dim
        )
    return total + 2 * new_tokens * shape.hidden * shape.vocab


def vision_flops(shape: VisionShape, images: int = 1, layers: int | None = None) -> float:
    """The vision tower; ``layers`` when features are taken from an earlier layer and later ones are not computed."""
    t = shape.tokens
    per = 2 * t * (4 * shape.hidden**2 + 2 * shape.hidden * shape.mlp) + 4 * t * t * shape.hidden
    return images * (
        (shape.layers if layers is None else layers) * per + 2 * shape.patches * shape.patch_inputs * shape.hidden
    )


def projector_flops(vision_hidden: int, hidden: int, tokens: int, layers: int = 2) -> float:
    """LLaVA's projector: a linear map (``layers=1``) or Linear-GELU-Linear (``layers=2``) on ``tokens`` vectors."""
    return 2.0 * tokens * hidden * (vision_hidden + (layers - 1) * hidden)


def answer_flops(
    decoder: DecoderShape,
    visual_tokens: Tokens,
    text_tokens: int,
    new_tokens: int = 0,
    vision: VisionShape | None = None,
    images: int = 1,
    projected_tokens: int | None = None,
    causal: bool = False,
) -> AnswerFlops:
    """One question about an image.

    Args:
        visual_tokens: visual tokens in the language model, one number or one per layer.
        text_tokens: Q, text tokens of the prompt.
        new_tokens: decoding steps after the first token.
        vision: the tower; None leaves tower and projector out (features cached, or shared by many questions).
        projected_tokens: tokens that pass the projector; default: all patches (tokens dropped after it) if the tower is charged.
    """
    counts = [v + text_tokens for v in per_layer(visual_tokens, decoder.layers, "visual tokens")]
    tower = projector = 0.0
    if vision is not None:
        tower = vision_flops(vision, images)
        projector = projector_flops(
            vision.hidden, decoder.hidden, images * vision.patches if projected_tokens is None else projected_tokens
        )
    return AnswerFlops(
        tower,
        projector,
        prefill_flops(decoder, counts, 1, causal),
        decode_flops(decoder, counts, new_tokens) if new_tokens else 0.0,
    )
