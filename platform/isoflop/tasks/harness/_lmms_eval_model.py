"""A vision-language model of this platform as lmms-eval sees it: the harness asks about images, methods compress them.

Needs the package lmms-eval: nothing but the task imports this module, and only when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from isoflop.tasks.data.image_questions import ImagePrompt, ImageQuestions
from isoflop.tasks.harness.common import cut, generation


class VisionModel(lmms):
    """Answers the harness' requests about one image each, behind whatever methods leave of it.

    Args:
        tasks: data sets by task and split, as the harness' own models hold them.
        what: for messages.
    """

    is_simple = True

    def __init__(self, questions: ImageQuestions, tasks: dict[str, Any], what: str) -> None:
        super().__init__()
        self._questions = questions
        self.task_dict = tasks
        self._what = what

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Mean losses of given answers, in nats per token: what this harness' models give, whatever the name says."""
        prompts, answers = [], []
        for request in requests:
            context, target, to_visual, *where = request.args
            document = self._document(*where)
            prompts.append(self._prompt(context, to_visual(document), where[0]))
            answers.append(target if isinstance(target, str) else str(target(document)))
        return self._questions.losses(prompts, answers)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers up to the first text that ends them."""
        said = [""] * len(requests)
        by_options: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        prompts = []
        for number, request in enumerate(requests):
            context, options, to_visual, *where = request.args
            prompts.append(self._prompt(context, to_visual(self._document(*where)), where[0]))
            by_options.setdefault(generation(options, self._what), []).append(number)
        for (most, ends), numbers in by_options.items():
            found = self._questions.answers([prompts[n] for n in numbers], most, _ends_with(ends))
            for number, ids in zip(numbers, found, strict=True):
                said[number] = cut(self._questions.tokens.text(ids), ends)
        return said

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered; the task refuses such tasks before they run."""
        raise NotImplementedError(f"{self._what}: answers in several rounds")

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _prompt(self, context: str, visuals: list[Any], number: int) -> ImagePrompt:
        return self._questions.prompt(number, visuals[0], context)


def _ends_with(ends: Sequence[str]) -> Callable[[str], bool]:
    return lambda text: any(end in text for end in ends)
