"""The same walk with an architecture inside a vision-language model of the LLaVA type.

Shape suffixes: B rows, T tokens of a prompt with one placeholder, P patches, S tokens of an answer, H query heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.methods.decoder_tokens.base import Candidates
from isoflop.methods.decoder_tokens.fastv import FastV
from isoflop.models.checkpoints.source import brief
from isoflop.models.family import family_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.tiny.vision import save_preprocessing
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch
from isoflop.testing.architectures.small import RESERVED, WORDS, Architecture, NotSmall, small_config
from isoflop.testing.architectures.walk import (
    Check,
    Findings,
    eager_rows,
    examined,
    redrawn,
    same,
)

IMAGE, PATCHES, QUESTION, PADS, ANSWER = RESERVED, 9, 5, 2, 3
VISION: dict[str, int] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class LlavaSubject:
    """A small LLaVA-type checkpoint; see ``Subject``."""

    folder: Path
    stock: Any
    model: VlmModel

    @cached_property
    def images_BCHW(self) -> Tensor:
        """Two images."""
        return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))

    @cached_property
    def words(self) -> list[Tensor]:
        """A question for each, the second shorter."""
        rng = torch.Generator().manual_seed(2)
        return [torch.randint(IMAGE + 1, WORDS, (length,), generator=rng) for length in (QUESTION, QUESTION - PADS)]

    @cached_property
    def answer_BS(self) -> Tensor:
        """Tokens behind the questions."""
        return torch.randint(IMAGE + 1, WORDS, (2, ANSWER), generator=torch.Generator().manual_seed(3))

    def batch(self, row: int | None = None) -> VlmBatch:
        """Both prompts, the second padded on the left; or one of them, without padding."""
        rows = [torch.cat((torch.tensor([IMAGE]), words)) for words in self.words]
        if row is not None:
            prompt_1T = rows[row][None]
            hidden = self.model.look(self.images_BCHW[row : row + 1])
            return VlmBatch(hidden, prompt_1T, prompt_1T[:, 1:], torch.tensor([row]))
        prompt_BT = torch.stack([torch.nn.functional.pad(r, (QUESTION + 1 - len(r), 0)) for r in rows])
        mask_BT = torch.stack([torch.arange(QUESTION + 1) >= QUESTION + 1 - len(r) for r in rows]).long()
        hidden = self.model.look(self.images_BCHW)
        return VlmBatch(hidden, prompt_BT, prompt_BT[:, 1:], torch.arange(2), mask_BT, mask_BT[:, 1:])

    def whole(self, row: int, answer: int = 0) -> Tensor:
        """A prompt with every placeholder, and the beginning of its answer, as transformers takes it, (1, T)."""
        return torch.cat((torch.full((PATCHES,), IMAGE), self.words[row], self.answer_BS[row, :answer]))[None]

    def alone(self, row: int, answer: int = 0) -> Tensor:
        """Stock logits (1 + answer, W) behind a prompt by itself and behind each token of its answer."""
        pixels = self.model.vision.preprocess(self.images_BCHW[row : row + 1])
        logits_1TW = self.stock(input_ids=self.whole(row, answer), pixel_values=pixels, use_cache=False).logits
        found: Tensor = logits_1TW[0, -1 - answer :]
        return found


def one_pass(subject: LlavaSubject) -> None:
    """Stock logits from pixels: as it comes, padded, and with a cache that compresses nothing."""
    model = subject.model
    found_BW = model.answer_logits(subject.batch())
    for row in range(2):
        same("the model as it comes", found_BW[row : row + 1], subject.alone(row))
        with build("full-cache", {}).apply(model, None):
            same("one pass", model.answer_logits(subject.batch(row)), subject.alone(row))


def step_by_step(subject: LlavaSubject) -> None:
    """The answer a token at a time, padded without a method, and with a cache that compresses nothing."""
    model, batch = subject.model, subject.batch()
    found_BSW = model.stepwise(model.prompt_of(batch), subject.answer_BS)
    for row in range(2):
        same("step by step", found_BSW[row], subject.alone(row, ANSWER))
        with build("full-cache", {}).apply(model, None):
            prompt = model.prompt_of(subject.batch(row))
            found_1SW = model.stepwise(prompt, subject.answer_BS[row : row + 1])
        same("step by step with a method", found_1SW[0], subject.alone(row, ANSWER))


@dataclass(frozen=True)
class _Asking(FastV):
    """FastV that tells what it saw."""

    def kept(self, candidates: Candidates, count: int) -> Tensor:
        _SEEN.append(candidates.attention())
        return super().kept(candidates, count)


_SEEN: list[Tensor] = []


def tap(subject: LlavaSubject) -> None:
    """The attention that FastV goes by is what eager attention gives."""
    model, batch = subject.model, subject.batch()
    _SEEN.clear()
    with _Asking(layer=1, drop=0.5).apply(model, None):
        model.answer_logits(batch)
    for row in range(2):
        pixels = model.vision.preprocess(subject.images_BCHW[row : row + 1])
        weights_HT = eager_rows(subject.stock, 0, subject.whole(row)[0], decoder=_inside, pixel_values=pixels)
        same("the attention that FastV sees", _SEEN[0][row], weights_HT.mean(0)[:PATCHES])


LLAVA_CHECKS: dict[str, Check] = {"one pass": one_pass, "step by step": step_by_step, "tap": tap}


def examine_llava(
    architecture: Architecture, folder: Path, checks: Mapping[str, Check] | None = None, **changes: Any
) -> Findings:
    """Build a LLaVA-type model around a small decoder in an empty folder, and try every check on it.

    Args:
        changes: fields of the decoder's config that shall have other values.
    """
    checks, source = LLAVA_CHECKS if checks is None else checks, folder / "model"
    ref = f"hf:{source}"

    def make() -> LlavaSubject:
        config = _config(small_config(architecture.model_type, **changes))
        _save(config, source)
        family = family_of(ref)
        info = family.info(ref, {})  # what is refused is refused before there are weights
        stock = _stock(config)
        with no_progress_bars():
            stock.save_pretrained(source)
        model = family.load(family.info(ref, {}), None, FolderContext(folder / "stages"))
        if not isinstance(model, VlmModel):
            raise TypeError(f"{info.ref} is no vision-language model")
        return LlavaSubject(source, stock, model)

    return examined(ref, checks, make)


def _config(text: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    try:
        return LlavaConfig(
            text_config=text, vision_config=CLIPVisionConfig(**VISION), image_token_id=IMAGE, vision_feature_layer=-1,
            vision_feature_select_strategy="default", architectures=["LlavaForConditionalGeneration"],
        )  # fmt: skip
    except Exception as error:
        raise NotSmall(f"LlavaConfig does not take it ({brief(error)})") from error


def _save(config: Any, source: Path) -> None:
    source.mkdir(parents=True)
    try:
        config.save_pretrained(source)
    except Exception as error:
        raise NotSmall(f"transformers does not save a LlavaConfig with it ({brief(error)})") from error
    save_preprocessing(source, VISION["image_size"])


def _stock(config: Any) -> Any:
    """Transformers' module, once it has run by itself."""
    from transformers import LlavaForConditionalGeneration

    ids_1T = torch.tensor([[IMAGE] * PATCHES + [IMAGE + 1]])
    try:
        module = redrawn(LlavaForConditionalGeneration(config))
        module(input_ids=ids_1T, pixel_values=torch.zeros(1, 3, 12, 12), use_cache=False)
    except Exception as error:
        raise NotSmall(f"transformers' own LLaVA does not run with it ({brief(error)})") from error
    return module


def _inside(stock: Any) -> Any:
    return stock.model.language_model
