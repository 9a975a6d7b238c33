"""The same walk over Hugging Face's classes of vision-language models: what each place for methods gives in them.

Every check occupies one hook with something that changes nothing, and compares with transformers' own module on what its own
processor makes of the pictures: in one pass over two prompts, one of them padded, and token by token.

Shape suffixes: B rows, T tokens of a prompt, S tokens of an answer, W vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.core.hook import Hook
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.visual_side import Layout
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import HOOKS, VlmBatch
from isoflop.testing.architectures.walk import Check, Findings, Wrong, examined, same
from isoflop.testing.neutral import neutral
from isoflop.testing.small_vision_language import SMALL, save_small

WORDS = (ord("!"), ord("~"))
BEFORE, QUESTION, PADS, ANSWER = 2, 6, 2, 3
SIZE = 40, 52
"""Height and width of the pictures."""


@dataclass(frozen=True, eq=False)
class VisionLanguageSubject:
    """A small checkpoint; see ``Subject``."""

    folder: Path
    stock: Any
    model: VlmModel

    @cached_property
    def pictures(self) -> list[Any]:
        """Two, of one size."""
        rng = torch.Generator().manual_seed(1)
        values = torch.randint(0, 256, (2, *SIZE, 3), generator=rng, dtype=torch.uint8).numpy()
        return [Image.fromarray(value) for value in values]

    @cached_property
    def words(self) -> list[tuple[Tensor, Tensor]]:
        """Text before each picture, and the question behind it, the second shorter."""
        rng = torch.Generator().manual_seed(2)
        return [
            (torch.randint(*WORDS, (BEFORE,), generator=rng), torch.randint(*WORDS, (length,), generator=rng))
            for length in (QUESTION, QUESTION - PADS)
        ]

    @cached_property
    def answer_BS(self) -> Tensor:
        """Tokens behind the questions."""
        return torch.randint(*WORDS, (2, ANSWER), generator=torch.Generator().manual_seed(3))

    def batch(self, rows: Sequence[int] = (0, 1), layout: Layout | None = None) -> VlmBatch:
        """Prompts, padded on the left to the length of the longest."""
        side = self.model.side
        layout = layout or side.layout(*SIZE)
        image = torch.tensor([side.image_token])
        prompts = [torch.cat((self.words[row][0], image, self.words[row][1])) for row in rows]
        length = max(map(len, prompts))
        prompt_BT = torch.stack([torch.nn.functional.pad(p, (length - len(p), 0)) for p in prompts])
        mask_BT = torch.stack([torch.arange(length) >= length - len(p) for p in prompts]).long()
        question = max(len(self.words[row][1]) for row in rows)
        ids_B = torch.tensor(rows)
        hidden = self.model.look(side.pixels([self.pictures[row] for row in rows]), ids_B, layout)
        question_BQ, padding = prompt_BT[:, -question:], mask_BT[:, -question:]
        if len(rows) == 1:
            return VlmBatch(hidden, prompt_BT, question_BQ, ids_B, layout=layout)
        return VlmBatch(hidden, prompt_BT, question_BQ, ids_B, mask_BT, padding, layout=layout)

    def inputs(self, row: int, answer: int = 0, picture: Tensor | None = None) -> dict[str, Tensor]:
        """What transformers takes of one prompt and the beginning of its answer.

        Args:
            picture: ids in place of the picture, where its size is not the usual one.
        """
        side, layout = self.model.side, self.model.side.layout(*SIZE)
        before, question = self.words[row]
        picture = side.ids(layout, side.tokens(layout)) if picture is None else picture
        ids_T = torch.cat((before, picture, question, self.answer_BS[row, :answer]))
        return self.taken(self.pictures[row], ids_T, answer)

    def taken(self, picture: Any, ids_T: Tensor, answer: int = 0) -> dict[str, Tensor]:
        """What transformers takes of a picture and a text with every placeholder, the last ``answer`` of whose tokens are its answer."""
        import transformers

        small = SMALL[type(self.stock).__name__]
        processor = getattr(transformers, small.processor).from_pretrained(self.folder)
        pixels = processor(images=[picture], return_tensors="pt", **small.told)
        ids_1T, behind_T = ids_T[None], torch.arange(len(ids_T)) >= len(ids_T) - answer
        kinds = {
            "mm_token_type_ids": (ids_1T == self.model.side.image_token).int(),
            "token_type_ids": behind_T[None].int(),
        }
        given = {"input_ids": ids_1T, **kinds, **pixels}
        taken = inspect.signature(self.stock.forward).parameters
        return {name: value for name, value in given.items() if name in taken and name not in _UNUSED}

    @cached_property
    def alone(self) -> list[Tensor]:
        """Stock logits (1 + S, W) behind each prompt by itself and behind each token of its answer."""
        return [stock_logits(self.stock, self.inputs(row, ANSWER))[0, -1 - ANSWER :] for row in range(2)]


_UNUSED = ("batch_num_images",)


def stock_logits(stock: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (B, T, W) of transformers' own module."""
    found: Tensor = stock(**inputs, use_cache=False).logits
    return found


def occupied(hook: Hook[Any] | None, model: VlmModel) -> AbstractContextManager[Any]:
    """Something that changes nothing in a hook; nothing for None."""
    if hook is None:
        return nullcontext()
    if hook is ATTENTION and hook in model.info.hooks:  # steps need a cache
        return build("full-cache", {}).apply(model, None)
    occupant = neutral(hook, model)
    if occupant is None:
        raise Wrong(f"the suite knows nothing that changes nothing in {hook.name}")
    return model.occupy(hook, occupant)


def one_pass(subject: VisionLanguageSubject, hook: Hook[Any] | None = None) -> None:
    """Stock logits from pictures, two prompts at once where rows may have padding before an image, and one by one."""
    model = subject.model
    with occupied(hook, model):
        for row in range(2):
            same("one pass", model.answer_logits(subject.batch([row]))[0], subject.alone[row][0])
        if hook is None:
            found_BW = model.answer_logits(subject.batch())
            for row in range(2):
                same("one pass with padding", found_BW[row], subject.alone[row][0])


def step_by_step(subject: VisionLanguageSubject, hook: Hook[Any] | None = None) -> None:
    """The answer a token at a time, and one pass over prompt and answer."""
    model = subject.model
    with occupied(hook, model):
        for row in range(2):
            prompt, answer_1S = model.prompt_of(subject.batch([row])), subject.answer_BS[row : row + 1]
            same("step by step", model.stepwise(prompt, answer_1S)[0], subject.alone[row])
        if hook is None:
            found_BSW = model.stepwise(model.prompt_of(subject.batch()), subject.answer_BS)
            for row in range(2):
                same("step by step with padding", found_BSW[row], subject.alone[row])


def at_once_and_in_steps(hook: Hook[Any] | None) -> Check:
    """Both."""

    def check(subject: VisionLanguageSubject) -> None:
        one_pass(subject, hook)
        step_by_step(subject, hook)

    return check


PLACES: tuple[Hook[Any], ...] = (PIXELS, *sorted(HOOKS, key=lambda hook: (hook.order, hook.name)))
"""The columns of the table."""
VISION_LANGUAGE_CHECKS: dict[str, Check] = {
    "one pass": one_pass,
    "step by step": step_by_step,
    **{hook.name: at_once_and_in_steps(hook) for hook in PLACES},
}


def examine_vision_language(architecture: str, folder: Path, checks: Mapping[str, Check] | None = None) -> Findings:
    """Build the small checkpoint of a class in an empty folder, and try every check on it."""
    checks = VISION_LANGUAGE_CHECKS if checks is None else checks
    return examined(f"hf:{folder / 'model'}", checks, partial(vision_language_subject, architecture, folder))


def vision_language_subject(
    architecture: str, folder: Path, save: Callable[[str, Path], Any] = save_small, **options: Any
) -> VisionLanguageSubject:
    """The small checkpoint of a class as a user would name it."""
    source = folder / "model"
    stock = save(architecture, source)
    ref = f"hf:{source}"
    family = family_of(ref)
    model = family.load(family.info(ref, options), None, FolderContext(folder / "stages"))
    if not isinstance(model, VlmModel):
        raise TypeError(f"{architecture} is no vision-language model")
    return VisionLanguageSubject(source, stock, model)
