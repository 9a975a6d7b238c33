"""The walk over image classifiers: each class small, beside transformers' own module.

Shape suffixes: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.checkpoints.source import DTYPES, brief
from isoflop.models.checkpoints.vision_towers import REFUSED, TOWERS
from isoflop.models.family import family_of
from isoflop.models.hooks.pixels import PIXELS, ImageCodecRun, to_bytes
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, BlockRun, TokenReduction
from isoflop.models.quiet import no_progress_bars
from isoflop.models.vit import VitModel
from isoflop.models.zero_shot import ZeroShotModel
from isoflop.testing.architectures.small import NotSmall
from isoflop.testing.architectures.walk import Check, Findings, Wrong, examined, redrawn, same
from isoflop.testing.neutral import RawImages

SIDE, PATCH = 16, 4
SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": SIDE,
    "patch_size": PATCH, "mlp_ratio": 2, "num_register_tokens": 3,
}  # fmt: skip
"""Of the vision encoders; each config takes what it knows."""
CLASSES = 5
NAMES = ["a photo of a cat", "a dog", "a photo of a ship"]
LONGEST = 9
"""Tokens of a text."""
_WORDS = ["[PAD]", "[UNK]", "of", "a", "photo", "cat", "dog", "ship", "[EOS]"]
TEXT: dict[str, Any] = {
    "vocab_size": len(_WORDS), "max_position_embeddings": LONGEST, "eos_token_id": 8, "bos_token_id": 1, "pad_token_id": 0,
    "projection_size": 24,
}  # fmt: skip
SAME_BUT_FOR_ROUNDING = {"bfloat16": 0.06, "float16": 0.01}
"""Largest difference from float32, relative to the largest logit."""


@dataclass(frozen=True, eq=False)
class VisionSubject:
    """A small classifier; see ``Subject``."""

    folder: Path
    stock: Any
    model: VitModel

    @cached_property
    def images_BCHW(self) -> Tensor:
        """Two images that 8 bits hold."""
        return to_bytes(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))).float() / 255

    def logits(self, model: VitModel | None = None, images_BCHW: Tensor | None = None) -> Tensor:
        """Ours; of a model without a head with classes that are named."""
        model = self.model if model is None else model
        with model.naming(NAMES) if isinstance(model, ZeroShotModel) else nullcontext():
            return model.logits(self.images_BCHW if images_BCHW is None else images_BCHW)

    @cached_property
    def expected_BK(self) -> Tensor:
        """The stock logits."""
        return stock_logits(self.stock, self.model, self.images_BCHW)

    def loaded(self, dtype: str) -> VitModel:
        """The same in another type."""
        return _loaded(f"hf:{self.folder}?dtype={dtype}", self.folder.parent / dtype)


def stock_logits(stock: Any, model: VitModel, images_BCHW: Tensor) -> Tensor:
    """Of transformers' own module, on pixels as the checkpoint's processor normalises them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.info.pixel_mean, model.info.pixel_std))
    given: dict[str, Any] = {"pixel_values": (images_BCHW - mean) / std}
    if not isinstance(model, ZeroShotModel):
        found: Tensor = stock(**given).logits
        return found
    siglip = "siglip" in stock.config.model_type
    words = small_tokenizer()(
        NAMES, padding="max_length" if siglip else True, truncation=True, max_length=LONGEST, return_tensors="pt"
    )
    given |= {"input_ids": words["input_ids"], **({} if siglip else {"attention_mask": words["attention_mask"]})}
    compared: Tensor = stock(**given).logits_per_image
    return compared


def one_pass(subject: VisionSubject) -> None:
    """Stock logits."""
    same("the model as it comes", subject.logits(), subject.expected_BK)


def blocks(subject: VisionSubject) -> None:
    """Stock logits through a reduction that removes nothing; and merging tokens that are equal changes nothing."""
    model = subject.model
    with model.occupy(VISION_BLOCKS, BlockRun(TokenReduction(), model.info.geometry["prefix"])):
        same("blocks with a reduction", subject.logits(), subject.expected_BK)
    with build("tome", {"macs": 1.0}).apply(model, None):
        same("tome with all multiply-adds", subject.logits(), subject.expected_BK)
    same("the model as it was", subject.logits(), subject.expected_BK)
    _equal_tokens(subject)


def _equal_tokens(subject: VisionSubject) -> None:
    """Two colours, one over three quarters of the patches, without positions: tokens of a colour are equal in every block."""
    model, image_1CHW = subject.model, torch.full((1, 3, SIDE, SIDE), 0.2)
    image_1CHW[:, :, : SIDE // 4] = 0.9
    places = [
        part for name, part in model.module.named_parameters() if "position_embedding" in name and "text" not in name
    ]
    kept = [place.data for place in places]
    try:
        for place in places:
            place.data = torch.zeros_like(place.data)
        whole_1K = subject.logits(images_BCHW=image_1CHW)
        with build("tome", {"r": 5}).apply(model, None):
            merged_1K = subject.logits(images_BCHW=image_1CHW)
            run = model.occupant(VISION_BLOCKS)
            assert run is not None
            assert run.state is not None
            if not run.state.patches < model.info.geometry["patches"] or run.state.size_BN1 is None:
                raise Wrong("tome with r = 5 merges nothing")
            if float(run.state.size_BN1[:, : run.state.prefix].sum()) != run.state.prefix:
                raise Wrong("tokens in front of the patches take part in a merge")
    finally:
        for place, values in zip(places, kept, strict=True):
            place.data = values
    same("merging equal tokens", merged_1K, whole_1K)


def pixels(subject: VisionSubject) -> None:
    """Stock logits behind a codec that loses nothing."""
    with subject.model.occupy(PIXELS, ImageCodecRun(RawImages())):
        same("images through a codec", subject.logits(), subject.expected_BK)


def matrices(subject: VisionSubject) -> None:
    """Stock logits at 16 bits; other ones at 3, which are the stock ones of a module with those weights."""
    model = subject.model
    with build("rtn", {"bits": 16}).apply(model, None):
        same("matrices at 16 bits", subject.logits(), subject.expected_BK)
    with build("rtn", {"bits": 3, "group": 8}).apply(model, None):
        found_BK = subject.logits()
        weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    if torch.equal(found_BK, subject.expected_BK):
        raise Wrong("matrices at 3 bits change nothing")
    kept = {name: value.clone() for name, value in subject.stock.state_dict().items()}
    try:
        subject.stock.load_state_dict(weights, strict=False)
        same("matrices at 3 bits", found_BK, stock_logits(subject.stock, model, subject.images_BCHW))
    finally:
        subject.stock.load_state_dict(kept)
    same("the model as it was", subject.logits(), subject.expected_BK)


def types(subject: VisionSubject) -> None:
    """In 16 bits on a CPU, whole and with merged tokens, as near as the type allows."""
    reduction = build("tome", {"macs": 0.7})
    with reduction.apply(subject.model, None):
        merged_BK = subject.logits()
    for dtype, allowed in SAME_BUT_FOR_ROUNDING.items():
        model = subject.loaded(dtype)
        if next(model.module.parameters()).dtype != DTYPES[dtype]:
            raise Wrong(f"{dtype} was asked for")
        found_BK = subject.logits(model)
        near(f"in {dtype}", found_BK.float(), subject.expected_BK, allowed)
        with reduction.apply(model, None):
            if not bool(subject.logits(model).isfinite().all()):
                raise Wrong(f"merged in {dtype} there are infinities")
    if not bool(merged_BK.isfinite().all()):
        raise Wrong("merged there are infinities")


def near(what: str, found: Tensor, expected: Tensor, allowed: float) -> None:
    """Raise Wrong unless two tensors agree within a share of the largest number."""
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= allowed:
        raise Wrong(f"{what} is off by {off:.2g} of the largest, more than {allowed}")


VISION_CHECKS: dict[str, Check] = {
    "one pass": one_pass, "vision_blocks": blocks, "pixels": pixels, "matrices": matrices, "16 bits": types,
}  # fmt: skip


def classes() -> list[str]:
    """Every class of image classifiers that transformers knows, and those that somebody may take for one."""
    from transformers.models.auto import modeling_auto as auto

    found: list[str] = [*TOWERS, *REFUSED]
    for names in (
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ):
        for name in names.values():
            found += [name] if isinstance(name, str) else list(name)
    return list(dict.fromkeys(found))


def examine_vision(architecture: str, folder: Path, checks: Mapping[str, Check] | None = None) -> Findings:
    """Build a class small in an empty folder, and try every check on it."""
    checks, source = VISION_CHECKS if checks is None else checks, folder / "model"
    ref = f"hf:{source}"

    def make() -> VisionSubject:
        if architecture not in TOWERS:  # by its name alone
            source.mkdir(parents=True)
            (source / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "vit"}))
            family_of(ref).info(ref, {})
            raise Wrong(f"{architecture} is described")
        stock = small_classifier(architecture)
        save_classifier(stock, source)
        return VisionSubject(source, stock, _loaded(ref, folder / "stages"))

    return examined(ref, checks, make)


def save_classifier(stock: Any, source: Path) -> None:
    """Write a module, and a tokenizer for one that reads texts."""
    with no_progress_bars():
        stock.save_pretrained(source)
    if hasattr(stock, "get_text_features"):
        small_tokenizer("siglip" in stock.config.model_type).save_pretrained(source)


def small_tokenizer(maskless: bool = False) -> Any:
    """A word is a token, and every text has an end.

    Args:
        maskless: gives no mask of padding, as SigLIP's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 8)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        model_input_names=["input_ids"] if maskless else ["input_ids", "attention_mask"],
    )  # fmt: skip


def small_classifier(architecture: str, **changes: Any) -> Any:
    """Transformers' module of a class with small numbers, weights that attend unevenly, and sdpa attention.

    Args:
        changes: of the vision encoder's config.
    """
    import transformers

    cls = getattr(transformers, architecture)
    try:
        kind = cls.config_class
        if "vision_config" in kind.sub_configs:
            inner = {name: _known(part, {**changes, **TEXT}) for name, part in kind.sub_configs.items()}
            config = kind(**inner, num_labels=CLASSES, projection_dim=12)
        else:
            config = kind(**_known(kind, changes), num_labels=CLASSES)
        config.architectures = [architecture]
        return redrawn(cls._from_config(config, attn_implementation="sdpa"))
    except Exception as error:
        raise NotSmall(f"transformers builds no small module of it ({brief(error)})") from error


def _known(kind: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    fields = set(kind().to_dict())
    return {name: value for name, value in {**SIZES, **changes}.items() if name in fields}


def _loaded(ref: str, folder: Path) -> VitModel:
    family = family_of(ref)
    model = family.load(family.info(ref, {}), None, FolderContext(folder))
    if not isinstance(model, VitModel):
        raise TypeError(f"{type(model).__name__} is no image classifier")
    return model
