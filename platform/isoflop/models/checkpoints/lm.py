"""Checkpoints of decoder-only language models for the family ``hf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.stage import StageContext
from isoflop.models.base import ModelInfo
from isoflop.models.checkpoints.decoder import decoder_geometry, ropes_of, without_weights
from isoflop.models.checkpoints.gguf import read_gguf
from isoflop.models.checkpoints.source import FAMILY, Options, read_config, read_whole
from isoflop.models.checkpoints.tokenizer import tokenizer_in
from isoflop.models.decoder_model import decoder_of, layers_of
from isoflop.models.hooks.adapters import ADAPTERS
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.byte_view import BYTE_VIEW
from isoflop.models.hooks.experts import EXPERTS, mixture_geometry, routers_of
from isoflop.models.hooks.feed_forward import FEED_FORWARD, has_mlps
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.prompt_text import PROMPT_TEXT
from isoflop.models.hooks.residual import RESIDUAL
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT
from isoflop.models.lm import LmInfo, LmModel, tokenizer_of
from isoflop.models.spread import devices_for, placed
from isoflop.models.worlds import recall_world
from isoflop.models.worlds.calibration import CalibrationText
from isoflop.models.worlds.english import EnglishStage
from isoflop.models.worlds.lm_text import EnglishText, TokenizerSource, TokensStage

CALIBRATION_LENGTH = 512
CALIBRATION_PAIRS = 16


def handles(architecture: str) -> bool:
    """Whether an architecture is a causal language model by its name."""
    return architecture.endswith(("ForCausalLM", "LMHeadModel"))


def describe(ref: str, options: tuple[tuple[str, Any], ...], source: Path, version: str) -> LmInfo:
    """What is known of a checkpoint from its config.

    Raises:
        Infeasible: another kind of config, or attention that methods on the cache could not take the place of.
    """
    chosen = Options(**dict(options))
    config = read_config(source, chosen)
    skeleton = _skeleton(ref, config, chosen)
    decoder = decoder_of(skeleton)
    geometry = decoder_geometry(ref, decoder, type(skeleton).__name__)
    vocabulary = (getattr(config, "isoflop", None) or {}).get("vocabulary")
    tokenizer = tokenizer_in(ref, source, chosen)
    positions = _positions(ref, config)
    named = {f"vocabulary:{vocabulary}"} if vocabulary else set()
    return LmInfo(
        ref=ref,
        family=FAMILY,
        version=version,
        n_params=sum(p.numel() for p in layers_of(decoder).parameters()),
        hooks=hooks_of(decoder, bool(tokenizer)),
        lacks=((SOFT_PROMPT.name, "its layers look token ids up in tables of their own"),)
        if _reads_ids(decoder)
        else (),
        offers=frozenset(named | ({"tokenizer"} if tokenizer else set())),
        geometry={**geometry, **mixture_geometry(decoder), "positions": positions},
        dense_bits=chosen.bits,
        options=options,
        text=_calibration_text(tokenizer, vocabulary, positions),
        vocabulary=vocabulary,
        tokenizer=tokenizer,
    )


def hooks_of(decoder: Any, reads_text: bool) -> frozenset[Hook[Any]]:
    """Places that a decoder offers to methods; ``decoder`` may be a skeleton on the device ``meta``."""
    found: set[Hook[Any]] = {ADAPTERS, ATTENTION, MATRICES, RESIDUAL}
    found |= set() if _reads_ids(decoder) else {SOFT_PROMPT}
    found |= {FEED_FORWARD} if has_mlps(decoder) else set()
    found |= {EXPERTS} if routers_of(decoder) else set()
    found |= {PROMPT_TEXT, BYTE_VIEW} if reads_text else set()
    return frozenset(found)


def _reads_ids(decoder: Any) -> bool:
    """Whether layers look token ids up in tables of their own, so that embeddings do not say all that stands in a column (Gemma 3n)."""
    return bool(getattr(decoder.config, "hidden_size_per_layer_input", None))


def load(info: ModelInfo, source: Path, options: Options, ctx: StageContext) -> LmModel:
    """The checkpoint on the worker's device, or over its devices, in evaluation mode.

    Raises:
        NoRoom: there are several devices, and they have too little room.
    """
    from transformers import AutoModelForCausalLM

    if not isinstance(info, LmInfo):
        raise TypeError(f"{info.ref} was not described as a language model")

    def skeleton() -> tuple[Any, Any]:
        module = _skeleton(info.ref, read_config(source, options), options)
        return module, decoder_of(module)

    devices = devices_for(info.ref, ctx, skeleton, options.torch_dtype)
    if options.gguf:
        module = read_gguf(source / options.gguf).to(options.torch_dtype)
    else:
        module = read_whole(
            AutoModelForCausalLM, source, options.torch_dtype, trust_remote_code=options.trust_remote_code
        )
    return LmModel(info, placed(module, decoder_of(module), ctx.device, devices), tokenizer_of(info, ctx))


def _positions(ref: str, config: Any) -> int:
    """Tokens that a text may have.

    Where longer texts are rotated in another way (LongRoPE), a step behind that length would not be what one pass gives.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    for rope in ropes_of(text):
        if rope.get("rope_type") == "longrope" and isinstance(positions, int):
            positions = min(positions, int(rope.get("original_max_position_embeddings", positions)))
    if not isinstance(positions, int):
        raise Infeasible(
            f"model {ref}: its config, of the type {config.model_type!r}, does not say how long a text may be; allowed: configs with "
            "max_position_embeddings"
        )
    return positions


def _skeleton(ref: str, config: Any, options: Options) -> Any:
    """The module without memory for its weights."""
    from transformers import AutoModelForCausalLM

    def make() -> Any:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)

    return without_weights(ref, config, "causal language model", make)


def _calibration_text(
    tokenizer: TokenizerSource | None, vocabulary: str | None, positions: int
) -> CalibrationText | None:
    if vocabulary == recall_world.VOCABULARY:
        return recall_world.RecallText(CALIBRATION_PAIRS)
    if tokenizer is None:
        return None
    return EnglishText(TokensStage(EnglishStage.here(), tokenizer, "train"), min(CALIBRATION_LENGTH, positions))
