"""The built-in family ``tiny-vit``: image classifiers of 75 to 598 thousand parameters, trained on the spot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from isoflop.core.errors import unknown
from isoflop.core.hashing import content_hash
from isoflop.core.hook import Hook
from isoflop.core.knobs import check_knobs
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint, Model, ModelInfo
from isoflop.models.checkpoints import vit as vit_hf
from isoflop.models.family import FAMILIES, ModelFamily, without_defaults
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS
from isoflop.models.tiny.vit_config import SIZES, vit_config
from isoflop.models.tiny.vit_training import Recipe, VitStage, vit_course
from isoflop.models.training.taught import Taught
from isoflop.models.training.taught_stage import TaughtStage
from isoflop.models.training.teaching import Course
from isoflop.models.vit import VitInfo
from isoflop.models.worlds import sprite_world as world

FAMILY = "tiny-vit"
MEMBERS = {
    f"{size}{suffix}": (size, data) for data, suffix in zip(world.DATA, ("", "-sprites"), strict=True) for size in SIZES
}


def tiny_info(member: str, recipe: Recipe) -> VitInfo:
    """Describe a member under a recipe."""
    size, data = MEMBERS[member]
    fields = tuple(dataclasses.asdict(recipe).items())
    version = content_hash({"stage": VitStage.version, "images": world.VERSION, "recipe": dict(fields)}, 12)
    return vit_hf.describe(f"{FAMILY}/{member}", vit_config(SIZES[size], data), FAMILY, version, fields)


class TinyVit(ModelFamily):
    """``ViTForImageClassification`` in three sizes, trained by ``Recipe`` on real digits or on procedural sprites.

    N counts the transformer blocks; patch and position embeddings, the final norm and the classifier are left out.
    """

    name: ClassVar[str] = FAMILY
    trainable: ClassVar[frozenset[Hook[Any]]] = frozenset({VISION_BLOCKS})

    def members(self) -> list[str]:
        """``tiny-vit/c48``, ``c64`` and ``c96`` on digits, and the same on sprites (``…-sprites``)."""
        return [f"{FAMILY}/{member}" for member in MEMBERS]

    def info(self, ref: str, options: Mapping[str, Any]) -> VitInfo:
        """Describe a member; ``options`` are fields of ``Recipe``."""
        member = ref.partition("/")[2]
        if member not in MEMBERS:
            raise unknown("model", ref, self.members())
        return _info(member, tuple(sorted(check_knobs(Recipe, options, f"model {ref}").items())))

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ``Recipe`` that differ from its defaults."""
        return without_defaults(Recipe, options, f"model {ref}")

    def weights(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int) -> Stage:
        """The training stage: size, images, seed, and the methods that take part."""
        vit, taking = _own(info), self.trained_with(info, methods)
        if taking:
            return TaughtStage.of(vit, taking, seed)
        size, data = MEMBERS[vit.ref.partition("/")[2]]
        return VitStage(size, data, seed, vit.options, world.VERSION)

    def course(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int, ctx: StageContext) -> Course:
        """The training of a member."""
        vit = _own(info)
        return vit_course(vit, *MEMBERS[vit.ref.partition("/")[2]], seed)

    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> Model:
        """The trained model on the worker's device."""
        if weights is None:
            raise ValueError(f"model {info.ref} has no weights of its own: pass the stage that weights() gives")
        found = ctx.get(weights)
        folder: Path = found.folder if isinstance(found, Checkpoint) else found
        return vit_hf.load(_own(info), folder, ctx.device)


@lru_cache(maxsize=256)
def _info(member: str, options: tuple[tuple[str, Any], ...]) -> VitInfo:
    return tiny_info(member, dataclasses.replace(Recipe(), **dict(options)))


def _own(info: ModelInfo) -> VitInfo:
    if not isinstance(info, VitInfo):
        raise TypeError(f"{info.ref} was not described by this family")
    return info


FAMILIES.register(FAMILY)(TinyVit())
