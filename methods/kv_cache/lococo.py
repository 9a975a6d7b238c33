"""LoCoCo: convolutions that merge what is read into a cache of a fixed size (arXiv 2406.05317).

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a pass, N cached tokens, M slots, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.kernels.column_scores import column_scores
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.kv_cache.base import full_layers, key_positions, slice_call
from isoflop.methods.kv_cache.learned import LearnedCache, LearnedCacheMethod
from isoflop.methods.kv_cache.rows import compact, first_tokens, real_part, rows_alike, store_of_rows
from isoflop.methods.kv_cache.select import select, split
from isoflop.methods.kv_cache.slot_mixer import ACTIVATIONS, SlotMixer
from isoflop.methods.own_weights import texts_of, training_seconds
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.attention import ATTENTION, AttentionCall
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.lm import LmBatch, LmInfo
from isoflop.models.segments import DenseSegment, LayerStore
from isoflop.models.training.loop import Schedule
from isoflop.models.training.taught import InTraining, in_its_hooks


@dataclass(frozen=True)
class LinearDecay:
    """To nothing, from the first step on, gradients as they are (released code)."""

    steps: int
    warmup: float = 0.0
    final: float = 0.0
    clip: float = float("inf")


@METHODS.register("lococo")
@dataclass(frozen=True)
class LoCoCo(LearnedCacheMethod):
    """A text is read in chunks into at most ``mem_size`` slots and the chunk at hand: it is never seen as a whole.

    Behind a chunk with more than ``mem_size`` + ``buffer`` tokens in the cache, for each key-value head:

    1. h_j: attention of the chunk's queries to cached token j, added up (over the group's query heads, too).
    2. The M_h = M - M_c tokens with the largest h stay, among them the newest ``local`` ones; M_c = ⌊M (1 - keep_rate)⌋.
    3. W = softmax over the other tokens of ReLU(Conv1d([K; V] of these tokens)), M_c channels, the same for all heads.
    4. W ← (1 - γ) O + γ W, where O picks the M_c best of the other tokens, in their order; γ is learned.
    5. The cache is the M_h tokens, then W K and W V of the others, keys with the rotation that they have.

    The weights of the convolution and γ are learned by the language-model loss of texts that are read in this way, the model
    frozen (the paper's inference mode), and no gradient passes from a chunk into the cache that an earlier one left. ``steps: 0`` leaves
    them as they are drawn; with ``keep_rate: 1`` there are none, and a chunk evicts all but M by h, H2O on the way.

    Each generated token is a chunk by itself, as in the released code: slots merge again whenever ``buffer`` + 1 more tokens have
    come, by the attention of the newest query alone. Scaled rotations beyond the trained length and LoRA are left out. In
    the released code norms and embeddings learn, too, and scores of grouped queries cannot be told by key-value head.
    Rows of different lengths are read each by itself, from its own first token on.
    """

    paper: ClassVar[str] = "arXiv 2406.05317"
    calibrates: ClassVar[bool] = True

    mem_size: Annotated[int, Knob(low=1, high=65_536, log=True, ratio=True, unit="tokens", doc="M, slots of each head; the paper's are 128 and 512")] = 16  # fmt: skip
    chunk: Annotated[int, Knob(low=1, high=65_536, log=True, unit="tokens", doc="tokens that are read at once; the paper's are 512")] = 64  # fmt: skip
    buffer: Annotated[int, Knob(low=0, high=65_536, unit="tokens", doc="tokens beyond the slots that do not yet make it merge; as released")] = 16  # fmt: skip
    keep_rate: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the slots that hold single tokens")] = 0.5
    local: Annotated[int, Knob(low=0, high=65_536, unit="tokens", doc="newest tokens that always do, as far as these slots go")] = 0  # fmt: skip
    kernel_size: Annotated[int, Knob(low=1, high=255, doc="tokens that the convolution sees around each, an odd number")] = 21  # fmt: skip
    convolutions: Annotated[int, Knob(low=1, high=8, doc="one behind the other")] = 1
    activation: Annotated[str, Knob(choices=tuple(ACTIVATIONS), doc="behind each of them")] = "relu"
    gamma: Annotated[float, Knob(low=0.0, high=1.0, doc="γ before the training")] = 0.5
    steps: Annotated[int, Knob(low=0, high=1_000_000, doc="of the training; 0: weights as they are drawn")] = 300
    batch: Annotated[int, Knob(low=1, high=16, doc="texts per step of the training")] = 8
    lr: Annotated[float, Knob(low=1e-6, high=10.0, log=True, doc="learning rate; the released 5e-5 times 1000")] = 0.05

    @property
    def mixed(self) -> int:
        """M_c, the slots that hold mixtures."""
        return int(self.mem_size * (1 - self.keep_rate) + 1e-9)

    @property
    def most(self) -> int:
        """Tokens beyond which the cache is merged."""
        return self.mem_size + self.buffer

    @property
    def learning_rate(self) -> float:
        """The knob ``lr``."""
        return self.lr

    @property
    def schedule(self) -> Schedule:
        """Linear decay."""
        return LinearDecay(self.steps)

    @property
    def examples(self) -> int:
        """Texts of the training."""
        return self.steps * self.batch

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """More slots than any text has tokens."""
        return cls(mem_size=info.geometry.get("positions", 65_536), keep_rate=1.0)

    def axes(self, info: ModelInfo) -> Axes:
        """Nothing: what a number of slots saves goes by the text."""
        return Axes()

    def check(self, info: ModelInfo) -> None:
        """Refuse kernels without a middle."""
        super().check(info)
        if self.kernel_size % 2 == 0:
            raise Infeasible(
                f"method lococo: kernel_size = {self.kernel_size} has no token in its middle; allowed: odd numbers"
            )

    # Its weights

    def build(self, info: ModelInfo) -> nn.Module | None:
        """A mixer for each layer that sees the whole text."""
        if not self.mixed:
            return None
        shape = info.geometry
        width = shape.get("head_width", shape["width"] // shape["heads"])
        knobs = self.mixed, self.kernel_size, self.convolutions, self.activation, self.gamma
        return nn.ModuleDict({str(layer): SlotMixer(width, *knobs) for layer in full_layers(info)})

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The training; none where there are no weights. What could learn nothing is refused."""
        self.check(info)
        if not self.mixed:
            return None
        if self.steps:
            self._check_text(info)
        return super().prepare(info, weights, seed, trained_with)

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> nn.Module | None:
        """What the stage computes, on a loaded model."""
        return super().calibrate(model, ctx, seed) if self.mixed else None

    def lessons(self, model: Model, ctx: StageContext, seed: int) -> Iterator[LmBatch]:
        """Calibration texts, ``batch`` at a time."""
        for texts in texts_of(model, ctx, self.steps, self.batch, seed):
            yield replace(texts, prefix=texts.ids_BT.shape[1])

    def loss(self, model: Model, module: nn.Module, lesson: LmBatch) -> Tensor:
        """Of every token, each chunk read over what its predecessors left."""
        with in_its_hooks(self, model, InTraining(module)):
            logits_SW, targets_S = model.supervised(lesson)
        return F.cross_entropy(logits_SW.float(), targets_S)

    def _check_text(self, info: ModelInfo) -> None:
        """Something must be read behind a merge."""
        if not isinstance(info, LmInfo):
            raise Infeasible(
                f"method lococo is trained on text, and model {info.ref} is no language model; allowed: language models, or steps: 0"
            )
        length = getattr(info.text, "length", None)
        first = -(-(self.most + 1) // self.chunk) * self.chunk  # tokens before the first merge
        if length is not None and length <= first:
            raise Infeasible(
                f"method lococo: mem_size = {self.mem_size}, chunk = {self.chunk}, buffer = {self.buffer}: slots are first merged behind "
                f"{first} tokens, and calibration texts have {length}, so that nothing would be learned; allowed: fewer, longer texts "
                "(`calibration: {length: …}`), or steps: 0"
            )

    # Reading and merging

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """What ``prefill`` leaves."""
        return self.prefill(prompt, prepared)[1]

    def prefill(self, prompt: AttentionCall, prepared: Any) -> tuple[Tensor, LayerStore]:
        """Chunk by chunk; rows that stand in the same columns together."""
        batch, heads, length, _ = prompt.q_BHTD.shape
        out_BTHD = prompt.v_BGTD.new_zeros(batch, length, heads, prompt.v_BGTD.shape[-1])
        parts, held = [], [0] * batch
        for rows, columns in rows_alike(prompt):
            call = real_part(prompt, rows, columns)
            out_BTHD[rows, columns], kept = self._in_chunks(call, _mixer(prepared, prompt))
            parts.append((list(range(batch)[rows]), kept))
            for row in parts[-1][0]:
                held[row] = kept.tokens
        return out_BTHD, store_of_rows(prompt, parts, held)

    def stride(self, store: LayerStore) -> int | None:
        """Until some row has more than the cache may hold."""
        return max(1, self.most + 1 - max(store.state["held"]))

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Read, then merge the rows that have too much, by the attention of their newest query."""
        out_BTHD = self.read(query, store, prepared)
        tokens = query.q_BHTD.shape[2]
        new = [tokens] * len(out_BTHD) if query.valid_BT is None else query.valid_BT.sum(-1).tolist()
        held = [h + n for h, n in zip(store.state["held"], new, strict=True)]
        store.state = {**store.state, "held": held}
        if over := [row for row, h in enumerate(held) if h > self.most]:
            whole, mixer = compact(store), _mixer(prepared, query)
            newest = real_part(slice_call(query, tokens - 1, None), over, slice(None))
            merged = self._merged(newest, first_tokens(whole, over, self.most + 1), mixer)
            held = [self.mem_size if row in over else h for row, h in enumerate(held)]
            rows = list(range(len(held)))
            after = store_of_rows(query, [(rows, first_tokens(whole, rows, max(held))), (over, merged)], held)
            store.segments, store.recent, store.state = after.segments, after.recent, after.state
        return out_BTHD

    def _in_chunks(self, call: AttentionCall, mixer: SlotMixer | None) -> tuple[Tensor, DenseSegment]:
        """Attention of all tokens, (B, T, H, D), and what is held behind the last."""
        held, outs = DenseSegment(key_positions(call)[:, :, :0], None, call.k_BGTD[:, :, :0], call.v_BGTD[:, :, :0]), []
        for start in range(0, call.q_BHTD.shape[2], self.chunk):
            piece = slice_call(call, start, start + self.chunk)
            positions_BGN, k_BGND, v_BGND = (
                torch.cat(pair, dim=2)
                for pair in (
                    (held.positions_BGN, key_positions(piece)),
                    (held.k_BGND, piece.k_BGTD),
                    (held.v_BGND, piece.v_BGTD),
                )
            )
            sees = None if not held.tokens else positions_BGN[:, :1, None] <= piece.order_BT[:, None, :, None]
            outs.append(piece.softmax.attend(piece.q_BHTD, k_BGND, v_BGND, sees))
            # what the next chunk reads has no history (6)
            held = DenseSegment(positions_BGN, None, k_BGND.detach(), v_BGND.detach())
            if held.tokens > self.most:
                held = self._merged(piece, held, mixer)
        return torch.cat(outs, dim=2).transpose(1, 2), held

    def _merged(self, queries: AttentionCall, held: DenseSegment, mixer: SlotMixer | None) -> DenseSegment:
        """``mem_size`` entries in place of all that are held, by the attention of some queries."""
        rows, tokens = held.k_BGND.shape[0], held.tokens
        h_BGN = _received(queries, held)
        single = self.mem_size - self.mixed
        newest = min(self.local, single)
        counting_BGN = h_BGN.clone()
        counting_BGN[..., tokens - newest :] = float("inf")
        best, others = split(counting_BGN, [single] * rows, [tokens] * rows)
        alone, rest = held.taken(best.index_BGM, None), held.taken(others.index_BGM, None)
        if mixer is None:
            return alone
        anchors = select(others.take(h_BGN), [self.mixed] * rows)
        w_BGMN = mixer(rest.k_BGND, rest.v_BGND, anchors.index_BGM)
        k_BGMD, v_BGMD = ((w_BGMN @ x.float()).to(x.dtype) for x in (rest.k_BGND, rest.v_BGND))
        return DenseSegment(
            torch.cat((alone.positions_BGN, anchors.take(rest.positions_BGN)), dim=2),
            None,
            torch.cat((alone.k_BGND, k_BGMD), dim=2),
            torch.cat((alone.v_BGND, v_BGMD), dim=2),
        )

    # At work

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """A cache that holds the mixers."""
        module = self.module_of(model, prepared)
        bits = model.info.dense_bits
        return {ATTENTION: LearnedCache(self, module, bits, module, training_seconds(prepared))}


def _mixer(prepared: Any, call: AttentionCall) -> SlotMixer | None:
    """That of the layer, where the layer is."""
    if prepared is None:
        return None
    mixer: SlotMixer = prepared[str(call.layer)]
    return mixer.to(call.q_BHTD.device)


def _received(queries: AttentionCall, held: DenseSegment) -> Tensor:
    """h (1), (B, G, N)."""
    order_BT = queries.order_BT.expand(queries.q_BHTD.shape[0], -1)
    weight_B1T = torch.ones_like(order_BT, dtype=torch.float32)[:, None]
    seen_BN = held.positions_BGN[:, 0]  # heads differ in what is before the queries only
    with torch.no_grad():
        return column_scores(
            queries.q_BHTD.detach(), held.k_BGND.detach(), queries.softmax, weight_B1T, order_BT, seen_BN
        )[:, :, 0]
