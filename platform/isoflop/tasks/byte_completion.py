"""The tasks ``byte-completion`` and ``byte-boundary``: continue prompts that end inside a token, or behind a word."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.byte_trees.segmentations import Segmentations
from isoflop.models.byte_trees.tree import Counts, log_likelihood
from isoflop.models.counting import flops_of
from isoflop.models.features import batches
from isoflop.models.hooks.attention import ATTENTION, CacheReport
from isoflop.models.hooks.byte_view import (
    BYTE_VIEW,
    ByteText,
    ByteView,
    SegmentationsStage,
    TokenView,
    segmentations_of,
)
from isoflop.models.lm import LmModel
from isoflop.models.metering import meter
from isoflop.models.worlds.english import EnglishStage, python_release
from isoflop.tasks.base import TASKS, Shard, Task
from isoflop.tasks.byte_meter import ByteMeter
from isoflop.tasks.footprint import byte_costs, peak_bytes_of, seconds_of
from isoflop.tasks.language_task import lm_info, lm_model

CUTS = {"inside": re.compile(rb"(?<=[A-Za-z])(?=[A-Za-z])"), "anywhere": re.compile(rb"(?s)(?=.)")}
BEHIND_A_WORD = re.compile(rb"(?<=[A-Za-z])(?=[ \n])")
_WORDS = re.compile(rb"[A-Za-z] [A-Za-z]")
_WORD_START = re.compile(rb"(?<=[A-Za-z]) ")


@dataclass(frozen=True)
class ByteTask(Task):
    """Base class of tasks that predict, byte by byte, what follows places in held-out English.

    An example is a place in the text: at most ``prompt`` bytes before it, from the start of a word, are given; the
    ``scored`` bytes behind it are predicted through the model's view of bytes. Examples depend on no tokenizer, so that
    models with different vocabularies score the same bytes. Secondary metrics: ``first_bits`` (of the byte right behind
    the place, where segmentations matter most) and ``accuracy`` (share of bytes that were the likeliest).

    The text comes with the Python installation, so that its release is part of the task's version.
    """

    version: ClassVar[str] = f"1-{python_release()}"
    metrics: ClassVar[tuple[str, ...] | None] = ("first_bits", "accuracy")
    quantity: ClassVar[str] = "bits per byte"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({BYTE_VIEW})

    examples: Annotated[int, Knob(low=1, high=100_000, doc="places in the text")] = 128
    prompt: Annotated[int, Knob(low=24, high=100_000, doc="most bytes of a prompt", unit="bytes")] = 128
    scored: Annotated[int, Knob(low=1, high=10_000, doc="bytes that are predicted", unit="bytes")] = 16
    shard: Annotated[int, Knob(low=1, high=4096, doc="places scored in one batch, and per shard")] = 32

    @abstractmethod
    def places(self) -> re.Pattern[bytes]:
        """What matches, without taking a byte, wherever a prompt may end."""

    def check(self, info: ModelInfo) -> None:
        """A byte-level tokenizer, and room even where every byte is a token."""
        super().check(info)
        segmentations_of(info, f"task {self.name}")
        room, needed = lm_info(info, self.name).geometry["positions"], self.prompt + self.scored + 1
        if needed > room:
            raise Infeasible(
                f"task {self.name}: prompt + scored = {needed - 1} bytes may be as many tokens; model {info.ref} has room "
                f"for {room}"
            )

    def check_method(self, method: Method, info: ModelInfo) -> None:
        """Refuse methods on the cache or on attention, for which a tree of tokens is no text."""
        if ATTENTION in method.hooks:
            raise Infeasible(
                f"task {self.name}: method {method.name} acts on the KV cache or attention, and bytes get their "
                "probabilities from trees of tokens; take bits-per-byte"
            )

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        """The held-out text, and what is known of the tokenizer's segmentations."""
        return (EnglishStage.here(), self._segmentations(info))

    def texts(self, ctx: StageContext) -> list[ByteText]:
        """All examples, in order of their numbers; a shorter suite is a prefix of a longer one."""
        documents: dict[str, str] = ctx.get(EnglishStage.here())["test"]
        data = [text.encode() for _, text in sorted(documents.items())]
        pattern = self.places()
        places = [(number, match.start()) for number, text in enumerate(data) for match in pattern.finditer(text)]
        rng = np.random.default_rng(derive_seed("places", pattern.pattern.decode()))
        found: list[ByteText] = []
        for index in rng.permutation(len(places)):
            number, at = places[index]
            text = self._text(data[number], at)
            if text is not None:
                found.append(text)
            if len(found) == self.examples:
                break
        return found

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Score batch by batch."""
        lm = lm_model(model, self.name)
        segmentations: Segmentations = ctx.get(self._segmentations(lm.info))
        texts = self.texts(ctx)
        order = np.random.default_rng(derive_seed("order", self.name, seed)).permutation(len(texts))
        view = lm.occupant(BYTE_VIEW) or TokenView()
        for part in batches(len(order), self.shard):
            ids = order[part]
            yield score(view, lm, segmentations, ids, [texts[i] for i in ids])

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of predicting the bytes of example 0: prompt, and every token of the trees behind it, of all models.

        ``text_tokens`` are those of the text as the model's tokenizer cuts it, ``tree_tokens`` those that were run.
        """
        lm = lm_model(model, self.name)
        segmentations: Segmentations = ctx.get(self._segmentations(lm.info))
        text, view = self.texts(ctx)[0], lm.occupant(BYTE_VIEW) or TokenView()

        def predict() -> Any:
            return view.next_bytes(lm, segmentations, [text])

        with meter(lm):
            flops, _ = flops_of(predict)
        counts = view.counts  # before anything else runs
        tokens = len(segmentations.vocabulary.encode(text.data[:-1]))
        stored = sum(part.dense_cache_bytes(count) for part, count in _run_tokens(view, counts, lm))
        costs = byte_costs(lm, CacheReport(stored, stored, 0.0, 0.0, stored), lm.dense_cache_bytes(tokens))
        return {
            "visual_tokens": 0.0,
            "text_tokens": float(tokens),
            "tree_tokens": float(counts.tokens),
            "flops": float(flops),
            "flops_llm": float(flops),
            "flops_per_byte": flops / self.scored,
            **costs,
            "seconds": seconds_of(predict, lm.devices),
            "peak_bytes": float(lm.resident_bytes() + peak_bytes_of(predict, lm.devices)),
        }

    def _segmentations(self, info: ModelInfo) -> SegmentationsStage:
        return segmentations_of(info, f"task {self.name}")

    def _text(self, document: bytes, at: int) -> ByteText | None:
        """The example at a place, or None where there is too little before or behind it."""
        start = _WORD_START.search(document, max(0, at - self.prompt), at)
        if start is None or at + self.scored > len(document):
            return None
        prompt = document[start.start() : at]
        return ByteText(prompt + document[at : at + self.scored], len(prompt)) if _WORDS.search(prompt) else None


@TASKS.register("byte-completion")
@dataclass(frozen=True)
class ByteCompletion(ByteTask):
    """Bits per byte behind prompts that are cut without regard to tokens, as an editor cuts text at the cursor.

    ``cut: inside`` cuts between two letters of a word, ``anywhere`` at any byte.
    """

    version: ClassVar[str] = ByteTask.version

    cut: Annotated[str, Knob(choices=tuple(CUTS), doc="where prompts end")] = "inside"

    def places(self) -> re.Pattern[bytes]:
        """Of the cut."""
        return CUTS[self.cut]


@TASKS.register("byte-boundary")
@dataclass(frozen=True)
class ByteBoundary(ByteTask):
    """Bits per byte behind prompts that end behind a word: the control of ``byte-completion``."""

    version: ClassVar[str] = ByteTask.version

    def places(self) -> re.Pattern[bytes]:
        """Between a letter and a space or the end of a line."""
        return BEHIND_A_WORD


def score(
    view: ByteView, model: LmModel, segmentations: Segmentations, ids: np.ndarray, texts: list[ByteText]
) -> Shard:
    """Bits per byte of some texts."""
    meter = ByteMeter(segmentations.vocabulary)
    first, right = [], []
    for text, logs_PS in zip(texts, view.next_bytes(model, segmentations, texts), strict=True):
        log_P = log_likelihood(logs_PS, text.data)
        meter.add(-float(log_P.sum()), text.data[text.first :], text.data)
        first.append(-float(log_P[0]) / math.log(2))
        right.append(float((logs_PS.argmax(1) == list(text.data[text.first :])).mean()))
    return Shard(ids, meter.each(), {"first_bits": np.array(first), "accuracy": np.array(right)})


def _run_tokens(view: ByteView, counts: Counts, model: LmModel) -> list[tuple[LmModel, int]]:
    return list(zip((model, *view.members), counts.per_model or (counts.tokens,), strict=True))
