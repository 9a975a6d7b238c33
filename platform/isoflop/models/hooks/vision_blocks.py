"""The hook ``vision_blocks``: token reduction inside a vision transformer, the state that flows through the blocks, and the place where it changes.

Hugging Face's pre-norm blocks (ViT, DeiT, DINOv2, CLIP and SigLIP towers) compute x + Attention(norm x), then x + MLP(norm x),
either part perhaps scaled per channel. :func:`reduced_blocks` repeats this residual order around the unmodified sub-modules, so
that a reduction can act before the attention, between attention and MLP, and after the block. Weights and state dict stay as they
are; nothing is left behind on exit. Heads that pool tokens see their sizes (:mod:`isoflop.models.hooks.vision_pooling`).

Shape suffixes: B batch, N tokens (prefix tokens such as CLS first), M tokens at the input of the first block, C width,
H heads, D head width, Q prefix tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.vision_pooling import NO_POOLING, sized_pooling

LAYOUTS = (
    ("attention", "layernorm_before", "layernorm_after"),
    ("self_attn", "layer_norm1", "layer_norm2"),
    ("attention", "norm1", "norm2"),
)
"""Names of attention and the two norms in a block: ViT and DeiT; CLIP and SigLIP; DINOv2. The MLP is ``mlp`` in all."""


@dataclass(frozen=True)
class TokenState:
    """The tokens between two steps of a vision transformer.

    Attributes:
        x_BNC: hidden states.
        prefix: tokens at the front that are no patches (CLS, distillation token; one CLS per frame in a clip).
        ids_B: example numbers; what is random in a reduction may depend on them and on nothing else of the batch.
        size_BN1: how many original tokens each token stands for, in float32 (16 bits do not count past a few hundred);
            None as long as each stands for itself.
        source_BNM: how much of each original token went into each token, when it is tracked (float32; rows sum to the
            size).
    """

    x_BNC: Tensor
    prefix: int
    ids_B: Tensor
    size_BN1: Tensor | None = None
    source_BNM: Tensor | None = None

    @property
    def patches(self) -> int:
        """Tokens that are not prefix tokens."""
        return self.x_BNC.shape[1] - self.prefix

    def sizes(self) -> Tensor:
        """``size_BN1``, ones when nothing was merged."""
        if self.size_BN1 is not None:
            return self.size_BN1
        return torch.ones_like(self.x_BNC[:, :, :1], dtype=torch.float32)

    def tracked(self) -> TokenState:
        """The same, with sources: every token comes from itself."""
        batch, tokens = self.x_BNC.shape[:2]
        eye_NN = torch.eye(tokens, device=self.x_BNC.device)
        return replace(self, source_BNM=eye_NN.expand(batch, -1, -1))


@dataclass(frozen=True)
class Signals:
    """What the attention of a block saw of its N input tokens; everything else is computed when asked for.

    Attributes:
        q_BNC, k_BNC: projected queries and keys.
        bias: what was added to the logits, broadcastable to (B, H, N, N), or None.
        heads, scaling: of the attention.
    """

    q_BNC: Tensor
    k_BNC: Tensor
    bias: Tensor | None
    heads: int
    scaling: float

    def mean_key(self) -> Tensor:
        """The mean of the keys over heads, (B, N, D)."""
        return self.k_BNC.unflatten(-1, (self.heads, -1)).mean(2)

    def attention(self, rows: int | None = None) -> Tensor:
        """Attention weights of the first ``rows`` tokens (of all when None): (B, H, rows, N), each summing to 1."""
        q_BHND, k_BHND = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q_BNC, self.k_BNC))
        logits = q_BHND[:, :, :rows] @ k_BHND.transpose(-1, -2) * self.scaling
        if self.bias is not None:
            logits = logits + (self.bias if self.bias.shape[-2] == 1 else self.bias[..., :rows, :])
        return logits.softmax(-1)


class TokenReduction:
    """What acts inside the blocks: every method maps a state to a state, by default the same one.

    Life cycle of one forward pass: ``start`` once, then for each block ``before_attention``, ``attention_bias``,
    ``after_attention`` (between attention and MLP) and ``after_block``. A reduction may change the number of tokens, and
    before the attention also the batch (frames that fuse into clips). Signals are those of the block's own attention.
    """

    def start(self, state: TokenState) -> TokenState:
        """The state before the first block."""
        return state

    def before_attention(self, state: TokenState, block: int) -> TokenState:
        """Acts on the block's input."""
        return state

    def attention_bias(self, state: TokenState, block: int) -> Tensor | None:
        """Added to the attention logits, broadcastable to (B, H, N, N): log sizes, soft masks; None for none."""
        return None

    def after_attention(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        """Acts between attention and MLP, after the first residual sum."""
        return state

    def after_block(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        """Acts on the block's output; the signals count tokens as the attention saw them."""
        return state

    def pooling_bias(self, state: TokenState) -> Tensor | None:
        """Added to the logits of attention that pools the tokens behind the last block, (B, 1, 1, N); None for none."""
        return None


@dataclass(eq=False)
class BlockRun(Occupant):
    """The occupant: a reduction at work.

    Attributes:
        reduction: the reduction.
        prefix: prefix tokens of the encoder.
        ids_B: example numbers of the next batch; its places in the batch when None.
        state: after the last block that ran.
        counts: tokens that attention and that the MLP saw in every block of the last pass.
    """

    reduction: TokenReduction
    prefix: int
    ids_B: Tensor | None = None
    state: TokenState | None = None
    counts: list[tuple[int, int]] = field(default_factory=list)

    def enter(self, block: int, x_BNC: Tensor) -> TokenState:
        """The state at the input of a block."""
        if block == 0:
            ids_B = self.ids_B if self.ids_B is not None else torch.arange(len(x_BNC), device=x_BNC.device)
            self.counts = []
            return self.reduction.start(TokenState(x_BNC, self.prefix, ids_B))
        if self.state is None or self.state.x_BNC.shape != x_BNC.shape:
            raise RuntimeError(f"block {block} runs without the one before it: token reductions need whole passes")
        return replace(self.state, x_BNC=x_BNC)


@dataclass(frozen=True)
class Block:
    """The parts of a pre-norm transformer block, whatever its names for them."""

    module: nn.Module
    attention: Any
    norm_before: nn.Module
    norm_after: nn.Module
    mlp: nn.Module

    def attended(self, y_BNC: Tensor) -> Tensor:
        """What the attention gives, as it enters the residual sum."""
        return self._added(y_BNC, "layer_scale1")

    def computed(self, y_BNC: Tensor) -> Tensor:
        """What the MLP gives, as it enters the residual sum."""
        return self._added(y_BNC, "layer_scale2")

    def _added(self, y_BNC: Tensor, scale: str) -> Tensor:
        # DINOv2 scales channels; ViT and DeiT have dropout at the two residual sums, DINOv2 drops paths; CLIP has neither
        for name in (scale, "dropout", "drop_path"):
            part = getattr(self.module, name, None)
            y_BNC = y_BNC if part is None else part(y_BNC)
        return y_BNC

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.attention.k_proj.out_features // self.attention.head_dim

    @property
    def scaling(self) -> float:
        """Factor on the logits."""
        own = getattr(self.attention, "scaling", None)
        return float(self.attention.scale if own is None else own)


def blocks_of(encoder: nn.Module) -> tuple[Block, ...]:
    """The transformer blocks of an encoder, in order; empty when it has none of a known layout.

    Blocks that are told where each token stands (rotary positions) are of none: tokens that merge stand nowhere.
    """
    found = []
    for module in encoder.modules():
        if "position_embeddings" in inspect.signature(type(module).forward).parameters:
            continue
        children = dict(module.named_children())
        for attention, before, after in LAYOUTS:
            parts = [children.get(name) for name in (attention, before, after, "mlp")]
            if all(p is not None for p in parts) and all(
                hasattr(parts[0], n) for n in ("q_proj", "k_proj", "head_dim")
            ):
                found.append(Block(module, *parts))  # type: ignore[arg-type]
    return tuple(found)


class VisionBlocksHook(Hook[BlockRun]):
    """The blocks of the model's vision encoder (``Model.vision_encoder``) run through the reduction."""

    def installed(self, model: Any, occupant: BlockRun) -> AbstractContextManager[None]:
        """See ``reduced_blocks`` and ``sized_pooling``."""
        return _installed(model, occupant)


@contextmanager
def _installed(model: Any, run: BlockRun) -> Iterator[None]:
    with (
        reduced_blocks(blocks_of(model.vision_encoder), run),
        sized_pooling(getattr(model, "pooling", NO_POOLING), run),
    ):
        yield


VISION_BLOCKS = VisionBlocksHook("vision_blocks", 5, "merges or drops tokens between the blocks of a vision encoder")


@contextmanager
def reduced_blocks(blocks: Sequence[Block], run: BlockRun) -> Iterator[None]:
    """Let a reduction act inside the blocks within the ``with`` block.

    Raises:
        RuntimeError: a block has a forward method of its own already.
    """
    taken = [b for b in blocks if "forward" in vars(b.module)]
    if taken:
        raise RuntimeError("another method has replaced the forward pass of these blocks already")
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            seen: dict[str, Tensor] = {}
            for name in ("q_proj", "k_proj"):
                handle = getattr(block.attention, name).register_forward_hook(_keeper(seen, name))
                stack.callback(handle.remove)
            block.module.forward = _forward(block, number, run, seen)
            stack.callback(delattr, block.module, "forward")
        yield


def _keeper(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen[name] = output

    return keep


def _forward(block: Block, number: int, run: BlockRun, seen: dict[str, Tensor]) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        reduction = run.reduction
        state = reduction.before_attention(run.enter(number, hidden_states), number)
        bias = reduction.attention_bias(state, number)
        if attention_mask is not None:
            bias = attention_mask if bias is None else bias + attention_mask
        y_BNC, _ = block.attention(block.norm_before(state.x_BNC), attention_mask=bias, **kwargs)
        tokens = y_BNC.shape[1]
        signals = Signals(seen.pop("q_proj"), seen.pop("k_proj"), bias, block.heads, block.scaling)
        state = reduction.after_attention(replace(state, x_BNC=state.x_BNC + block.attended(y_BNC)), signals, number)
        run.counts.append((tokens, state.x_BNC.shape[1]))
        state = replace(state, x_BNC=state.x_BNC + block.computed(block.mlp(block.norm_after(state.x_BNC))))
        run.state = reduction.after_block(state, signals, number)
        return run.state.x_BNC

    return forward


def log_sizes(state: TokenState) -> Tensor | None:
    """Proportional attention: log of the sizes as a bias on keys, (B, 1, 1, N); None while every token is single.

    In the type of the hidden states, as the attention wants it.
    """
    return None if state.size_BN1 is None else state.size_BN1.log()[:, None, None, :, 0].to(state.x_BNC.dtype)
