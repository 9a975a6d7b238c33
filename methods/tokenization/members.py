"""Models that are asked besides the one of a job: named by a knob, loaded as a stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import ModelInfo
from isoflop.models.byte_trees.segmentations import Segmentations
from isoflop.models.family import family_of
from isoflop.models.hooks.byte_view import SegmentationsStage, segmentations_of
from isoflop.models.lm import LmModel

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Member:
    """A loaded model with its tokenizer's segmentations."""

    model: LmModel
    segmentations: Segmentations


@dataclass(frozen=True)
class MembersStage(Stage):
    """Loaded models; nothing is stored but their names.

    Attributes:
        names: reference, options and version of each.
        weights: the stages that train them, None for checkpoints.
        tokenizers: their segmentations.
    """

    kind: ClassVar[str] = "members"

    names: tuple[tuple[str, Options, str], ...]
    weights: tuple[Stage | None, ...]
    tokenizers: tuple[SegmentationsStage, ...]

    @classmethod
    def of(cls, infos: Sequence[ModelInfo], seed: int, asker: str) -> MembersStage:
        """The stage for some models, trained with the job's seed."""
        return cls(
            tuple((info.ref, info.options, info.version) for info in infos),
            tuple(family_of(info.ref).weights(info, (), seed) for info in infos),
            tuple(segmentations_of(info, asker) for info in infos),
        )

    def deps(self) -> tuple[Stage, ...]:
        """Weights and segmentations."""
        return (*(stage for stage in self.weights if stage is not None), *self.tokenizers)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Write the names down."""
        (folder / "members.json").write_text(json.dumps([ref for ref, _, _ in self.names]) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> tuple[Member, ...]:
        """The models on the worker's device."""
        loaded = []
        for (ref, options, _), weights, tokenizer in zip(self.names, self.weights, self.tokenizers, strict=True):
            family = family_of(ref)
            model = family.load(family.info(ref, dict(options)), weights, ctx)
            if not isinstance(model, LmModel):
                raise Infeasible(f"members: {ref} is no language model")
            loaded.append(Member(model, ctx.get(tokenizer)))
        return tuple(loaded)


def parse_members(text: str, where: str) -> list[ModelInfo]:
    """What ``ref key=value key=value; ref …`` describes.

    Raises:
        Infeasible: a reference or an option that does not exist, in one line that names the knob ``members``.
    """
    found = []
    for part in filter(None, map(str.strip, text.split(";"))):
        ref, *settings = part.split()
        try:
            options = dict(_setting(word) for word in settings)
            found.append(family_of(ref).info(ref, options))
        except UserError as error:
            raise Infeasible(f"{where}: members = {text!r}: {error}") from None
    return found


def _setting(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"{word!r} is no option; write name=value")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
