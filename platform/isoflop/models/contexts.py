"""Reading contexts once, and scoring or generating behind them as often as one likes.

A context is what a method on the cache compresses. It takes one pass; every continuation takes passes of its own behind the
compressed context, from a mark to which the cache goes back, so that several answers to one question pay for the context
once. Logits are computed where something is scored, and nowhere else.

Shape suffixes: B rows, T tokens of a pass, S scored tokens, W vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.kernels.blocks import queries_at_once
from isoflop.models.hooks.attention import ATTENTION, AttentionPolicy
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.hooks.prompt_text import PROMPT_TEXT
from isoflop.models.lm import LmModel
from isoflop.models.prompt_passes import PromptPass

MOST_LOGITS = 2**25
"""Numbers of one tensor of logits, rows times tokens times vocabulary; longer continuations take several passes."""
Ids = Sequence[int]


@dataclass(frozen=True)
class Scores:
    """What a model makes of continuations, each (B,).

    Attributes:
        nll_B: negative log-likelihood of the scored tokens in nats.
        right_B: scored tokens that the model would have chosen.
        scored_B: scored tokens.
        noted: figures of what sits in the feed-forward blocks, by name, averaged over the passes.
    """

    nll_B: np.ndarray
    right_B: np.ndarray
    scored_B: np.ndarray
    noted: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def greedy_B(self) -> np.ndarray:
        """1 where greedy decoding would give every scored token."""
        return (self.right_B == self.scored_B).astype(np.float64)


class Contexts:
    """Contexts of a batch that a model has read. Make one with ``read_contexts``."""

    def __init__(self, lm: LmModel, cache: _Cache, lengths_B: Tensor) -> None:
        self._lm = lm
        self._cache = cache
        self._lengths_B = lengths_B

    @torch.no_grad()
    def score(self, tails: Sequence[Ids], scored: Sequence[int]) -> Scores:
        """Score the last tokens of what follows each context; the contexts are as before afterwards.

        Args:
            tails: token ids behind the contexts (question and answer).
            scored: how many tokens at the end of each tail are scored. A tail that is scored from its first token on gets that
                one's logits from the context's last token, whose attention is exact: nothing of a compressed cache was read.

        Raises:
            ValueError: more scored tokens than a tail has, or none; tails of different lengths while something sits in the
                feed-forward blocks.
        """
        _check_tails(tails, scored)
        with self._cache.returning():
            return self._score(tails, scored)

    @torch.no_grad()
    def generate(self, tails: Sequence[Ids], most: int, ends: frozenset[int], done: Any = None) -> list[list[int]]:
        """The most likely tokens behind contexts and tails, one after the other.

        Args:
            tails: of one length; empty ones go on behind the contexts' own last tokens.
            most: tokens of the longest answer.
            ends: ids that end an answer; they are not part of it.
            done: from a row's ids to whether they are enough, or None.

        Raises:
            ValueError: tails of different lengths.
        """
        if len({len(tail) for tail in tails}) != 1:
            raise ValueError("generation needs tails of one length")
        found: list[list[int]] = [[] for _ in tails]
        going = [True] * len(tails)
        with self._cache.returning():
            ids_BT = self._ids(tails)
            start = 0
            for _ in range(most):
                logits_BW = self._pass(ids_BT, start, 1)[:, -1] if ids_BT.shape[1] else self._cache.last_BW
                start += ids_BT.shape[1]
                ids_BT = logits_BW.argmax(-1, keepdim=True)
                for row, token in enumerate(ids_BT[:, 0].tolist()):
                    if going[row] and token in ends:
                        going[row] = False
                    elif going[row]:
                        found[row].append(token)
                        going[row] = done is None or not done(found[row])
                if not any(going):
                    break
        return found

    def _score(self, tails: Sequence[Ids], scored: Sequence[int]) -> Scores:
        given = [len(tail) - 1 for tail in tails]  # the last token of a tail is only predicted
        observing = self._lm.occupant(FEED_FORWARD)
        if observing is not None and len(set(given)) > 1:
            raise ValueError("what observes the feed-forward blocks needs tails of one length")
        ids_BT = self._ids([tail[:-1] for tail in tails])
        targets_BT = self._ids([tail[1:] for tail in tails])
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        ends_B1 = torch.tensor(given, device=ids_BT.device)[:, None]
        counts_B1 = torch.tensor(list(scored), device=ids_BT.device)[:, None]
        scored_BT = (places_T < ends_B1) & (places_T >= ends_B1 - counts_B1)
        nll_B, right_B = (torch.zeros(len(tails), dtype=torch.float64, device=ids_BT.device) for _ in range(2))

        def add(rows_S: Tensor, logits_SW: Tensor, wanted_S: Tensor) -> None:
            nll_S = F.cross_entropy(logits_SW.float(), wanted_S, reduction="none").double()
            nll_B.index_add_(0, rows_S, nll_S)
            right_B.index_add_(0, rows_S, (logits_SW.argmax(-1) == wanted_S).double())

        whole_S = torch.tensor(
            [n for n, tail in enumerate(tails) if scored[n] == len(tail)], device=ids_BT.device
        ).long()
        firsts_B = torch.tensor([tail[0] for tail in tails], device=ids_BT.device)
        add(whole_S, self._cache.last_BW[whole_S], firsts_B[whole_S])
        notes: list[tuple[int, dict[str, np.ndarray]]] = []
        for start, stop in self._pieces(ids_BT.shape[1], len(tails)):  # none, where tails have one token
            asked_BT = scored_BT[:, start:stop]
            first = int(asked_BT.any(0).int().argmax()) if bool(asked_BT.any()) else stop - start - 1
            logits_BTW = self._pass(ids_BT[:, start:stop], start, stop - start - first)
            asked_BT, wanted_BT = asked_BT[:, first:], targets_BT[:, start:stop][:, first:]
            add(asked_BT.nonzero()[:, 0], logits_BTW[asked_BT], wanted_BT[asked_BT])
            if observing is not None:
                notes.append((stop - start, {k: x.cpu().numpy() for k, x in observing.observed().items()}))
        columns = nll_B.cpu().numpy(), right_B.cpu().numpy(), np.asarray(scored, dtype=np.float64)
        return Scores(*columns, _averaged(notes))

    def _pieces(self, length: int, rows: int) -> Iterator[tuple[int, int]]:
        size = max(1, MOST_LOGITS // (rows * self._lm.info.geometry["vocab_size"]))
        size = min(size, self._cache.most_tokens(rows) or size)
        for start in range(0, length, size):
            yield start, min(start + size, length)

    def _ids(self, rows: Sequence[Ids]) -> Tensor:
        """Rows side by side, padded on the right: what stands behind a row's last token changes nothing before it."""
        length = max(len(row) for row in rows)
        ids = [[*row, *[0] * (length - len(row))] for row in rows]
        return torch.tensor(ids, dtype=torch.int64, device=self._lm.device).reshape(len(rows), length)

    def _pass(self, ids_BT: Tensor, start: int, keep: int) -> Tensor:
        positions_BT = self._lengths_B[:, None] + start + torch.arange(ids_BT.shape[1], device=ids_BT.device)
        # padding on the right may reach behind the last position that a model knows
        positions_BT = positions_BT.clamp(max=self._lm.room - 1)
        return self._cache.go_on(ids_BT, positions_BT, keep)


@contextmanager
def read_contexts(lm: LmModel, contexts: Sequence[Ids], known: bool = False) -> Iterator[Contexts]:
    """Read contexts, at least one token each, as one batch; methods on the cache compress them, and only them.

    Args:
        known: the pass over contexts that the model has read before need not run again, where it would be the same; not
            where it is to be measured.

    Raises:
        ValueError: a context without a token.
    """
    if not contexts or not all(contexts):
        raise ValueError("a context needs at least one token")
    length = max(len(context) for context in contexts)
    ids = [[*[0] * (length - len(context)), *context] for context in contexts]
    ids_BT = torch.tensor(ids, dtype=torch.int64, device=lm.device)
    lengths_B = torch.tensor([len(context) for context in contexts], device=lm.device)
    valid_BT = torch.arange(length, device=lm.device) >= length - lengths_B[:, None]
    positions_BT = (valid_BT.long().cumsum(-1) - 1).clamp(min=0)
    policy = lm.occupant(ATTENTION)
    cache: _Cache = _Whole(lm) if policy is None else _Compressed(lm, policy, known)
    with torch.no_grad(), cache.open():
        cache.begin(ids_BT, positions_BT, None if bool(valid_BT.all()) else valid_BT)
        yield Contexts(lm, cache, lengths_B)


class _Cache:
    """Where the keys and values of contexts are, and how passes behind them run.

    Attributes:
        last_BW: logits behind the contexts' last tokens.
    """

    last_BW: Tensor

    def __init__(self, lm: LmModel) -> None:
        self._lm = lm

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside the block the contexts are held."""
        yield

    def begin(self, ids_BT: Tensor, positions_BT: Tensor, valid_BT: Tensor | None) -> None:
        raise NotImplementedError

    def go_on(self, ids_BT: Tensor, positions_BT: Tensor, keep: int) -> Tensor:
        """Logits of the last ``keep`` tokens, (B, keep, W)."""
        raise NotImplementedError

    def most_tokens(self, rows: int) -> int | None:
        """Of each row in one pass behind the contexts; None for any number."""
        return None

    @contextmanager
    def returning(self) -> Iterator[None]:
        """What the passes inside the block add is gone behind it."""
        raise NotImplementedError
        yield

    def _module(self, keep: int, **inputs: Any) -> Tensor:
        """Logits of the last tokens; a head that cannot leave the others out computes them all."""
        module = self._lm.module
        if "logits_to_keep" in inspect.signature(module.forward).parameters:
            inputs["logits_to_keep"] = keep
        return module(**inputs).logits[:, -keep:]


class _Whole(_Cache):
    """Hugging Face's own cache and attention, where no method acts on them."""

    def __init__(self, lm: LmModel) -> None:
        super().__init__(lm)
        self._cache: Any = None
        self._valid_BT: Tensor | None = None

    def begin(self, ids_BT: Tensor, positions_BT: Tensor, valid_BT: Tensor | None) -> None:
        from transformers import DynamicCache

        self._cache, self._valid_BT = DynamicCache(config=self._lm.decoder.config), valid_BT
        self.last_BW = self._module(
            1,
            input_ids=ids_BT,
            attention_mask=None if valid_BT is None else valid_BT.long(),
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
        )[:, -1]

    def go_on(self, ids_BT: Tensor, positions_BT: Tensor, keep: int) -> Tensor:
        if self._valid_BT is not None:
            self._valid_BT = torch.cat((self._valid_BT, torch.ones_like(ids_BT, dtype=torch.bool)), dim=1)
        return self._module(
            keep,
            input_ids=ids_BT,
            attention_mask=None if self._valid_BT is None else self._valid_BT.long(),
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
        )

    def most_tokens(self, rows: int) -> int | None:
        """As many as have a mask of a block's size: Hugging Face makes one of the pass by all tokens so far."""
        return queries_at_once(self._lm.device, rows, self._cache.get_seq_length())

    @contextmanager
    def returning(self) -> Iterator[None]:
        held, valid_BT, tokens = self._cache, self._valid_BT, self._cache.get_seq_length()
        croppable = all(type(layer).__name__ == "DynamicLayer" for layer in held.layers)
        if not croppable:  # a window forgets what cutting the end off cannot bring back
            self._cache = copy.deepcopy(held)
        try:
            yield
        finally:
            self._cache, self._valid_BT = held, valid_BT
            if croppable and held.get_seq_length() > tokens:
                held.crop(tokens - held.get_seq_length())


class _Compressed(_Cache):
    """The session of what sits in the attention."""

    def __init__(self, lm: LmModel, policy: AttentionPolicy, known: bool) -> None:
        super().__init__(lm)
        self._policy = policy
        # whatever else acts on the model might change the pass; text is shortened before
        self._known = known and policy.exact_prompt and set(lm.occupied) <= {ATTENTION, PROMPT_TEXT}

    def most_tokens(self, rows: int) -> int | None:
        """One, where the policy wants a pass per token."""
        return 1 if self._policy.token_by_token else None

    @contextmanager
    def open(self) -> Iterator[None]:
        with self._policy.session():
            yield

    def begin(self, ids_BT: Tensor, positions_BT: Tensor, valid_BT: Tensor | None) -> None:
        if not self._known:
            self.last_BW = self._read(ids_BT, positions_BT, valid_BT)
            return
        key = _key(ids_BT, valid_BT, self._policy.follows_rotation)
        found = self._lm.passes.find(key)
        if found is None:
            with self._policy.noting() as calls:
                last_BW = self._read(ids_BT, positions_BT, valid_BT)
            found = PromptPass(calls, last_BW)
            self._lm.passes.keep(key, found)
        else:
            self._policy.follow(found.calls, ids_BT)
        self.last_BW = found.last_BW

    def _read(self, ids_BT: Tensor, positions_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
        return self._module(
            1,
            input_ids=ids_BT,
            attention_mask=None if valid_BT is None else valid_BT.long(),
            position_ids=positions_BT,
            use_cache=False,
        )[:, -1]

    def go_on(self, ids_BT: Tensor, positions_BT: Tensor, keep: int) -> Tensor:
        return self._module(keep, input_ids=ids_BT, position_ids=positions_BT, use_cache=False)

    @contextmanager
    def returning(self) -> Iterator[None]:
        with self._policy.returning():
            yield


def _key(ids_BT: Tensor, valid_BT: Tensor | None, rotated: bool) -> bytes:
    """All that a pass of one model depends on, and whether it tells rotations; positions follow from padding."""
    valid = b"" if valid_BT is None else valid_BT.cpu().numpy().tobytes()
    text = repr((tuple(ids_BT.shape), rotated, torch.get_num_threads())).encode()
    return hashlib.sha256(text + ids_BT.cpu().numpy().tobytes() + valid).digest()


def _check_tails(tails: Sequence[Ids], scored: Sequence[int]) -> None:
    for tail, count in zip(tails, scored, strict=True):
        if not 0 < count <= len(tail):
            raise ValueError(f"{count} tokens of a tail of {len(tail)} cannot be scored")


def _averaged(notes: Sequence[tuple[int, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Means over passes, each weighted by its tokens."""
    if not notes:
        return {}
    total = sum(tokens for tokens, _ in notes)
    return {name: sum(tokens * note[name] for tokens, note in notes) / total for name in notes[0][1]}  # type: ignore[misc]


def room_for(lm: LmModel, tokens: int, what: str) -> None:
    """Raise Infeasible where a model has less room than ``tokens``."""
    room = lm.room
    if tokens > room:
        raise Infeasible(f"{what} takes {tokens} tokens; model {lm.info.ref} has room for {room}")
