"""Questions about one image each, as a vision-language model is asked: prompts, answers, losses of given answers, costs.

Shape suffixes: B prompts of one batch, T prompt tokens, Q question tokens, S tokens of an answer, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible, UserError
from isoflop.models.base import Model, ModelInfo
from isoflop.models.features import LayerKey
from isoflop.models.prefix import SegmentedPrompt
from isoflop.models.visual_side import PLAIN, Layout
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch, VlmInfo
from isoflop.tasks.data.images import opened, shown, size_of
from isoflop.tasks.data.language import batches_of
from isoflop.tasks.data.prompts import PromptTokenizer
from isoflop.tasks.footprint import measure_answer

IMAGE = "<image>"
"""Stands in a prompt where the image does."""
MEASURED = 256
"""Questions of which one is measured."""


@dataclass(frozen=True)
class ImagePrompt:
    """A question about an image.

    Attributes:
        id: the example's number.
        image: a path, bytes, or a PIL image.
        before, behind: tokens around it; those behind are what query-conditioned methods see.
        layout: how the image becomes views.
    """

    id: int
    image: Any
    before: tuple[int, ...]
    behind: tuple[int, ...]
    layout: Layout = PLAIN


def check_prompt(prompt: str, what: str) -> None:
    """Raise UserError for a prompt without its image, its question, or with one of them twice."""
    for wanted in (IMAGE, "{question}"):
        if prompt.count(wanted) != 1:
            raise UserError(f"{what}: prompt = {prompt!r} has {wanted} {prompt.count(wanted)} times; allowed: once")


def check_model(info: ModelInfo, what: str) -> None:
    """Raise Infeasible for what is no vision-language model with a tokenizer."""
    if not isinstance(info, VlmInfo) or info.tokenizer is None:
        raise Infeasible(f"{what} needs a vision-language model with a tokenizer, which {info.ref} is not")


class ImageQuestions:
    """Asks a vision-language model about images.

    Args:
        prompt: text around ``{question}``, with ``<image>`` where the image stands.
        chat: the checkpoint's chat template instead.
        what: for messages.

    Raises:
        Infeasible: the model is no vision-language model.
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, model: Model, prompt: str, chat: bool, what: str) -> None:
        if not isinstance(model, VlmModel):
            raise Infeasible(f"{what} needs a vision-language model, which {model.info.ref} is not")
        self._vlm, self._prompt, self._chat, self._what = model, prompt, chat, what
        self.tokens = PromptTokenizer(model.tokenizer, chat, f"{what}: model {model.info.ref}")

    def prompt(self, number: int, image: Any, question: str) -> ImagePrompt:
        """The tokens of a question; a question with ``<image>`` in it places the image itself.

        Raises:
            UserError: the chat template has no place for an image, or the model takes none of this shape.
        """
        marker = IMAGE
        if self._chat:
            marker = self._vlm.tokenizer.convert_ids_to_tokens(self._vlm.side.image_token)
            content = [{"type": "image"}, {"type": "text", "text": question.replace(IMAGE, "").lstrip("\n")}]
            text = self._vlm.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            if text.count(marker) != 1:
                raise UserError(
                    f"{self._what}: the chat template of {self._vlm.info.ref} does not place {marker}; allowed: chat: false"
                )
        else:
            around = self._prompt.replace(IMAGE, "") if question.count(IMAGE) == 1 else self._prompt
            text = around.replace("{question}", question)
        before, _, behind = text.partition(marker)
        side = self._vlm.side
        first = list(self.tokens.first_ids) if side.begins and not self._chat else []
        if not self._chat:
            start, end = side.marks
            before, behind = before + start, end + behind
        layout = PLAIN
        if side.sized:
            width, height = size_of(image)
            try:
                layout = side.layout(height, width)
            except UserError as error:
                raise UserError(f"{self._what}: image {shown(image)}: {error}") from error
        tokens = (*first, *self.tokens.plain(before)), tuple(self.tokens.plain(behind))
        return ImagePrompt(number, image, *tokens, layout)

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[ImagePrompt], most: int, enough: Callable[[str], bool] = lambda text: False
    ) -> list[list[int]]:
        """Tokens that are generated for each prompt: greedily, up to one that ends an answer, ``most``, or text that is enough."""
        found: list[list[int]] = [[] for _ in prompts]
        for batch in self._batches(prompts):
            going = dict.fromkeys(batch, True)
            for ids in self._vlm.generated(self._read([prompts[n] for n in batch]), most):
                for n, token in zip(batch, ids.tolist(), strict=True):
                    going[n] = going[n] and token not in self.tokens.end_ids
                    if going[n]:
                        found[n].append(token)
                        going[n] = not enough(self.tokens.text(found[n]))
                if not any(going.values()):
                    break
        return found

    @torch.no_grad()
    def losses(self, prompts: Sequence[ImagePrompt], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Mean loss (nats per token) of an answer behind each prompt, and whether greedy decoding gives it.

        The answer is read as in serving: token by token, over what methods on the cache kept of the image.

        Raises:
            UserError: an answer without tokens.
        """
        tails = [self.tokens.plain(answer) for answer in answers]
        for answer, tail in zip(answers, tails, strict=True):
            if not tail:
                raise UserError(f"{self._what}: the answer {answer!r} has no tokens")
        found = [(0.0, False)] * len(prompts)
        for batch in self._batches(prompts, [len(tail) for tail in tails]):
            ids_BS = torch.tensor([tails[n] for n in batch], device=self._vlm.device)
            logits_BSW = self._vlm.stepwise(self._read([prompts[n] for n in batch]), ids_BS[:, :-1])
            nll_BS = -logits_BSW.float().log_softmax(-1).gather(-1, ids_BS[..., None])[..., 0]
            greedy_B = (logits_BSW.argmax(-1) == ids_BS).all(-1)
            for n, loss, greedy in zip(batch, nll_BS.mean(-1).tolist(), greedy_B.tolist(), strict=True):
                found[n] = loss, greedy
        return found

    def measure(self, prompts: Iterable[ImagePrompt]) -> dict[str, float]:
        """Footprint of one question, from pixels to the first token of its answer; see ``measure_answer``.

        That of the first one; where images have numbers of tokens of their own, of the one with the median number among the
        first ``MEASURED``.
        """
        side = self._vlm.side
        first = list(islice(prompts, MEASURED if side.sized else 1))
        prompt = sorted(first, key=lambda prompt: side.tokens(prompt.layout))[(len(first) - 1) // 2]
        pixels = self._vlm.side.pixels([opened(prompt.image)])
        return measure_answer(self._vlm, pixels, lambda hidden: self._batch(hidden, [prompt]), prompt.layout)

    def _batches(self, prompts: Sequence[ImagePrompt], tails: Sequence[int] | None = None) -> list[list[int]]:
        """Prompts of one shape, with images of one layout, share a batch."""
        side = self._vlm.side
        kinds = [
            (len(p.before), len(p.behind), tail, p.layout)
            for p, tail in zip(prompts, tails or [0] * len(prompts), strict=True)
        ]
        return list(batches_of(self._vlm, kinds, [sum(kind[:3]) + side.tokens(kind[3]) for kind in kinds]))

    def _read(self, prompts: Sequence[ImagePrompt]) -> SegmentedPrompt:
        pixels = self._vlm.side.pixels([opened(prompt.image) for prompt in prompts])
        hidden = self._vlm.look(pixels, torch.tensor([prompt.id for prompt in prompts]), prompts[0].layout)
        return self._vlm.prompt_of(self._batch(hidden, prompts))

    def _batch(self, hidden: dict[LayerKey, Tensor], prompts: Sequence[ImagePrompt]) -> VlmBatch:
        image, device = self._vlm.info.geometry["image_token"], self._vlm.device
        prompt_BT = torch.tensor([[*p.before, image, *p.behind] for p in prompts], device=device)
        question_BQ = torch.tensor([p.behind for p in prompts], device=device)
        ids_B = torch.tensor([p.id for p in prompts], device=device)
        return VlmBatch(hidden, prompt_BT, question_BQ, ids_B, layout=prompts[0].layout)
