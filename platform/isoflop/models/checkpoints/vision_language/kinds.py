"""Every class of vision-language models that the family ``hf`` loads, by its architecture."""

from __future__ import annotations

from isoflop.models.checkpoints.vision_language.anyres import LlavaNext, LlavaOneVision
from isoflop.models.checkpoints.vision_language.kind import Llava, VisionLanguageKind
from isoflop.models.checkpoints.vision_language.merged import Idefics3, InternVl, SmolVlm
from isoflop.models.checkpoints.vision_language.paligemma import PaliGemma
from isoflop.models.checkpoints.vision_language.qwen import Qwen2Vl, Qwen3Vl, Qwen3VlMoe, Qwen25Vl

_ALL = (
    Llava(),
    LlavaNext(),
    LlavaOneVision(),
    InternVl(),
    Idefics3(),
    SmolVlm(),
    Qwen2Vl(),
    Qwen25Vl(),
    Qwen3Vl(),
    Qwen3VlMoe(),
    PaliGemma(),
)
KINDS: dict[str, VisionLanguageKind] = {kind.architecture: kind for kind in _ALL}
_QFORMER = "a query transformer mixes the patches of an image before they become tokens"
_BOTH_WAYS = (
    "images read themselves in both directions inside its prompts, and most of its layers attend within windows"
)
NOT_TAKEN = {
    "MllamaForConditionalGeneration": "its language model reads images by cross-attention, so that no visual tokens enter it",
    "Blip2ForConditionalGeneration": _QFORMER,
    "InstructBlipForConditionalGeneration": _QFORMER,
    "Idefics2ForConditionalGeneration": "a resampler mixes the patches of an image before they become tokens",
    "Gemma3ForConditionalGeneration": _BOTH_WAYS,
    "Gemma3nForConditionalGeneration": _BOTH_WAYS,
    "LlavaNextVideoForConditionalGeneration": "it is made for films; LlavaNextForConditionalGeneration takes pictures",
}
"""Why other classes that people ask for are refused."""


def other_classes() -> set[str]:
    """Vision-language models that the installed transformers knows and the family ``hf`` does not take."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    known = {name for given in NAMES.values() for name in ([given] if isinstance(given, str) else given)}
    return {name for name in known - set(KINDS) if not name.endswith("ForCausalLM")}
