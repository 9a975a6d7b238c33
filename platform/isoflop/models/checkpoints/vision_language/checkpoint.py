"""Checkpoints of vision-language models for the family ``hf``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.stage import StageContext
from isoflop.models.base import ModelInfo
from isoflop.models.checkpoints.decoder import decoder_geometry, without_weights
from isoflop.models.checkpoints.source import (
    FAMILY,
    Options,
    architecture_of,
    brief,
    locate,
    read_config,
    read_whole,
)
from isoflop.models.checkpoints.tokenizer import tokenizer_in
from isoflop.models.checkpoints.vision_language.kind import Seen, VisionLanguageKind
from isoflop.models.checkpoints.vision_language.kinds import KINDS, NOT_TAKEN, other_classes
from isoflop.models.decoder_model import layers_of
from isoflop.models.features import TowerSource, Vision, vision_of
from isoflop.models.hooks.feed_forward import FEED_FORWARD, has_mlps
from isoflop.models.lm import tokenizer_of
from isoflop.models.spread import devices_for, placed
from isoflop.models.visual_side import decoder_in
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmInfo


@dataclass(frozen=True)
class CheckpointTower(TowerSource):
    """The vision tower of a checkpoint; nothing is computed, the files are read where they lie.

    Args:
        ref: ``hf:…``.
        checkpoint: version of the checkpoint, so that features of other weights are other stages.
        options: as in ``VlmInfo``.
    """

    kind: ClassVar[str] = "hf-tower"

    ref: str
    checkpoint: str
    options: tuple[tuple[str, Any], ...]

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Write down which checkpoint it is."""
        (folder / "source.json").write_text(json.dumps({"ref": self.ref, "version": self.checkpoint}) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> Vision:
        """The tower, read from the checkpoint."""
        options = Options(**dict(self.options))
        source = locate(self.ref, options.revision, weights=True)
        module = _read(source, architecture_of(self.ref, source), options).model.vision_tower
        return vision_of(module.to(ctx.device).eval().requires_grad_(False), source)


def handles(architecture: str) -> bool:
    """Whether an architecture is a vision-language model, be it one that is refused."""
    return architecture in KINDS or architecture in other_classes()


def describe(ref: str, options: tuple[tuple[str, Any], ...], source: Path, version: str) -> VlmInfo:
    """What is known of a checkpoint from its config.

    Raises:
        Infeasible: a decoder whose attention cannot be replaced, or a visual side that cannot be followed.
    """
    chosen = Options(**dict(options))
    config = read_config(source, chosen)
    architecture = architecture_of(ref, source)
    if architecture not in KINDS:
        why = NOT_TAKEN.get(architecture, "nothing is known of how its pictures become tokens")
        raise Infeasible(
            f"model {ref}: {architecture} is a vision-language model, and {why}; allowed: {', '.join(KINDS)}"
        )
    kind = KINDS[architecture]
    seen = _seen(kind, ref, config, source)
    decoder = decoder_skeleton(config, ref)
    geometry = decoder_geometry(ref, decoder, type(decoder).__name__, windows=False)
    vocabulary = (getattr(config, "isoflop", None) or {}).get("vocabulary") if kind.lessons else None
    return VlmInfo(
        ref=ref,
        family=FAMILY,
        version=version,
        n_params=sum(p.numel() for p in layers_of(decoder).parameters()),
        hooks=kind.hooks if has_mlps(decoder) else kind.hooks - {FEED_FORWARD},
        lacks=(*kind.lacks.items(), (FEED_FORWARD.name, "not every layer of its decoder has one feed-forward block")),
        offers=frozenset({f"vocabulary:{vocabulary}" if vocabulary else "tokenizer"}),
        geometry={
            "grid": seen.grid,
            "visual_tokens": seen.grid**2,
            "vision_width": seen.width,
            "vision_layers": seen.layers,
            **geometry,
            "image_token": int(config.image_token_id),
        },
        dense_bits=chosen.bits,
        tower=CheckpointTower(ref, version, options),
        feature_layer=seen.feature_layer,
        vocabulary=vocabulary,
        options=options,
        tokenizer=tokenizer_in(ref, source, chosen),
        resizing=seen.resizing,
        views=seen.views,
        newlines=seen.newlines,
        image_tokens=seen.image_tokens,
        square=seen.square,
    )


def _seen(kind: VisionLanguageKind, ref: str, config: Any, source: Path) -> Seen:
    """What a class says of a config; transformers' processors look at their settings only when they compute with them."""
    try:
        return kind.seen(ref, config, source)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"model {ref}: {kind.architecture} cannot compute with its config.json and the settings of its image processor ({brief(error)})"
        ) from error


def load(info: ModelInfo, source: Path, options: Options, ctx: StageContext) -> VlmModel:
    """The checkpoint on the worker's device, or over its devices, in evaluation mode.

    Raises:
        NoRoom: there are several devices, and they have too little room.
    """
    import transformers

    if not isinstance(info, VlmInfo):
        raise TypeError(f"{info.ref} was not described as a vision-language model")
    architecture = architecture_of(info.ref, source)

    def skeleton() -> tuple[Any, Any]:
        config = read_config(source, options)
        module = without_weights(
            ref, config, "vision-language model", lambda: getattr(transformers, architecture)(config)
        )
        return module, decoder_in(module)

    ref = info.ref
    devices = devices_for(ref, ctx, skeleton, options.torch_dtype)
    module = _read(source, architecture, options)
    module = placed(module, decoder_in(module), ctx.device, devices)
    tokenizer = tokenizer_of(info, ctx)
    side = KINDS[architecture].side(module, info, source, tokenizer)
    return VlmModel(info, module, side.vision, tokenizer, side)


def decoder_skeleton(config: Any, ref: str) -> Any:
    """The decoder of a vision-language config without memory for its weights."""
    from transformers import AutoModel

    return without_weights(ref, config.text_config, "decoder", lambda: AutoModel.from_config(config.text_config))


def _read(source: Path, architecture: str, options: Options) -> Any:
    import transformers

    return read_whole(
        getattr(transformers, architecture), source, options.torch_dtype, trust_remote_code=options.trust_remote_code
    )
