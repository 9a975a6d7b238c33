"""Calibration text of a user's own: documents in a model's tokens, and windows cut from them.

Shape suffixes: N tokens, B batch, T tokens of a window.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isoflop.core.documents import documents
from isoflop.core.errors import Infeasible, UserError, unknown
from isoflop.core.hashing import derive_seed
from isoflop.core.rows import Rows
from isoflop.core.stage import Stage, StageContext
from isoflop.models.worlds.calibration import CalibrationText
from isoflop.models.worlds.english import TextSource
from isoflop.models.worlds.lm_text import CALIBRATION_BATCH, TokenizerSource, Tokens, TokensStage

LENGTH = 512
"""Tokens of a window, where nothing else is said."""


@dataclass(frozen=True)
class OwnDocuments(TextSource):
    """A user's documents, all of them in the split "train".

    Args:
        content: names the data; ``data`` and ``split``, where they lie, are no part of the stage's name.
        field: of a row, that holds the text; not for text files.
    """

    kind: ClassVar[str] = "own-text"

    content: str
    field: str
    data: str
    split: str

    def spec(self) -> dict[str, Any]:
        """Without the place, which two hosts may have each its own of."""
        return {name: value for name, value in super().spec().items() if name not in ("data", "split")}

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Copy the texts, so that what calibrates later sees what was named."""
        rows = documents(self.data, self.split)
        if rows.content != self.content:
            raise RuntimeError(f"data {self.data} changed while the sweep ran; run it again")
        texts = {
            f"{number:017d}": str(row.get(self.field) or "") for number, row in zip(rows.ids_N, rows.rows, strict=True)
        }
        (folder / "documents.json").write_text(json.dumps({"train": texts}))

    def load(self, ctx: StageContext, folder: Path) -> dict[str, dict[str, str]]:
        """Texts by split and document."""
        loaded: dict[str, dict[str, str]] = json.loads((folder / "documents.json").read_text())
        return loaded


@dataclass(frozen=True)
class OwnText(CalibrationText):
    """Windows of a user's documents, which follow one another with the tokenizer's end-of-text token in between.

    Args:
        tokens: the documents in the model's tokens.
        length: tokens of a window.
    """

    tokens: TokensStage
    length: int

    def as_field(self) -> dict[str, Any]:
        """What names it in the key of a stage."""
        return {"tokens": self.tokens.key, "length": self.length}

    def stages(self) -> tuple[Stage, ...]:
        """The tokenised documents, and the tokenizer, which knows how a text ends."""
        return (self.tokens, self.tokens.tokenizer)

    def batches(self, ctx: StageContext, examples: int, seed: int) -> Iterator[Tensor]:
        """Windows drawn without replacement while there are enough.

        Raises:
            UserError: the text has fewer tokens than a window.
        """
        ids_N = _joined(ctx.get(self.tokens), ctx.get(self.tokens.tokenizer).eos_token_id)
        length = self.length
        if len(ids_N) < length:
            raise UserError(
                f"calibration: the data hold {len(ids_N)} tokens, and an example has {length}; allowed: more text, or a shorter length"
            )
        starts = np.arange(0, len(ids_N) - length + 1, length)
        chosen = np.random.default_rng(derive_seed("calibration", seed)).choice(
            starts, examples, replace=examples > len(starts)
        )
        for first in range(0, examples, CALIBRATION_BATCH):
            rows = chosen[first : first + CALIBRATION_BATCH, None] + np.arange(length)
            yield torch.from_numpy(ids_N[rows])


def own_text(choice: Mapping[str, Any], tokenizer: TokenizerSource | None, most: int | None, ref: str) -> OwnText:
    """The windows that ``calibration:`` of a sweep asks for, in a model's tokens.

    Args:
        choice: ``data``, and perhaps ``split``, ``field``, ``length``, and ``samples``: windows that it must hold.
        most: tokens of a window that the model reads whole; None where nothing limits it.
        ref: the model's name, for messages.

    Raises:
        Infeasible: the model reads no text, or none as long.
        UserError: nothing there, no such field, one that holds something else, nothing but empty documents, too few tokens.
    """
    if tokenizer is None:
        raise Infeasible(f"calibration: model {ref} has no tokenizer; allowed: language models that read text")
    length = choice.get("length")
    if length is None:
        length = min(LENGTH, most or LENGTH)
    if most is not None and length > most:
        raise Infeasible(
            f"calibration: length = {length} is more than the {most} tokens that a text of model {ref} may have, beside special ones"
        )
    data, split, field = choice["data"], choice.get("split", ""), choice.get("field", "text")
    rows = documents(data, split)
    if field not in rows.fields():
        raise unknown(f"field of {rows.name}", field, rows.fields(), "calibration: field")
    _check_texts(rows, field)
    size = text_bytes(rows, field)
    if not size:
        raise UserError(f"calibration: data {data}: every document is empty")
    if size + len(rows) < length:  # tokens are no shorter than a byte, and one stands between documents
        raise UserError(
            f"calibration: data {data}: hold {size} bytes, and an example has {length} tokens; allowed: more text, or a shorter length"
        )
    samples = choice.get("samples")
    if samples is not None:
        _check_samples(rows, field, tokenizer, samples, length)
    return OwnText(TokensStage(OwnDocuments(rows.content, field, data, split), tokenizer, "train"), length)


def _check_texts(rows: Rows, field: str) -> None:
    for index, row in enumerate(rows.rows):
        value = row.get(field)
        if value is not None and not isinstance(value, str):
            place = rows.place(index) or rows.name
            raise UserError(f"calibration: field {field!r} of {place} holds no text but {str(value)[:40]!r}")


def _check_samples(rows: Rows, field: str, tokenizer: TokenizerSource, samples: int, length: int) -> None:
    """Raise UserError where the text has fewer windows than are asked for.

    Tokens are counted where the tokenizer is there, up to as many as are needed; else a token takes a byte at least.
    """
    needed, ready = samples * length, tokenizer.ready()
    between = 0 if ready is not None and ready.eos_token_id is None else 1
    held = -between
    for row in rows.rows:
        text = str(row.get(field) or "")
        tokens = (
            len(text.encode())
            if ready is None
            else len(ready(text, add_special_tokens=False, verbose=False)["input_ids"])
        )
        held += tokens + between if tokens else 0
        if held >= needed:
            return
    held, most = max(held, 0), "" if ready is not None else "at most "
    raise UserError(
        f"calibration: data {rows.name}: samples = {samples} of {length} tokens are {needed} tokens, and the text has {most}{held}; "
        f"allowed: samples up to {held // length}, a shorter length, or more text"
    )


def text_bytes(rows: Rows, field: str) -> int:
    """Bytes of all documents together."""
    return sum(len(str(row.get(field) or "").strip().encode()) for row in rows.rows)


def _joined(tokens: Tokens, end: int | None) -> np.ndarray:
    """All documents that have tokens, one behind the other."""
    parts: list[np.ndarray] = []
    for start, stop in pairwise(tokens.starts.tolist()):
        if stop > start:
            parts += [np.array([end], dtype=np.int64)] if parts and end is not None else []
            parts.append(tokens.ids_N[start:stop])
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
