"""Checkpoints of vision-language models of the LLaVA type for the family ``hf``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isoflop.core.errors import Infeasible
from isoflop.core.stage import StageContext
from isoflop.models.base import ModelInfo
from isoflop.models.checkpoints.decoder import decoder_geometry, without_weights
from isoflop.models.checkpoints.preprocessor import resizing_of
from isoflop.models.checkpoints.source import FAMILY, Options, locate, read_config, require_safetensors
from isoflop.models.checkpoints.tokenizer import tokenizer_in
from isoflop.models.decoder_model import layers_of
from isoflop.models.features import PREFIX_TOKENS, TowerSource, Vision, vision_of
from isoflop.models.lm import tokenizer_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.vlm import HOOKS, VlmInfo, VlmModel

ARCHITECTURES = ("LlavaForConditionalGeneration",)


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
        module = _read(source, options).model.vision_tower
        return vision_of(module.to(ctx.device).eval().requires_grad_(False), source)


def describe(ref: str, options: tuple[tuple[str, Any], ...], source: Path, version: str) -> VlmInfo:
    """What is known of a checkpoint from its config.

    Raises:
        Infeasible: a decoder whose attention cannot be replaced, a tower of another type, or a projector that reads several
            vision layers, or the CLS token.
    """
    chosen = Options(**dict(options))
    config = read_config(source, chosen)
    vision = config.vision_config
    layers = int(vision.num_hidden_layers)
    if not isinstance(config.vision_feature_layer, int):
        raise Infeasible(
            f"model {ref}: its projector reads several vision layers ({config.vision_feature_layer}); allowed: one layer"
        )
    if vision.model_type not in PREFIX_TOKENS:
        raise Infeasible(
            f"model {ref}: nothing is known of vision towers of the type {vision.model_type}; allowed: {', '.join(PREFIX_TOKENS)}"
        )
    # stock code cuts one token with 'default', whatever it is
    strategy = "default" if PREFIX_TOKENS[vision.model_type] else "full"
    if config.vision_feature_select_strategy != strategy:
        raise Infeasible(
            f"model {ref}: vision_feature_select_strategy = {config.vision_feature_select_strategy!r} does not give the patches of a "
            f"tower of the type {vision.model_type}; allowed: {strategy!r}"
        )
    decoder = decoder_skeleton(config, ref)
    geometry = decoder_geometry(ref, decoder, type(decoder).__name__, windows=False)
    grid = int(vision.image_size) // int(vision.patch_size)
    vocabulary = (getattr(config, "isoflop", None) or {}).get("vocabulary")
    return VlmInfo(
        ref=ref,
        family=FAMILY,
        version=version,
        n_params=sum(p.numel() for p in layers_of(decoder).parameters()),
        hooks=HOOKS,
        offers=frozenset({f"vocabulary:{vocabulary}" if vocabulary else "tokenizer"}),
        geometry={
            "grid": grid,
            "visual_tokens": grid * grid,
            "vision_width": int(vision.hidden_size),
            "vision_layers": layers,
            **geometry,
            "image_token": int(config.image_token_id),
        },
        dense_bits=chosen.bits,
        tower=CheckpointTower(ref, version, options),
        feature_layer=config.vision_feature_layer % (layers + 1),
        vocabulary=vocabulary,
        options=options,
        tokenizer=tokenizer_in(ref, source, chosen),
        resizing=resizing_of(source),
    )


def load(info: ModelInfo, source: Path, options: Options, ctx: StageContext) -> VlmModel:
    """The checkpoint on the worker's device in evaluation mode."""
    if not isinstance(info, VlmInfo):
        raise TypeError(f"{info.ref} was not described as a vision-language model")
    module = _read(source, options).to(ctx.device).eval().requires_grad_(False)
    return VlmModel(info, module, vision_of(module.model.vision_tower, source), tokenizer_of(info, ctx))


def decoder_skeleton(config: Any, ref: str) -> Any:
    """The decoder of a LLaVA config without memory for its weights."""
    from transformers import AutoModel

    return without_weights(ref, config.text_config, "decoder", lambda: AutoModel.from_config(config.text_config))


def _read(source: Path, options: Options) -> Any:
    from transformers import LlavaForConditionalGeneration

    require_safetensors(source)
    with no_progress_bars():
        return LlavaForConditionalGeneration.from_pretrained(
            source,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            dtype=options.torch_dtype,
        )
