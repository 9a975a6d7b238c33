"""Classifiers without a head: an image is compared with texts that name the classes (CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343).

What serves is the image's side, and one embedding for each class. The text encoder gives these once, at full precision, and is no
part of what methods compress or what bytes count.

Shape suffixes: B images, C channels, H height, W width, K classes, T tokens, d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.models.counting import flops_of
from isoflop.models.hooks.vision_pooling import NO_POOLING, Pooling
from isoflop.models.vit import VitInfo, VitModel

NAMES_AT_ONCE = 64
"""Texts of one pass of the text encoder."""


class DualEncoder(nn.Module):
    """The image's side of a Hugging Face ``CLIPModel``, ``MetaClip2Model`` or ``SiglipModel``, and what its classes are compared by.

    ``logits`` of its output are those of the classes, and the image's own embedding of length 1 where none are named.

    Attributes:
        stock: the whole model; no part of this module's parameters.
        classes_Kd: embeddings of the classes, of length 1, while they are named.
    """

    stock: Any

    def __init__(self, stock: Any) -> None:
        super().__init__()
        object.__setattr__(self, "stock", stock)
        self.vision_model = stock.vision_model
        self.visual_projection = getattr(stock, "visual_projection", None)
        self.logit_scale = stock.logit_scale
        self.logit_bias = getattr(stock, "logit_bias", None)
        self.classes_Kd: Tensor | None
        self.register_buffer("classes_Kd", None, persistent=False)

    def forward(self, pixel_values: Tensor) -> Any:
        """Images (B, C, H, W), normalised."""
        image_Bd = self.vision_model(pixel_values=pixel_values).pooler_output
        if self.visual_projection is not None:
            image_Bd = self.visual_projection(image_Bd)
        image_Bd = F.normalize(image_Bd, dim=-1)
        if self.classes_Kd is None:
            return SimpleNamespace(logits=image_Bd)
        logits_BK = image_Bd @ self.classes_Kd.T * self.logit_scale.exp()
        return SimpleNamespace(logits=logits_BK if self.logit_bias is None else logits_BK + self.logit_bias)

    def named(self, inputs: Any) -> Tensor:
        """Embeddings (K, d) of tokenised texts, of length 1."""
        return F.normalize(self.stock.get_text_features(**inputs).pooler_output, dim=-1)


class ZeroShotModel(VitModel):
    """A loaded model that compares images with texts.

    Args:
        module: its image's side.
        tokenizer: gives the tokenizer, which is read when classes are named.
    """

    def __init__(
        self, info: VitInfo, module: DualEncoder, tokenizer: Callable[[], Any], pooling: Pooling = NO_POOLING
    ) -> None:
        super().__init__(info, module, pooling)
        self._tokenizer = tokenizer
        self._embedded: dict[tuple[str, ...], tuple[Tensor, int]] = {}

    @contextmanager
    def naming(self, texts: Sequence[str]) -> Iterator[None]:
        """Within the ``with`` block the classes are what these texts say."""
        self.module.classes_Kd = self._classes(tuple(texts))[0]
        try:
            yield
        finally:
            self.module.classes_Kd = None

    def naming_flops(self, texts: Sequence[str]) -> int:
        """What embedding the texts has taken, once for all images."""
        return self._classes(tuple(texts))[1]

    def resident_bytes(self) -> int:
        """With the text encoder, which lies in memory too."""
        text = self.module.stock.text_model.parameters()
        return super().resident_bytes() + sum(t.numel() * t.element_size() for t in text)

    @torch.no_grad()
    def _classes(self, texts: tuple[str, ...]) -> tuple[Tensor, int]:
        if texts not in self._embedded:
            found = [flops_of(lambda part=part: self.module.named(self._tokens(part))) for part in _parts(texts)]  # type: ignore[misc]
            self._embedded[texts] = torch.cat([embedded for _, embedded in found]), sum(flops for flops, _ in found)
        return self._embedded[texts]

    def _tokens(self, texts: Sequence[str]) -> Any:
        """As transformers' own pipeline tokenises them: SigLIP was trained on texts padded to their full length."""
        config = self.module.stock.config
        padding = "max_length" if "siglip" in config.model_type else True
        length = int(config.text_config.max_position_embeddings)
        inputs = self._tokenizer()(
            list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        known = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        return {name: tensor.to(self.device) for name, tensor in known.items()}


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), NAMES_AT_ONCE):
        yield texts[start : start + NAMES_AT_ONCE]
