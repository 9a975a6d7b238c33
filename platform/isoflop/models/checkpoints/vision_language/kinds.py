"""Every class of vision-language models that the family ``hf`` loads, by its architecture."""

from __future__ import annotations

from isoflop.models.checkpoints.vision_language.anyres import LlavaNext, LlavaOneVision
from isoflop.models.checkpoints.vision_language.kind import Llava, VisionLanguageKind

KINDS: dict[str, VisionLanguageKind] = {kind.architecture: kind for kind in (Llava(), LlavaNext(), LlavaOneVision())}
