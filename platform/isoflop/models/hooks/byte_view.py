"""The hook ``byte_view``: how a language model over tokens gives probabilities of bytes.

A task that scores bytes asks the model's view, or ``TokenView`` where no method has put one there.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import ModelInfo
from isoflop.models.byte_trees.segmentations import Segmentations
from isoflop.models.byte_trees.starts import prompt_start
from isoflop.models.byte_trees.tree import RENORMALISED, Counts, CoveringTree, Start
from isoflop.models.byte_trees.vocabulary import ByteVocabulary
from isoflop.models.hooks.occupant import Occupant

if TYPE_CHECKING:
    from isoflop.models.lm import LmModel
    from isoflop.models.worlds.lm_text import TokenizerSource


@dataclass(frozen=True)
class ByteText:
    """Bytes of which some are scored.

    Attributes:
        data: the start of a UTF-8 text; it may stop inside a character.
        first: bytes of the prompt; those behind it are scored.
    """

    data: bytes
    first: int


class ByteView(Occupant, ABC):
    """The occupant: probabilities of the next byte at every scored position of some texts.

    Attributes:
        counts: what the last call took, of all models together.
        members: models that are asked besides the one in whose hook it sits.
    """

    counts: Counts
    members: tuple[LmModel, ...] = ()

    def held_bytes(self, dense_bits: int) -> float:
        """Weights of the members, each as its own model counts them."""
        return sum(member.weight_bytes() for member in self.members)

    def tensors(self) -> Sequence[Tensor]:
        """Parameters and buffers of the members."""
        return [t for m in self.members for t in (*m.module.parameters(), *m.module.buffers())]

    @abstractmethod
    def next_bytes(self, model: LmModel, segmentations: Segmentations, texts: Sequence[ByteText]) -> list[np.ndarray]:
        """Log-probabilities (positions, 257) of each text: the 256 bytes and "no byte follows", summing to 1.

        Row i is the distribution of byte ``first + i`` given all bytes before it.

        Args:
            segmentations: of the model's tokenizer.
        """


BYTE_VIEW: Hook[ByteView] = Hook("byte_view", 45, "turns probabilities of tokens into those of bytes", asked=True)


@dataclass
class TreeView(ByteView):
    """A view by covering trees; subclasses say where a tree begins.

    Args:
        mass, beam: see ``CoveringTree``.
    """

    mass: str = RENORMALISED
    beam: int = 0
    counts: Counts = field(default_factory=Counts)

    @abstractmethod
    def start(self, segmentations: Segmentations, text: ByteText) -> Start:
        """The tokens that the prompt is given as, and the offset from which on segmentations are summed over."""

    def next_bytes(self, model: LmModel, segmentations: Segmentations, texts: Sequence[ByteText]) -> list[np.ndarray]:
        """One tree per text, all in one batch."""
        for text in texts:
            segmentations.vocabulary.require(text.data)
        tree = CoveringTree(model, segmentations, self.mass, self.beam)
        found = tree.next_bytes([self.start(segmentations, text) for text in texts])
        self.counts = tree.counts
        return found


@dataclass
class TokenView(TreeView):
    """The model as it is served: the prompt is tokenised by itself, and what follows is conditioned on those tokens.

    A prompt that ends inside a word ends in a token that the model has rarely seen there.
    """

    def start(self, segmentations: Segmentations, text: ByteText) -> Start:
        """Behind the prompt."""
        return prompt_start(segmentations.vocabulary, text.data, text.first)


@dataclass(frozen=True)
class SegmentationsStage(Stage):
    """What is known of a tokenizer's segmentations; nothing is stored, it is read when it is loaded."""

    kind: ClassVar[str] = "segmentations"

    tokenizer: TokenizerSource

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Write down whose they are."""
        (folder / "source.json").write_text(json.dumps({"tokenizer": self.tokenizer.key}) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> Segmentations:
        """The segmentations, whose answers are kept as long as the value is."""
        return Segmentations(ByteVocabulary(ctx.get(self.tokenizer)))


def segmentations_of(info: ModelInfo, asker: str) -> SegmentationsStage:
    """The stage of a model's segmentations.

    Raises:
        Infeasible: the model has no tokenizer, or one under which bytes have no probabilities; or it is trained on
            another cut of the texts whose bytes are scored.
    """
    tokenizer = getattr(info, "tokenizer", None)
    if tokenizer is None:
        raise Infeasible(f"{asker} needs a tokenizer, which model {info.ref} does not offer")
    reason = tokenizer.not_byte_level()
    if reason:
        raise Infeasible(f"{asker} needs byte-level BPE (as of GPT-2, Llama 3 or Qwen); model {info.ref}: {reason}")
    if getattr(info, "test", None) is not None:
        raise Infeasible(
            f"{asker} scores held-out English, of which model {info.ref} has seen parts in training; allowed: tiny-lm/text "
            "and checkpoints"
        )
    return SegmentationsStage(tokenizer)
