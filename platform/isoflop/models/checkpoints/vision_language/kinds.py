"""Every class of vision-language models that the family ``hf`` loads, by its architecture."""

from __future__ import annotations

from isoflop.models.checkpoints.vision_language.anyres import LlavaNext, LlavaOneVision
from isoflop.models.checkpoints.vision_language.kind import Llava, VisionLanguageKind
from isoflop.models.checkpoints.vision_language.merged import Idefics3, InternVl, SmolVlm
from isoflop.models.checkpoints.vision_language.paligemma import PaliGemma
from isoflop.models.checkpoints.vision_language.qwen import Qwen2Vl, Qwen3Vl, Qwen25Vl

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
    PaliGemma(),
)
KINDS: dict[str, VisionLanguageKind] = {kind.architecture: kind for kind in _ALL}
