"""Image classifiers of transformers: which have a plain sequence of tokens, what is in front of the patches, and what pools them.

An architecture that is not here, or stands in ``REFUSED``, is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from isoflop.core.errors import Infeasible
from isoflop.models.hooks.vision_pooling import Pooling
from isoflop.models.resizing import Resizing

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGER = 256 / 224
"""DINOv2's processor gives an image's shorter side this many times the side that it cuts out."""


@dataclass(frozen=True)
class Tower:
    """One architecture.

    Attributes:
        encoder: name of the vision encoder inside.
        prefix: tokens before the patches, without registers.
        heads_out: classifiers as wide as the encoder, by which its outputs are multiplied.
        averages: the head averages the patches.
        names: it has no head of its own, and compares images with texts.
        interpolates: positions are stretched to whatever size its processor cuts out.
        cut, larger: without a processor of its own, the shorter side becomes ``larger`` times the model's and the middle is cut out;
            else images are squeezed.
        mean, std: normalisation without a processor of its own; empty for a half each.
    """

    encoder: str
    prefix: int = 1
    heads_out: int = 1
    averages: bool = False
    names: bool = False
    interpolates: bool = False
    cut: bool = False
    larger: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def tokens_before(self, config: Any) -> int:
        """Class, distillation and register tokens."""
        return self.prefix + int(getattr(config, "num_register_tokens", 0))

    def resizing(self, side: int) -> Resizing:
        """Without a processor of the checkpoint's own."""
        return Resizing(round(side * self.larger), True) if self.cut else Resizing()

    def pooling(self, module: nn.Module) -> Pooling:
        """What of a loaded classifier pools tokens."""
        encoder = module.get_submodule(self.encoder)
        attended = [part for part in encoder.modules() if isinstance(part, nn.MultiheadAttention)]
        return Pooling(encoder if self.averages else None, attended[0] if attended else None)


_DINO: dict[str, Any] = {
    "heads_out": 2, "averages": True, "interpolates": True, "cut": True, "larger": LARGER, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
}  # fmt: skip
_CLIP: dict[str, Any] = {"encoder": "vision_model", "cut": True, "mean": CLIP_MEAN, "std": CLIP_STD}
TOWERS: dict[str, Tower] = {
    "ViTForImageClassification": Tower("vit"),
    "DeiTForImageClassification": Tower("deit", prefix=2),
    "DeiTForImageClassificationWithTeacher": Tower("deit", prefix=2, heads_out=2),
    "ViTMSNForImageClassification": Tower("vit"),
    "IJepaForImageClassification": Tower("ijepa", prefix=0, averages=True),
    "Dinov2ForImageClassification": Tower("dinov2", **_DINO),
    "Dinov2WithRegistersForImageClassification": Tower("dinov2_with_registers", **_DINO),
    "SiglipForImageClassification": Tower("vision_model", prefix=0, averages=True),
    "CLIPForImageClassification": Tower(averages=True, **_CLIP),
    "MetaClip2ForImageClassification": Tower(averages=True, **_CLIP),
    "CLIPModel": Tower(names=True, **_CLIP),
    "MetaClip2Model": Tower(names=True, **_CLIP),
    "SiglipModel": Tower("vision_model", prefix=0, names=True),
}
"""By architecture."""

_RELATIVE = "its attention adds biases for distances between patches, which tokens that merge no longer have"
_STAGES = "it works in stages of windows or of ever fewer places, and has no one sequence of tokens"
_CONVOLUTIONS = "it is a network of convolutions, without tokens"
_HEADLESS = "it has no classifier; name one of its architecture …ForImageClassification"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("BeitForImageClassification", "Data2VecVisionForImageClassification"), _RELATIVE),
    **dict.fromkeys(
        (
            "CvtForImageClassification", "DinatForImageClassification", "DonutSwinForImageClassification",
            "FocalNetForImageClassification", "HieraForImageClassification", "LevitForImageClassification",
            "LevitForImageClassificationWithTeacher", "MobileViTForImageClassification", "MobileViTV2ForImageClassification",
            "PoolFormerForImageClassification", "PvtForImageClassification", "PvtV2ForImageClassification",
            "SegformerForImageClassification", "SwiftFormerForImageClassification", "SwinForImageClassification",
            "Swinv2ForImageClassification",
        ),
        _STAGES,
    ),
    **dict.fromkeys(
        (
            "BitForImageClassification", "ConvNextForImageClassification", "ConvNextV2ForImageClassification",
            "EfficientNetForImageClassification", "HGNetV2ForImageClassification", "MobileNetV1ForImageClassification",
            "MobileNetV2ForImageClassification", "PPLCNetForImageClassification", "RegNetForImageClassification",
            "ResNetForImageClassification", "TextNetForImageClassification",
        ),
        _CONVOLUTIONS,
    ),
    **dict.fromkeys(
        (
            "PerceiverForImageClassificationLearned", "PerceiverForImageClassificationFourier",
            "PerceiverForImageClassificationConvProcessing",
        ),
        "its latents attend to pixels, and there are no patches",
    ),
    "ImageGPTForImageClassification": "it reads colours one after the other, as a language model does",
    "ShieldGemma2ForImageClassification": "it is a language model that answers yes or no",
    "TimmWrapperForImageClassification": "its network lies in another package (timm)",
    **dict.fromkeys(
        ("Siglip2ForImageClassification", "Siglip2Model"),
        "it takes patches of images of any shape (NaFlex); SigLIP 2 of a fixed size has the architecture SiglipModel",
    ),
    **dict.fromkeys(
        ("ViTModel", "DeiTModel", "ViTMSNModel", "IJepaModel", "Dinov2Model", "Dinov2WithRegistersModel"), _HEADLESS
    ),
    **dict.fromkeys(
        ("CLIPVisionModel", "CLIPVisionModelWithProjection", "MetaClip2VisionModel", "SiglipVisionModel"),
        "it has neither a classifier nor a text encoder that could name classes; name the whole of it (CLIPModel, SiglipModel)",
    ),
    **dict.fromkeys(
        ("DINOv3ViTModel", "DINOv3ConvNextModel"),
        "transformers has no classifier of DINOv3, and its rotary positions do not follow tokens that merge",
    ),
    **dict.fromkeys(
        (
            "AlignModel", "AltCLIPModel", "BlipModel", "Blip2ForImageTextRetrieval", "ChineseCLIPModel", "CLIPSegModel",
            "Tipsv2Model", "VideoPrismClipModel",
        ),
        "of models that compare images with texts, CLIP, MetaCLIP 2 and SigLIP are taken",
    ),
}  # fmt: skip
"""Why an architecture is not taken."""


def handles(architecture: str) -> bool:
    """Whether an architecture is an image classifier, or could be asked to be one."""
    return architecture in TOWERS or architecture in REFUSED or "ForImageClassification" in architecture


def tower_of(ref: str, architecture: str) -> Tower:
    """What is known of an architecture.

    Raises:
        Infeasible: it is not taken; the message says why.
    """
    if architecture not in TOWERS:
        why = REFUSED.get(architecture, "it is none that is known to have a plain sequence of tokens")
        raise Infeasible(f"model {ref}: {architecture} is not taken: {why}; allowed: {', '.join(TOWERS)}")
    return TOWERS[architecture]
