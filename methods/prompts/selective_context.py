"""Selective-Context: drop what a language model finds least surprising (arXiv 2310.06201).

Shape suffixes: T tokens, N units of all documents, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.prompts.base import KeptUnits, RatedPromptMethod, selection_of
from isoflop.methods.prompts.select import at_least_percentile
from isoflop.methods.prompts.units import Page, Span, places_of, sentences_of, words_of
from isoflop.models.hooks.prompt_text import SEPARATOR, joined, prompt_of
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel


@METHODS.register("selective-context")
@dataclass(frozen=True)
class SelectiveContext(RatedPromptMethod):
    """Keep the units of most self-information, -log2 p(token | what stands before), averaged over a unit's tokens.

    The language model is the reader itself, whose forward pass over the whole context is the method's cost. The percentile
    is that of the units of the whole context. The paper's noun phrases need a parser; units here are words or
    sentences.
    """

    paper: ClassVar[str] = "arXiv 2310.06201"

    unit: Annotated[str, Knob(choices=("word", "sentence"), doc="what is kept or dropped as a whole")] = "word"

    def split(self, text: str) -> list[Span]:
        """Words or sentences."""
        return words_of(text) if self.unit == "word" else sentences_of(text)

    def select(self, pages: Sequence[Page], query: str | None, reader: LmModel, prepared: Any) -> KeptUnits:
        """Mean self-information of each unit against the percentile."""
        heading = len(prompt_of("", "")[0])
        bits_T, ends = self_information(reader, prompt_of(joined([page.document for page in pages]), "")[0])
        units, start = [], heading
        for page in pages:
            units += [(start + first, start + last) for first, last in page.units]
            start += len(page.document.text) + len(SEPARATOR)
        sums_N, counts_N = np.zeros(len(units)), np.zeros(len(units))
        for bits, place in zip(bits_T, places_of([end - 1 for end in ends], units), strict=True):
            if place is not None:
                sums_N[place] += bits
                counts_N[place] += 1
        score_N = sums_N / np.maximum(counts_N, 1)
        return selection_of(at_least_percentile(score_N, self.rate), pages, len(bits_T))


@torch.no_grad()
def self_information(reader: LmModel, text: str) -> tuple[np.ndarray, list[int]]:
    """Bits of every token of a text given those before it, and where each ends; the first token counts 0.

    A text longer than the reader's room is read in windows that overlap by half.
    """
    encoded = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, room = encoded["input_ids"], int(reader.info.geometry["positions"])
    bits_T = np.zeros(len(ids))
    known = 1
    for start in range(0, max(1, len(ids)), max(1, room // 2)):
        window_1T = torch.tensor([ids[start : start + room]], device=reader.device)
        if window_1T.shape[1] < 2:
            break
        logits_TW = reader.logits(LmBatch(window_1T, torch.full_like(window_1T, NOT_SCORED)))[0, :-1].float()
        nats_T = F.cross_entropy(logits_TW, window_1T[0, 1:], reduction="none").double().cpu().numpy()
        stop = start + window_1T.shape[1]
        bits_T[known:stop] = nats_T[known - start - 1 :] / np.log(2)
        known = stop
        if stop == len(ids):
            break
    return bits_T, [end for _, end in encoded["offset_mapping"]]
