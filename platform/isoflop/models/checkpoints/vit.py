"""Image classifiers on vision transformers in ``save_pretrained`` form: description from the config, and loading.

The family ``hf`` dispatches here by the architecture that a checkpoint's config names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.models.checkpoints.preprocessor import (
    check_preprocessor,
    normalisation_of,
    read_preprocessor,
    resizing_of,
    side_of,
)
from isoflop.models.checkpoints.source import architecture_of, read_whole
from isoflop.models.checkpoints.vision_towers import TOWERS, tower_of
from isoflop.models.hooks.matrices import MATRICES, matrix_shapes
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, blocks_of
from isoflop.models.quiet import no_advice
from isoflop.models.vit import LABELLED_IMAGES, VitInfo, VitModel
from isoflop.models.worlds.lm_text import TokenizerSource
from isoflop.models.worlds.sprite_world import DATA
from isoflop.models.zero_shot import DualEncoder, ZeroShotModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HOOKS: frozenset[Hook[Any]] = frozenset({PIXELS, VISION_BLOCKS, MATRICES})


def describe(
    ref: str,
    config: PretrainedConfig,
    family: str,
    version: str,
    options: tuple[tuple[str, Any], ...] = (),
    source: Path | None = None,
    dense_bits: int = 16,
    tokenizer: TokenizerSource | None = None,
) -> VitInfo:
    """What is known of a checkpoint without loading weights.

    Args:
        config: of the checkpoint; a key ``isoflop: {images: digits}`` names the built-in images that it classifies.
        family, version, options: as in ``VitInfo``.
        source: the checkpoint's folder; its processor says how images become the model's.
        dense_bits: see ``ModelInfo``.
        tokenizer: of the checkpoint, where it has one.

    Raises:
        Infeasible: an architecture that is not taken (see ``vision_towers``), images or patches that are not square, a processor
            that does something else with images, a text encoder without a tokenizer.
    """
    settings: Any = config
    architecture = (settings.architectures or ["unknown"])[0]
    tower = tower_of(ref, architecture)
    vision: Any = getattr(settings, "vision_config", settings)
    stored = read_preprocessor(source)
    check_preprocessor(ref, stored)
    side, patch = vision.image_size, vision.patch_size
    side = (side_of(stored) or side) if tower.interpolates else side
    if isinstance(side, int) and (given := side_of(stored) or side) != side:
        raise Infeasible(
            f"model {ref}: its image processor gives images of {given} pixels a side, and {architecture} takes {side}"
        )
    if not isinstance(side, int) or not isinstance(patch, int) or min(side, patch) < 1:
        raise Infeasible(
            f"model {ref}: image_size = {side} with patch_size = {patch}; allowed: square images and patches"
        )
    if tower.names and tokenizer is None:
        raise Infeasible(
            f"model {ref}: {architecture} reads names of classes, and the checkpoint has no fast tokenizer (tokenizer.json)"
        )
    data = None if tower.names else (getattr(settings, "isoflop", None) or {}).get("images")
    module = skeleton(architecture, config)
    half = (0.5,) * int(vision.num_channels)
    mean, std = normalisation_of(stored, tower.mean or half, tower.std or half)
    return VitInfo(
        ref=ref,
        family=family,
        version=version,
        n_params=count_blocks(module),
        hooks=HOOKS,
        offers=frozenset({LABELLED_IMAGES} if data in DATA else ()),
        geometry={
            **_blocks_geometry(ref, module, vision),
            "patches": (side // patch) ** 2,
            "prefix": tower.tokens_before(vision),
            "patch_inputs": int(vision.num_channels) * patch**2,
            "image_side": side,
            "channels": int(vision.num_channels),
            "classes": _outputs(module, settings),
            "matrices": matrix_shapes(module),
            "heads_out": tower.heads_out if _outputs(module, settings) else 0,
        },
        dense_bits=dense_bits,
        data=data if data in DATA else None,
        pixel_mean=mean,
        pixel_std=std,
        options=options,
        labels=() if tower.names else _labels(settings),
        tokenizer=tokenizer if tower.names else None,
        resizing=resizing_of(source) if stored.get("size") is not None else tower.resizing(side),
    )


def _outputs(module: Any, settings: Any) -> int:
    """Classes; the width of the projection where a model compares images with texts, 0 where there is none."""
    if not isinstance(module, DualEncoder):
        return int(settings.num_labels)
    return 0 if module.visual_projection is None else int(module.visual_projection.out_features)


def _blocks_geometry(ref: str, module: Any, vision: Any) -> dict[str, Any]:
    """Sizes of the blocks, read off the modules, and what attention that pools behind them costs."""
    blocks = blocks_of(module)
    if len(blocks) != vision.num_hidden_layers:
        raise Infeasible(
            f"model {ref}: {type(module).__name__} has {len(blocks)} blocks of a known layout, and {vision.num_hidden_layers} layers"
        )
    width, mlp = int(vision.hidden_size), [part for part in blocks[0].mlp.modules() if isinstance(part, nn.Linear)]
    found: dict[str, Any] = {
        "layers": len(blocks),
        "width": width,
        "heads": int(vision.num_attention_heads),
        "mlp": mlp[0].out_features,
    }
    if len(mlp) != 2:
        found["mlp_matrices"] = len(mlp)
    if any(isinstance(part, nn.MultiheadAttention) for part in module.modules()):
        # the query and the output once, keys and values of every token, two products with them, and the MLP of one token
        found["pool_macs"] = (2 * width**2 + len(mlp) * width * mlp[0].out_features, 2 * width**2 + 2 * width)
    return found


def read(source: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face module of a checkpoint folder, in evaluation mode without gradients; safetensors only.

    Raises:
        UserError: the folder holds no safetensors, or not all weights.
    """
    import transformers

    # Sizes enter the attention as an additive mask, which flash attention would not take.
    module = read_whole(getattr(transformers, architecture), source, dtype, attn_implementation="sdpa")
    return module.eval().requires_grad_(False)


def load(
    info: VitInfo,
    source: Path,
    device: str,
    dtype: torch.dtype = torch.float32,
    tokenizer: Callable[[], Any] | None = None,
) -> VitModel:
    """The checkpoint in ``source`` as a model on ``device``.

    Args:
        tokenizer: gives it, for a model that compares images with texts.
    """
    architecture = architecture_of(info.ref, source)
    module = read(source, architecture, dtype).to(device)
    tower = TOWERS[architecture]
    if tower.names and tokenizer is not None:
        dual = DualEncoder(module).eval()
        return ZeroShotModel(info, dual, tokenizer, tower.pooling(dual))
    return VitModel(info, module, tower.pooling(module))


def count_encoder(architecture: str, config: PretrainedConfig) -> int:
    """N: parameters of the transformer blocks, without memory for them."""
    return count_blocks(skeleton(architecture, config))


def count_blocks(module: Any) -> int:
    """N of a classifier: parameters of its blocks."""
    return sum(p.numel() for block in blocks_of(module) for p in block.module.parameters())


def skeleton(architecture: str, config: PretrainedConfig) -> Any:
    """The classifier without memory for its weights; of a model that compares images with texts its image's side."""
    import transformers

    with torch.device("meta"), no_advice():
        module = getattr(transformers, architecture)(config)
    return DualEncoder(module) if TOWERS[architecture].names else module


def _labels(config: Any) -> tuple[str, ...]:
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    listed = tuple(names.get(number, "") for number in range(int(config.num_labels)))
    return () if all(name == f"LABEL_{number}" for number, name in enumerate(listed)) else listed
