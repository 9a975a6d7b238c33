"""GEAR: a low-bit backbone, what it misses at low rank, and outliers exactly (arXiv 2403.05527).

Shape suffixes: B batch, G key-value heads, T tokens, N tokens of a block, D head width, C channels of all heads (G·D), R rank,
S outliers of a vector, M query rows of a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.kernels.decode_segments import SegmentPart
from isoflop.kernels.quant import Packed, quant_pack, unpack
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.kv_cache.base import empty_recent, whole_prompt
from isoflop.methods.kv_cache.packing import Packs
from isoflop.methods.kv_cache.quantised import EXACT, LowBit
from isoflop.methods.kv_cache.select import all_tokens
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, Segment, attend_segments

if TYPE_CHECKING:
    from isoflop.methods.kv_cache.probe import KvCacheProbe

MOST_INDEXED = 2**15
"""Tokens or channels that the 16-bit index of an outlier can tell apart."""


@METHODS.register("gear")
@dataclass(frozen=True)
class Gear(LowBit, Packs):
    """X ≈ D̂ + L + S for keys and values of every block: packed codes, a low rank of their error, outliers as they are.

    The largest and smallest entries of each vector (keys: a channel over the block's tokens; values: a token over the channels
    of all heads) are set aside, and stand as the vector's mean where the backbone is fitted. The error that is left has a few
    strong directions per head, found by power iterations. New tokens wait exactly until there are ``n_b``, and become a
    block. Attention reads the factors and never multiplies them out. ``sparsity: 0`` is GEAR-L.
    """

    paper: ClassVar[str] = "arXiv 2403.05527"

    bits: Annotated[int, Knob(choices=(2, 3, 4, 8, 16), ratio=True, unit="bits", doc="of the backbone; 16 keeps the cache")] = 4  # fmt: skip
    group: Annotated[
        int,
        Knob(low=0, high=65536, unit="values", doc="tokens (keys) or channels (values) of one grid, as in KIVI; 0: one per vector, KCVT"),
    ] = 64  # fmt: skip
    rank: Annotated[int, Knob(low=0, high=256, doc="of the error of the prompt's block, per head")] = 4
    rank_new: Annotated[int, Knob(low=0, high=256, doc="of the error of each block of new tokens")] = 2
    sparsity: Annotated[float, Knob(low=0.0, high=0.5, doc="share of the entries that are outliers, half of them the largest")] = 0.02  # fmt: skip
    loop: Annotated[int, Knob(low=1, high=20, doc="power iterations")] = 3
    n_b: Annotated[int, Knob(low=1, high=1_000_000, log=True, unit="tokens", doc="new tokens that wait exactly before they become a block")] = 64  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """16 bits."""
        return cls(bits=EXACT)

    @classmethod
    def probe(cls) -> KvCacheProbe:
        """With blocks of new tokens that are full within its few tokens."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        return KvCacheProbe(tried={"rank_new": [{"rank_new": rank, "n_b": 4, "bits": 2} for rank in (0, 2)]})

    def axes(self, info: ModelInfo) -> Axes:
        """Bits of the backbone, per element."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def check(self, info: ModelInfo) -> None:
        """Refuse values whose channels an outlier's index cannot count."""
        super().check(info)
        channels = info.geometry["kv_heads"] * info.geometry.get("head_width", 1)
        if self.sparsity and channels > MOST_INDEXED:
            raise Infeasible(
                f"method gear: outliers are indexed in 16 bits, and a layer has {channels} channels; allowed: sparsity = 0"
            )

    def check_prompt(self, tokens: int, task: str) -> None:
        """Refuse prompts whose tokens an outlier's index cannot count."""
        if self.sparsity and tokens > MOST_INDEXED:
            raise Infeasible(
                f"method gear: outliers are indexed in 16 bits, and a prompt of task {task} has {tokens} tokens; allowed: up to "
                f"{MOST_INDEXED}, or sparsity = 0"
            )

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """One block with the prompt."""
        if self.bits >= EXACT:
            return LayerStore([whole_prompt(prompt)], empty_recent(prompt))
        kept = all_tokens(prompt)
        whole = whole_prompt(prompt)
        positions_BGN, k_BGND, v_BGND = (kept.take(x) for x in (whole.positions_BGN, whole.k_BGND, whole.v_BGND))
        block = DenseSegment(positions_BGN, kept.bias(torch.float32), k_BGND, v_BGND)
        return LayerStore([self.block(block, self.rank)], empty_recent(prompt))

    def pack(self, kept: DenseSegment) -> list[Segment]:
        """One block of tokens that another method keeps."""
        return [kept if self.bits >= EXACT else self.block(kept, self.rank)]

    def block(self, tokens: DenseSegment, rank: int) -> GearSegment:
        """Tokens as a block; empty entries (a bias of -inf, values repeated from another token) are left out of everything fitted."""
        live_BG1N1 = None
        if tokens.log_bias_BGN is not None:
            live_BG1N1 = (tokens.log_bias_BGN == 0)[..., None]
        k = self._parts(tokens.k_BGND.float(), -2, self.group or None, rank, live_BG1N1)
        v = self._parts(tokens.v_BGND.float(), -1, self.group or None, rank, live_BG1N1)
        return GearSegment(tokens.positions_BGN, tokens.log_bias_BGN, k, v)

    def _parts(self, x_BGND: Tensor, axis: int, group: int | None, rank: int, live_BGN1: Tensor | None) -> Parts:
        outliers = outliers_of(x_BGND, axis, self.sparsity, live_BGN1)
        filled_BGND = x_BGND if outliers is None else outliers.put(x_BGND, outliers.mean)
        if live_BGN1 is not None:  # empty entries are copies of the last token, which may just have been filled
            last_BG11 = live_BGN1.sum(2, keepdim=True).clamp(min=1) - 1
            index_BGN1 = torch.arange(x_BGND.shape[2], device=x_BGND.device)[:, None].minimum(last_BG11)
            filled_BGND = filled_BGND.gather(2, index_BGN1.expand_as(filled_BGND))
        codes = quant_pack(filled_BGND, self.bits, axis, group)
        backbone_BGND = unpack(codes)
        if outliers is not None:
            backbone_BGND = outliers.put(backbone_BGND, outliers.value.float())
        error_BGND = x_BGND - backbone_BGND
        if live_BGN1 is not None:
            error_BGND = error_BGND * live_BGN1
        rank = min(rank, *x_BGND.shape[-2:])
        if rank == 0:
            return Parts(codes, outliers, None, None)
        left_BGNR, right_BGDR = power_iteration(error_BGND, first_guess(x_BGND.shape[-1], rank), self.loop)
        return Parts(codes, outliers, left_BGNR.half(), right_BGDR.half())

    def stride(self, store: LayerStore) -> int | None:
        """What is left of the buffer."""
        return None if self.bits >= EXACT else self.n_b - store.recent.tokens

    def read(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Over the factors of every block."""
        return attend_segments(query.q_BHTD, store.all(), query.softmax, query.order_BT)[0]

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Attend, then turn a full buffer into a block."""
        out_BTHD = self.read(query, store, prepared)
        if self.bits < EXACT and store.recent.tokens >= self.n_b:
            store.segments.append(self.block(store.recent, self.rank_new))
            store.recent = empty_recent(query)
        return out_BTHD


@dataclass(frozen=True, eq=False)
class Outliers:
    """Entries that are kept as they are.

    Attributes:
        index: int16, their places in each vector; value: float16; mean: of each vector, float32, for the backbone's fit only.
        axis: -2 for vectors (B, G, D) over N, index (B, G, S, D); -1 for vectors (B, N) over the channels C of all heads, (B, N, S).
    """

    index: Tensor
    value: Tensor
    mean: Tensor
    axis: int

    def put(self, x_BGND: Tensor, entries: Tensor) -> Tensor:
        """A copy of ``x_BGND`` with entries (or one per vector) at the outliers' places."""
        index = self.index.long()
        entries = entries.to(x_BGND.dtype).expand(index.shape)
        if self.axis == -2:
            return x_BGND.scatter(2, index, entries)
        flat_BNC = _flat(x_BGND).scatter(2, index, entries)
        return flat_BNC.unflatten(2, (x_BGND.shape[1], -1)).transpose(1, 2)


def _flat(x_BGND: Tensor) -> Tensor:
    return x_BGND.transpose(1, 2).flatten(2)


def outliers_of(x_BGND: Tensor, axis: int, share: float, live_BGN1: Tensor | None) -> Outliers | None:
    """The ``share``/2 largest and as many smallest entries of each vector, to the nearest number; None where the longest has none.

    The number goes by the vector's own length, which the released code takes from another tensor's dimension for keys. Beside longer
    rows a short one has one at least, and repeats entries.
    """
    vectors = x_BGND if axis == -2 else _flat(x_BGND)
    length = vectors.shape[2]
    if live_BGN1 is None or axis == -1:  # a token's channels are all there
        counts = torch.full((vectors.shape[0],), length, device=vectors.device)
        low, high, mean = vectors, vectors, vectors.mean(2, keepdim=True)
    else:
        live = live_BGN1.expand_as(vectors)
        counts = live_BGN1[:, 0, :, 0].sum(-1)
        low, high = vectors.masked_fill(~live, torch.inf), vectors.masked_fill(~live, -torch.inf)
        mean = (vectors * live).sum(2, keepdim=True) / counts.clamp(min=1)[:, None, None, None]
    counts_B = (share * counts / 2 + 0.5).long()
    most = int(counts_B.max())
    if most == 0:
        return None
    counts_B = counts_B.clamp(min=1)
    rank = torch.arange(most, device=vectors.device).minimum(counts_B[:, None] - 1)
    rank = rank[:, None, :, None] if axis == -2 else rank[:, None]
    sides = (low.topk(most, 2, largest=False).indices, high.topk(most, 2).indices)
    index = torch.cat([side.gather(2, rank.expand_as(side)) for side in sides], dim=2)
    return Outliers(index.short(), vectors.gather(2, index).half(), mean, axis)


def power_iteration(error_BGND: Tensor, guess_DR: Tensor, loop: int) -> tuple[Tensor, Tensor]:
    """Factors (B, G, N, R), orthonormal, and (B, G, D, R) whose product Q·Pᵀ is the projection Q·Qᵀ·E of the error (algorithm 2)."""
    right_BGDR = guess_DR.to(error_BGND).expand(*error_BGND.shape[:2], -1, -1)
    left_BGNR = right_BGDR
    for turn in range(loop):
        last = turn == loop - 1
        if last:
            right_BGDR = torch.linalg.qr(right_BGDR).Q
        left_BGNR = error_BGND @ right_BGDR
        if last:
            left_BGNR = torch.linalg.qr(left_BGNR).Q
        right_BGDR = error_BGND.transpose(-1, -2) @ left_BGNR
    return left_BGNR, right_BGDR


@lru_cache(maxsize=32)
def first_guess(width: int, rank: int) -> Tensor:
    """Where the iterations start, (D, R): the same for every row, head and block, so that no row depends on another."""
    generator = torch.Generator().manual_seed(derive_seed("gear", width, rank))
    return torch.rand(width, rank, generator=generator)


@dataclass(frozen=True, eq=False)
class Parts:
    """Keys or values of a block.

    Attributes:
        codes: the backbone.
        outliers: what replaces it in places, or None.
        left_BGNR, right_BGDR: float16 factors of the error, or None.
    """

    codes: Packed
    outliers: Outliers | None
    left_BGNR: Tensor | None
    right_BGDR: Tensor | None

    def backbone(self) -> Tensor:
        """Codes and outliers, (B, G, N, D) in float32."""
        x_BGND = unpack(self.codes)
        return x_BGND if self.outliers is None else self.outliers.put(x_BGND, self.outliers.value)

    def whole(self) -> Tensor:
        """All three parts, (B, G, N, D) in float32."""
        x_BGND = self.backbone()
        if self.left_BGNR is None or self.right_BGDR is None:
            return x_BGND
        return x_BGND + self.left_BGNR.float() @ self.right_BGDR.float().transpose(-1, -2)

    def tensors(self) -> Iterable[Tensor]:
        """Everything that must stay resident."""
        yield from self.codes.tensors()
        yield from (x for x in (self.left_BGNR, self.right_BGDR) if x is not None)
        if self.outliers is not None:
            yield from (self.outliers.index, self.outliers.value)


@dataclass
class GearSegment(Segment):
    """A block in three parts."""

    k: Parts
    v: Parts

    def part(self) -> SegmentPart:
        """Multiplied out, for readers that know no factors."""
        return SegmentPart(self.k.whole(), self.v.whole(), self.log_bias_BGN)

    def tensors(self) -> Iterable[Tensor]:
        """Codes, grids, factors, outliers and their places."""
        yield from (*self.k.tensors(), *self.v.tensors())
        if self.log_bias_BGN is not None:
            yield self.log_bias_BGN

    def products(self, q_BGMD: Tensor) -> Tensor:
        """q·D̂ᵀ + (q·P)·Qᵀ (section 3)."""
        found_BGMN = q_BGMD.float() @ self.k.backbone().transpose(-1, -2)
        if self.k.left_BGNR is None or self.k.right_BGDR is None:
            return found_BGMN
        return found_BGMN + (q_BGMD.float() @ self.k.right_BGDR.float()) @ self.k.left_BGNR.float().transpose(-1, -2)

    def mixed(self, p_BGMN: Tensor) -> Tensor:
        """p·D̂ + (p·Q)·Pᵀ."""
        found_BGMD = p_BGMN @ self.v.backbone()
        if self.v.left_BGNR is None or self.v.right_BGDR is None:
            return found_BGMD
        return found_BGMD + (p_BGMN @ self.v.left_BGNR.float()) @ self.v.right_BGDR.float().transpose(-1, -2)
