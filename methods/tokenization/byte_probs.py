"""Exact probabilities of bytes (arXiv 2410.09303).

Shape suffixes: P positions, S symbols: 256 bytes and "no byte follows".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage
from isoflop.methods.base import METHODS, Method
from isoflop.methods.tokenization.base import TokenizationMethod
from isoflop.methods.tokenization.members import Member, MembersStage, parse_members
from isoflop.models.base import ModelInfo
from isoflop.models.byte_trees.segmentations import Segmentations
from isoflop.models.byte_trees.starts import boundary_start
from isoflop.models.byte_trees.tree import MASSES, RENORMALISED, Start
from isoflop.models.hooks.byte_view import ByteText, ByteView, TreeView, segmentations_of
from isoflop.models.lm import LmModel


class ExactView(TreeView):
    """Sums over every way to cut the bytes into tokens, from the last cut of the prompt that cannot move."""

    def start(self, segmentations: Segmentations, text: ByteText) -> Start:
        """At that cut."""
        return boundary_start(segmentations, text.data, text.first)


class EnsembleView(ByteView):
    """The mean of several models' byte probabilities, each under its own tokenizer; then a temperature.

    Args:
        exact: one view per model, that of the model whose hook it is in first.
        others: the other models.
        temperature: of the mean.
    """

    def __init__(self, exact: Sequence[ExactView], others: Sequence[Member], temperature: float) -> None:
        self.members = tuple(member.model for member in others)
        self._exact, self._others, self._temperature = list(exact), list(others), temperature
        self.counts = exact[0].counts

    def next_bytes(self, model: LmModel, segmentations: Segmentations, texts: Sequence[ByteText]) -> list[np.ndarray]:
        """The uniform mean of the members' probabilities, position by position."""
        asked = [(model, segmentations), *((member.model, member.segmentations) for member in self._others)]
        found = [view.next_bytes(*pair, texts) for view, pair in zip(self._exact, asked, strict=True)]
        self.counts = self._exact[0].counts
        for view in self._exact[1:]:
            self.counts.add(view.counts)
        return [self._tempered(_log_mean(columns)) for columns in zip(*found, strict=True)]

    def _tempered(self, logs_PS: np.ndarray) -> np.ndarray:
        if self._temperature == 1.0:
            return logs_PS
        scaled_PS = logs_PS / self._temperature
        total_P1: np.ndarray = np.logaddexp.reduce(scaled_PS, axis=1, keepdims=True)
        return scaled_PS - total_P1


@METHODS.register("byte-probs")
@dataclass(frozen=True)
class ByteProbs(TokenizationMethod):
    """The byte-level model that a token-level model is: the same distribution over texts, without training.

    A byte's probability is the sum over all token sequences that cover the text up to it (the byte-token representation
    lemma, arXiv 2410.09303), so that a prompt may end anywhere, and models with different vocabularies can be averaged.
    ``mass`` says what becomes of sequences that the tokenizer never makes: the released code drops them token by token
    and normalises at each byte (``canonical-masked``), which is the distribution of no text model; renormalising at each
    token (the default) is one, as is counting every segmentation; their number grows exponentially with the bytes behind
    the prompt's last cut, so that only the heaviest are followed there.
    """

    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2410.09303"
    exact_at_cuts: ClassVar[bool] = True

    mass: Annotated[
        str, Knob(choices=MASSES, doc="what becomes of the probability of token sequences that no text is tokenised to")
    ] = RENORMALISED
    beam: Annotated[
        int, Knob(low=1, high=4096, doc="with all-segmentations: heaviest token sequences followed at each byte")
    ] = 64
    temperature: Annotated[float, Knob(low=0.05, high=20.0, log=True, doc="of the byte probabilities")] = 1.0
    members: Annotated[
        str, Knob(doc="more models for the mean: references with options, as in 'tiny-lm/text-d64 vocabulary=512; …'")
    ] = ""

    def check(self, info: ModelInfo) -> None:
        """Refuse members that cannot be asked."""
        super().check(info)
        for other in self._infos():
            if (other.ref, other.options) == (info.ref, info.options):
                raise Infeasible(f"method {self.name}: members = {self.members!r} names the model {info.ref} itself")
            segmentations_of(other, f"method {self.name}: members")

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The members' weights and tokenizers."""
        others = self._infos()
        return MembersStage.of(others, seed, f"method {self.name}") if others else None

    def view(self, prepared: Any) -> ByteView:
        """One tree per model; ``prepared`` are the loaded members, or None."""
        members: Sequence[Member] = prepared or ()
        views = [ExactView(self.mass, self.beam) for _ in range(1 + len(members))]
        return EnsembleView(views, members, self.temperature)

    def _infos(self) -> list[ModelInfo]:
        return parse_members(self.members, f"method {self.name}")


def _log_mean(columns: Sequence[np.ndarray]) -> np.ndarray:
    if len(columns) == 1:
        return columns[0]
    mean_PS: np.ndarray = np.logaddexp.reduce(np.stack(columns), axis=0) - np.log(len(columns))
    return mean_PS
