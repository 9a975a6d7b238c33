"""Text as tokens: tokenizers, tokenised documents, and the calibration sequences cut from them.

Shape suffixes: N tokens of a split, B batch, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import Stage, StageContext
from isoflop.models.worlds.calibration import CalibrationText
from isoflop.models.worlds.english import TextSource

END_OF_TEXT = "<|endoftext|>"
CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class TokenizerSource(Stage):
    """A stage whose value is a Hugging Face fast tokenizer."""

    def not_byte_level(self) -> str:
        """Why bytes have no probabilities under it; empty when they have. Known before anything is computed."""
        return ""

    def ready(self) -> Any:
        """The tokenizer itself where it lies in files; None where it must be computed first."""
        return None


@dataclass(frozen=True)
class TrainedTokenizer(TokenizerSource):
    """A byte-level BPE tokenizer trained on the training split; every text is representable.

    Args:
        english: the corpus.
        vocabulary: number of tokens: 256 bytes, the end-of-text token, merges.
    """

    kind: ClassVar[str] = "tokenizer"

    english: TextSource
    vocabulary: int

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train and save in ``save_pretrained`` form."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(ctx.get(self.english)["train"].values(), trainer)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
        wrapped.save_pretrained(folder)

    def load(self, ctx: StageContext, folder: Path) -> Any:
        """The tokenizer."""
        return read_tokenizer(folder)


@dataclass(frozen=True)
class Tokens:
    """A split's documents one after the other.

    Attributes:
        ids_N: token ids; no special tokens.
        end_N: UTF-8 bytes of the document up to the end of each token.
        starts: where each document starts, and the end of the last.
    """

    ids_N: np.ndarray
    end_N: np.ndarray
    starts: np.ndarray

    def windows(self, length: int) -> np.ndarray:
        """Starts of non-overlapping windows of ``length`` tokens, none across two documents, in order."""
        parts = [np.arange(a, b - length + 1, length) for a, b in pairwise(self.starts.tolist())]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class TokensStage(Stage):
    """A split of a corpus as token ids."""

    kind: ClassVar[str] = "tokens"

    english: TextSource
    tokenizer: TokenizerSource
    split: str

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Tokenise every document."""
        tokenizer = ctx.get(self.tokenizer)
        ids, ends, starts = [], [], [0]
        for _, text in sorted(ctx.get(self.english)[self.split].items()):
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids.append(np.asarray(encoded["input_ids"], dtype=np.int32))
            ends.append(byte_ends(text, [stop for _, stop in encoded["offset_mapping"]]))
            starts.append(starts[-1] + len(ids[-1]))
        np.savez(folder / "tokens.npz", ids=np.concatenate(ids), ends=np.concatenate(ends), starts=np.asarray(starts))

    def load(self, ctx: StageContext, folder: Path) -> Tokens:
        """The arrays."""
        with np.load(folder / "tokens.npz", allow_pickle=False) as arrays:
            return Tokens(arrays["ids"].astype(np.int64), arrays["ends"], arrays["starts"])


@dataclass(frozen=True)
class EnglishText(CalibrationText):
    """Windows of the training split of the English corpus, without overlap.

    Args:
        tokens: the training split in the model's tokens.
        length: tokens of a window.
    """

    tokens: TokensStage
    length: int

    def stages(self) -> tuple[Stage, ...]:
        """The tokenised split."""
        return (self.tokens,)

    def batches(self, ctx: StageContext, examples: int, seed: int) -> Iterator[Tensor]:
        """Windows drawn without replacement while there are enough."""
        tokens: Tokens = ctx.get(self.tokens)
        starts = tokens.windows(self.length)
        rng = np.random.default_rng(derive_seed("calibration", seed))
        chosen = rng.choice(starts, examples, replace=examples > len(starts))
        for first in range(0, examples, CALIBRATION_BATCH):
            rows = chosen[first : first + CALIBRATION_BATCH, None] + np.arange(self.length)
            yield torch.from_numpy(tokens.ids_N[rows])


def read_tokenizer(folder: Path) -> Any:
    """The fast tokenizer in a folder; no code from the folder runs.

    Its chat template may be its own, or that of the processor beside it, as vision-language checkpoints have it.
    """
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
    for name in PROCESSOR_TEMPLATES:
        if not getattr(found, "chat_template", None) and (folder / name).exists():
            found.chat_template = json.loads((folder / name).read_text()).get("chat_template")
    return found


PROCESSOR_TEMPLATES = ("chat_template.json", "processor_config.json")
"""Files in which processors keep a chat template."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder holds a fast tokenizer."""
    return (folder / "tokenizer.json").exists()


def byte_ends(text: str, ends: list[int]) -> np.ndarray:
    """UTF-8 bytes before each character offset."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = np.ones(len(codes), dtype=np.int64)
    for first in (0x80, 0x800, 0x10000):
        widths += codes >= first
    before = np.concatenate((np.zeros(1, dtype=np.int64), widths.cumsum()))
    return before[np.asarray(ends, dtype=np.int64)]
