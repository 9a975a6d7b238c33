"""Vision transformers for classification in ``save_pretrained`` form: description from the config, and loading.

The family ``hf`` dispatches here by the architecture that a checkpoint's config names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hook import Hook
from isoflop.models.checkpoints.preprocessor import read_preprocessor, resizing_of
from isoflop.models.hooks.matrices import MATRICES, matrix_shapes
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, blocks_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.vit import LABELLED_IMAGES, VitInfo, VitModel
from isoflop.models.worlds.sprite_world import DATA

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX = {
    "ViTForImageClassification": 1,
    "DeiTForImageClassification": 2,
    "DeiTForImageClassificationWithTeacher": 2,
}
"""Tokens before the patches, for every architecture that can be loaded."""
ARCHITECTURES = tuple(PREFIX)
HOOKS: frozenset[Hook[Any]] = frozenset({PIXELS, VISION_BLOCKS, MATRICES})


def describe(
    ref: str,
    config: PretrainedConfig,
    family: str,
    version: str,
    options: tuple[tuple[str, Any], ...] = (),
    source: Path | None = None,
    dense_bits: int = 16,
) -> VitInfo:
    """What is known of a checkpoint without loading weights.

    Args:
        config: of the checkpoint; a key ``isoflop: {images: digits}`` names the built-in images that it classifies.
        family, version, options: as in ``VitInfo``.
        source: the checkpoint's folder; ``preprocessor_config.json`` in it gives the normalisation of pixels.
        dense_bits: see ``ModelInfo``.

    Raises:
        Infeasible: an architecture other than ``ARCHITECTURES``, or images that are not square.
    """
    settings: Any = config
    architecture = (settings.architectures or ["unknown"])[0]
    if architecture not in PREFIX:
        raise Infeasible(
            f"model {ref}: architecture {architecture} is no vision transformer for classification; allowed: {', '.join(ARCHITECTURES)}"
        )
    side, patch = settings.image_size, settings.patch_size
    if not isinstance(side, int) or not isinstance(patch, int):
        raise Infeasible(
            f"model {ref}: image_size = {side} with patch_size = {patch}; allowed: square images and patches"
        )
    data = (getattr(settings, "isoflop", None) or {}).get("images")
    module = skeleton(architecture, config)
    mean, std = _normalisation(source, int(settings.num_channels))
    return VitInfo(
        ref=ref,
        family=family,
        version=version,
        n_params=count_blocks(module),
        hooks=HOOKS,
        offers=frozenset({LABELLED_IMAGES} if data in DATA else ()),
        geometry={
            "layers": int(settings.num_hidden_layers),
            "width": int(settings.hidden_size),
            "heads": int(settings.num_attention_heads),
            "mlp": int(settings.intermediate_size),
            "patches": (side // patch) ** 2,
            "prefix": PREFIX[architecture],
            "patch_inputs": int(settings.num_channels) * patch**2,
            "image_side": side,
            "channels": int(settings.num_channels),
            "classes": int(settings.num_labels),
            "matrices": matrix_shapes(module),
            "heads_out": 2 if architecture.endswith("WithTeacher") else 1,
        },
        dense_bits=dense_bits,
        data=data if data in DATA else None,
        pixel_mean=mean,
        pixel_std=std,
        options=options,
        labels=_labels(settings),
        resizing=resizing_of(source),
    )


def read(source: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face module of a checkpoint folder, in evaluation mode without gradients; safetensors only.

    Raises:
        UserError: the folder holds no safetensors.
    """
    import transformers

    if not any(source.glob("*.safetensors")):
        raise UserError(f"model folder {source}: no *.safetensors file; pickled weights are not loaded")
    with no_progress_bars():
        # Sizes enter the attention as an additive mask, which flash attention would not take.
        module = getattr(transformers, architecture).from_pretrained(
            source, local_files_only=True, use_safetensors=True, dtype=dtype, attn_implementation="sdpa"
        )
    return module.eval().requires_grad_(False)


def load(info: VitInfo, source: Path, device: str, dtype: torch.dtype = torch.float32) -> VitModel:
    """The checkpoint in ``source`` as a model on ``device``."""
    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    return VitModel(info, read(source, architecture, dtype).to(device))


def count_encoder(architecture: str, config: PretrainedConfig) -> int:
    """N: parameters of the transformer blocks, without memory for them."""
    return count_blocks(skeleton(architecture, config))


def count_blocks(module: Any) -> int:
    """N of a classifier: parameters of its blocks."""
    return sum(p.numel() for block in blocks_of(module) for p in block.module.parameters())


def skeleton(architecture: str, config: PretrainedConfig) -> Any:
    """The classifier without memory for its weights."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, architecture)(config)


def _labels(config: Any) -> tuple[str, ...]:
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    listed = tuple(names.get(number, "") for number in range(int(config.num_labels)))
    return () if all(name == f"LABEL_{number}" for number, name in enumerate(listed)) else listed


def _normalisation(source: Path | None, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    stored = read_preprocessor(source)
    half = (0.5,) * channels
    return tuple(stored.get("image_mean", half)), tuple(stored.get("image_std", half))
