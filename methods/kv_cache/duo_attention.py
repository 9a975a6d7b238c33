"""DuoAttention: gates learned on passkeys tell heads that need the whole cache from those that stream (arXiv 2410.10819).

Shape suffixes: B batch, H query heads, G key-value heads, L layers, T tokens of a pass, N cached tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.kv_cache.base import empty_recent, full_layers, whole_prompt
from isoflop.methods.kv_cache.calls import take_in
from isoflop.methods.kv_cache.learned import LearnedCache, LearnedCacheMethod
from isoflop.methods.kv_cache.passkeys import ORDINALS, PasskeyText, passkey_texts
from isoflop.methods.kv_cache.retrieval_heads import best_heads
from isoflop.methods.kv_cache.select import KeptTokens, candidates, lengths, protect, select
from isoflop.methods.kv_cache.streaming import sees, streaming_attention
from isoflop.methods.own_weights import training_seconds
from isoflop.models.base import Model, ModelInfo
from isoflop.models.decoder_model import decoder_model
from isoflop.models.hooks.attention import ATTENTION, AttentionCall, causal_attention, replaced_attention
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.segments import DenseSegment, LayerStore, decode_one
from isoflop.models.training.loop import Pace, Schedule, Unclipped

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

PASSKEYS, QUESTIONS = "passkeys", "questions"
OWN, TEACHER = "own", "teacher"
EXACT, STREAMING = "exact", "streaming"


@METHODS.register("duo-attention")
@dataclass(frozen=True)
class DuoAttention(LearnedCacheMethod):
    """Some heads keep everything; the others see the first tokens and the newest ones, while tokens are generated, too.

    Which heads are which is learned: every key-value head mixes both, a · full + (1 - a) · streaming, with a gate a that begins at 1. On
    texts that hide passkeys and ask for them at the end, the last hidden states at the passkeys are held to those of
    the model as it is (mean squared difference), while a mean of all gates, times ``regularisation``, draws them to 0. The share ``full``
    of heads with the largest gates then keeps its cache. One training serves all shares; nothing else of the model learns.

    Models without a tokenizer get runs of random symbols that come twice in place of words (``passkeys``). Means over
    width and heads as released; the paper writes sums. Released code also compares the hidden states of the questions
    (``compared: questions``), and mixes the full attention of the model as it is into the other's (``full_from: teacher``).
    A streaming head keeps ``sinks`` + ``recent`` tokens, with which a new one attends to itself. Prompts are read exactly, as
    released for those that come in one piece; ``prompt: streaming`` is the limit of short pieces.
    """

    paper: ClassVar[str] = "arXiv 2410.10819"
    calibrates: ClassVar[bool] = True

    full: Annotated[float, Knob(low=0.0, high=1.0, ratio=True, doc="share of all key-value heads that keep everything; the paper's are .25, with grouped queries .5")] = 0.5  # fmt: skip
    sinks: Annotated[int, Knob(low=0, high=4096, unit="tokens", doc="first tokens that streaming heads see; the paper's are 64, 128 in training")] = 4  # fmt: skip
    recent: Annotated[int, Knob(low=1, high=65_536, unit="tokens", doc="newest tokens that they see; the paper's are 256")] = 16  # fmt: skip
    prompt: Annotated[str, Knob(choices=(EXACT, STREAMING), doc="what these heads see while the prompt is read")] = EXACT  # fmt: skip
    steps: Annotated[int, Knob(low=1, high=1_000_000, doc="of the training, a text each; the paper's are 2,000")] = 100
    length: Annotated[int, Knob(low=16, high=1_000_000, log=True, unit="tokens", doc="of a text in training, as far as the model reads so many; the paper's have 1,000 to 32,000")] = 256  # fmt: skip
    passkeys: Annotated[int, Knob(low=1, high=len(ORDINALS), doc="in each text; the paper's are 10")] = 2
    words: Annotated[int, Knob(low=2, high=256, doc="of each passkey; the paper's are 32")] = 8
    compared: Annotated[str, Knob(choices=(PASSKEYS, QUESTIONS), doc="hidden states that are compared: at the repeated passkeys, or at their questions, too")] = PASSKEYS  # fmt: skip
    full_from: Annotated[str, Knob(choices=(OWN, TEACHER), doc="whose full attention is mixed in: of its own states, or of the model as it is")] = OWN  # fmt: skip
    regularisation: Annotated[float, Knob(low=0.0, high=10.0, doc="weight of the mean gate in the loss")] = 0.05
    lr: Annotated[float, Knob(low=1e-5, high=10.0, log=True, doc="learning rate of the gates")] = 0.02

    @property
    def exact_prompt(self) -> bool:
        """Unless it is read through the windows."""
        return self.prompt == EXACT

    @property
    def learning_rate(self) -> float:
        """The knob ``lr``."""
        return self.lr

    @property
    def schedule(self) -> Schedule:
        """Its rates are those of ``pace``."""
        return Unclipped(self.steps)

    @property
    def examples(self) -> int:
        """A text per step."""
        return self.steps

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """Every head keeps everything."""
        return cls(full=1.0)

    def as_trained(self) -> DuoAttention:
        """The share and the reading of prompts act at inference only."""
        return replace(self, full=DuoAttention.full, prompt=DuoAttention.prompt)

    def axes(self, info: ModelInfo) -> Axes:
        """1 over the share of heads, what the others keep left out."""
        return Axes(ratio=1 / self.full if self.full else None)

    def check(self, info: ModelInfo) -> None:
        """Refuse passkeys that fill the texts."""
        super().check(info)
        length = self._length(info)
        if (taken := 2 * self.passkeys * self.words) > length // 2:
            raise Infeasible(
                f"method duo-attention: {self.passkeys} passkeys of {self.words} words, each of them twice, fill more than half of the "
                f"{length} tokens of a text that length = {self.length} and model {info.ref} allow; allowed: fewer passkeys or words, or {2 * taken} tokens"
            )

    def _length(self, info: ModelInfo) -> int:
        """Tokens of a text, as far as the model reads so many."""
        return min(self.length, int(info.geometry.get("positions", self.length)))

    # Its gates

    def build(self, info: ModelInfo) -> nn.Module:
        """A gate for each key-value head of the layers that see everything."""
        return Gates(len(full_layers(info)), info.geometry["kv_heads"])

    def pace(self, optimizer: torch.optim.Optimizer) -> Pace:
        """Up over a fifth of the steps and down over the last, never below a tenth (released code)."""
        fifth = max(1, self.steps // 5)

        def paced(optimizer: torch.optim.Optimizer, number: int) -> None:
            share = min(1.0, max((number + 1) / fifth, 0.1), max((self.steps - number) / fifth, 0.1))
            for group in optimizer.param_groups:
                group["lr"] = self.lr * share

        return paced

    def lessons(self, model: Model, ctx: StageContext, seed: int) -> Iterator[PasskeyText]:
        """Texts with passkeys."""
        return passkey_texts(model, ctx, self.steps, self._length(model.info), self.passkeys, self.words, seed)

    def loss(self, model: Model, module: nn.Module, lesson: PasskeyText) -> Tensor:
        """How far mixed heads move the states that are compared, and the mean of the gates."""
        assert isinstance(module, Gates)
        with torch.no_grad():
            module.gates_LG.clamp_(0, 1)
        lm = decoder_model(model, self.name)
        gate_G = dict(zip(full_layers(model.info), module.gates_LG, strict=True))
        told: dict[int, Tensor] = {}

        def whole(call: AttentionCall) -> Tensor:
            out_BTHD = causal_attention(call)
            if self.full_from == TEACHER and call.window is None:
                told[call.layer] = out_BTHD
            return out_BTHD

        def mixed(call: AttentionCall) -> Tensor:
            if call.window is not None:
                return causal_attention(call)
            full_BTHD = told[call.layer] if self.full_from == TEACHER else causal_attention(call)
            return mixture(full_BTHD, streaming_attention(call, self.sinks, self.recent), gate_G[call.layer])

        compared_BT = lesson.answers_BT | (lesson.questions_BT if self.compared == QUESTIONS else False)
        with torch.no_grad(), replaced_attention(lm.decoder, whole):
            expected_Sd = _states(lm.decoder, lesson.ids_BT)[compared_BT]
        with replaced_attention(lm.decoder, mixed):
            found_Sd = _states(lm.decoder, lesson.ids_BT)[compared_BT]
        moved = (expected_Sd.float() - found_Sd.float()).pow(2).mean()
        return moved + self.regularisation * module.gates_LG.abs().mean()

    @classmethod
    def probe(cls) -> Probe:
        """How prompts are read shows where no layer is whole: equal gates leave the first one so, and none is behind the last.

        A length shows where passkeys have room in it, and where the model reads it.
        """
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        return KvCacheProbe(
            tried={
                "prompt": [{"full": 0.0, "prompt": prompt} for prompt in (EXACT, STREAMING)],
                "length": [{"length": 100}, {"length": 200}],
            }
        )

    # Reading

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """A cache that knows which heads keep everything, by layer; that is known of the model and takes no memory of a request."""
        module = self.module_of(model, prepared)
        assert isinstance(module, Gates)
        chosen_LG = best_heads(module.gates_LG.detach().cpu().clamp(0, 1), self.full)
        chosen = dict(zip(full_layers(model.info), chosen_LG, strict=True))
        return {ATTENTION: LearnedCache(self, chosen, model.info.dense_bits, None, training_seconds(prepared))}

    def prefill(self, prompt: AttentionCall, prepared: Any) -> tuple[Tensor, LayerStore]:
        """Exact, or through the windows of the heads that have one."""
        out_BTHD, store = super().prefill(prompt, prepared)
        if self.prompt == STREAMING:
            streams_H = ~_full(prompt, prepared).repeat_interleave(out_BTHD.shape[2] // prompt.k_BGTD.shape[1])
            window_BTHD = streaming_attention(prompt, self.sinks, self.recent)
            out_BTHD = torch.where(streams_H[:, None], window_BTHD, out_BTHD)
        return out_BTHD, store

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """A bank of the heads that keep everything, and one of those that stream."""
        full_G, whole, seen = _full(prompt, prepared), whole_prompt(prompt), lengths(prompt)
        banks: dict[str, DenseSegment] = {}
        if bool(full_G.any()):
            banks["full"] = whole if bool(full_G.all()) else whole.of_heads(full_G)
        if not bool(full_G.all()):
            streams = whole.of_heads(~full_G) if bool(full_G.any()) else whole
            banks["streaming"] = self._trimmed(streams, seen, candidates(prompt))
        return LayerStore(list(banks.values()), empty_recent(prompt), {"seen": seen, "banks": list(banks)})

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Any number of tokens: each sees what it would see alone; behind them the windows have moved on."""
        store.recent = empty_recent(query)
        banks = dict(zip(store.state["banks"], store.segments, strict=True))
        for bank in banks.values():
            assert isinstance(bank, DenseSegment)
            take_in(bank, query)
        if query.q_BHTD.shape[2] == 1:
            out_BTHD = decode_one(query.q_BHTD, store.segments, query.softmax)
        else:
            out_BTHD = self._read_many(query, banks)
        new = [query.q_BHTD.shape[2]] * len(out_BTHD) if query.valid_BT is None else query.valid_BT.sum(-1).tolist()
        seen = [n + m for n, m in zip(store.state["seen"], new, strict=True)]
        if "streaming" in banks:
            bank = banks["streaming"]
            live_BGN = None if bank.log_bias_BGN is None else bank.log_bias_BGN == 0
            banks["streaming"] = self._trimmed(bank, seen, live_BGN, growing=True)
        store.segments, store.state = list(banks.values()), {**store.state, "seen": seen}
        return out_BTHD

    def _trimmed(
        self, bank: DenseSegment, seen: list[int], live_BGN: Tensor | None, growing: bool = False
    ) -> DenseSegment:
        """First and newest tokens of each row."""
        counts = [min(n, self.sinks + self.recent) for n in seen]
        if live_BGN is None and bank.tokens == max(counts) == min(counts):
            return bank
        nothing_BGN = torch.zeros_like(bank.positions_BGN, dtype=torch.float32)
        sinks = [min(self.sinks, n) for n in seen]
        scores_BGN = protect(nothing_BGN, bank.positions_BGN, seen, sinks, [self.recent] * len(seen))
        kept: KeptTokens = select(scores_BGN, counts, live_BGN)
        return bank.taken(kept.index_BGM, kept.bias(bank.k_BGND.dtype), growing)

    def _read_many(self, query: AttentionCall, banks: dict[str, DenseSegment]) -> Tensor:
        """Attention of each head over its bank, (B, T, H, D)."""
        out_BHTD = torch.zeros_like(query.q_BHTD)
        for kind, bank in banks.items():
            rows_H = bank.query_heads(query.q_BHTD.shape[1])
            heads: Any = slice(None) if rows_H is None else rows_H
            queries_BT1, keys_B1N = query.order_BT[:, :, None], bank.positions_BGN[:, :1]
            window = (1 << 62, 0) if kind == "full" else (self.sinks, self.recent + 1)  # itself included
            sees_BTN = sees(queries_BT1, keys_B1N, *window)
            if bank.log_bias_BGN is not None:
                sees_BTN = sees_BTN & (bank.log_bias_BGN[:, :1] == 0)
            part = query.softmax.of_heads(heads).attend(
                query.q_BHTD[:, heads], bank.k_BGND, bank.v_BGND, sees_BTN[:, None]
            )
            out_BHTD[:, heads] = part
        return out_BHTD.nan_to_num().transpose(1, 2)  # padding may see nothing at all


class Gates(nn.Module):
    """How much of the whole cache each head needs, from 0 to 1."""

    def __init__(self, layers: int, groups: int) -> None:
        super().__init__()
        self.gates_LG = nn.Parameter(torch.ones(layers, groups))


def mixture(full_BTHD: Tensor, streaming_BTHD: Tensor, gate_G: Tensor) -> Tensor:
    """Both kinds of attention by the gates of key-value heads (equation 1), (B, T, H, D)."""
    gate_H1 = gate_G.clamp(0, 1).repeat_interleave(full_BTHD.shape[2] // len(gate_G))[:, None]
    gate_H1 = gate_H1.to(device=full_BTHD.device, dtype=full_BTHD.dtype)
    return gate_H1 * full_BTHD + (1 - gate_H1) * streaming_BTHD


def _states(decoder: Any, ids_BT: Tensor) -> Tensor:
    states_BTd: Tensor = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
    return states_BTd


def _full(call: AttentionCall, prepared: Any) -> Tensor:
    """True at the layer's key-value heads that keep everything, (G,)."""
    if not isinstance(prepared, dict):
        raise ValueError("method duo-attention learns gates: apply() needs the value of its prepare() stage")
    full_G: Tensor = prepared[call.layer].to(call.k_BGTD.device)
    return full_G
