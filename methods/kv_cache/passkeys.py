"""Texts that hide passkeys and ask for them at the end: what a head must look far back for.

With a tokenizer, lists of words in the model's calibration text. Models of raw symbols cannot be asked in words: there a passkey is a
run of symbols among random ones, and the question its first symbol, so that the rest is a copy.

Shape suffixes: B batch (1), T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.models.decoder_model import decoder_model
from isoflop.models.lm import LmModel

WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima", "mike", "november",
    "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
HIDDEN = "\n\nKeep these words in mind, they are the {} passkey: {}\n\n"
ASKED = "What is the {} passkey that the text holds?\nPasskey: "
SHALLOWEST, DEEPEST = 0.05, 0.95
FIRST_SYMBOL = 2
"""Symbols before it begin and separate texts."""


@dataclass(frozen=True)
class PasskeyText:
    """One text.

    Attributes:
        ids_BT: its tokens.
        answers_BT, questions_BT: True at the passkeys that are repeated at the end, and at what asks for them.
    """

    ids_BT: Tensor
    answers_BT: Tensor
    questions_BT: Tensor


def passkey_texts(
    model: Any, ctx: StageContext, texts: int, length: int, passkeys: int, words: int, seed: int
) -> Iterator[PasskeyText]:
    """Texts of about ``length`` tokens with ``passkeys`` of ``words`` words or symbols each.

    Raises:
        Infeasible: passkeys and questions leave no room for a text around them.
    """
    lm = decoder_model(model, "duo-attention")
    rng = np.random.default_rng(derive_seed("passkeys", seed))
    source: _Words | _Symbols
    if isinstance(lm, LmModel) and lm.info.tokenizer is not None and lm.info.text is not None:
        source = _Words(lm, ctx, texts * length, seed)
    else:
        source = _Symbols(lm.info.geometry["vocab_size"], length)
    for _ in range(texts):
        keys = [source.passkey(rng, words, number) for number in range(passkeys)]
        around = length - sum(len(hidden) + len(asked) + len(answer) for hidden, asked, answer in keys) - 1
        if around < passkeys:
            raise Infeasible(
                f"method duo-attention: length = {length} leaves no room around {passkeys} passkeys of {words} words and their questions, "
                f"which take {length - around} tokens; allowed: at least {length - around + passkeys}"
            )
        yield _woven(source.start, source.text(rng, around), keys, rng, lm.device)


Key = tuple[list[int], list[int], list[int]]
"""Tokens of a passkey as it is hidden, of its question, and of the answer."""


def _woven(start: list[int], around: list[int], keys: list[Key], rng: np.random.Generator, device: Any) -> PasskeyText:
    low, high = int(SHALLOWEST * len(around)), int(DEEPEST * len(around))
    depths = np.sort(rng.integers(low, high + 1, len(keys))).tolist()
    ids, last = list(start), 0
    for depth, (hidden, _, _) in zip(depths, keys, strict=True):
        ids += around[last:depth] + hidden
        last = depth
    ids += around[last:]
    kinds = [0] * len(ids)
    for _, asked, answer in keys:
        ids += asked + answer
        kinds += [1] * len(asked) + [2] * len(answer)
    kinds_BT = torch.tensor([kinds], device=device)
    return PasskeyText(torch.tensor([ids], device=device), kinds_BT == 2, kinds_BT == 1)


class _Words:
    """Calibration text in one stream, and passkeys of words."""

    def __init__(self, lm: LmModel, ctx: StageContext, tokens: int, seed: int) -> None:
        self._tokenizer = lm.tokenizer
        first = self._tokenizer.bos_token_id
        self.start = [] if first is None else [first]
        window = next(iter(lm.calibration(ctx, 1, seed))).ids_BT.shape[1]
        batches = lm.calibration(ctx, -(-tokens // window), seed)
        self._stream = [token for batch in batches for token in batch.ids_BT.flatten().tolist()]
        self._next = 0

    def passkey(self, rng: np.random.Generator, words: int, number: int) -> Key:
        said = " ".join(WORDS[n] for n in rng.integers(0, len(WORDS), words))
        nth = ORDINALS[number]
        return self._ids(HIDDEN.format(nth, said)), self._ids(ASKED.format(nth)), self._ids(said + "\n\n")

    def text(self, rng: np.random.Generator, tokens: int) -> list[int]:
        if self._next + tokens > len(self._stream):
            self._next = 0
        self._next += tokens
        return self._stream[self._next - tokens : self._next]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


class _Symbols:
    """Random symbols; all of a text different where there are enough of them."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.start = [0]
        self._symbols = np.arange(min(FIRST_SYMBOL, vocabulary - 1), vocabulary)
        self._repeats = length > len(self._symbols)
        self._left: list[int] = []

    def passkey(self, rng: np.random.Generator, words: int, number: int) -> Key:
        if number == 0:
            self._left = []
        symbols = self._drawn(rng, words)
        return symbols, symbols[:1], symbols[1:]

    def text(self, rng: np.random.Generator, tokens: int) -> list[int]:
        return self._drawn(rng, tokens)

    def _drawn(self, rng: np.random.Generator, count: int) -> list[int]:
        if self._repeats:
            return rng.choice(self._symbols, count).tolist()
        if not self._left:
            self._left = rng.permutation(self._symbols).tolist()
        found, self._left = self._left[:count], self._left[count:]
        return found
