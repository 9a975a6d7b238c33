"""What the tests of prompt methods share: contexts, classifiers and readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from isoflop.core.folder_context import FolderContext
from isoflop.core.knobs import check_knobs
from isoflop.methods.base import Method, build
from isoflop.methods.prompts.classifier import ClassifierStage, TokenClassifier
from isoflop.methods.prompts.units import words_of
from isoflop.models.hooks.prompt_text import PROMPT_TEXT, Compressed, Document
from isoflop.models.lm import LmModel
from isoflop.tasks.base import TASKS
from isoflop.tasks.prompt_qa import PromptQa

RATES = (0.1, 0.2, 0.33, 0.5, 0.8)
DOCUMENTS = (
    Document("a", "the colour of otter is red. nobody talked about rome in the window. the home of heron is oslo."),
    Document("b", "for 365 days the river vanished. the food of otter is figs.\nthe otter waited near the pale road."),
)


def words(text: str) -> list[str]:
    """Words and marks."""
    return [text[start:end] for start, end in words_of(text)]


def is_subsequence(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether ``part`` is ``whole`` with items left out."""
    rest = iter(whole)
    return all(item in rest for item in part)


def brief_classifier(ctx: FolderContext, noise: float = 0.0, **sizes: Any) -> TokenClassifier:
    """A classifier trained for a moment, or longer where ``sizes`` say so."""
    stage = replace(ClassifierStage(32, noise, 0), **{"chunks": 64, "epochs": 1, **sizes})
    found: TokenClassifier = ctx.get(stage)
    return found


def shortened(
    reader: LmModel, name: str, knobs: dict[str, Any], prepared: Any = None, query: str = "the colour of otter is"
) -> Compressed:
    """The documents above through a method."""
    method = build(name, knobs)
    with method.apply(reader, prepared):
        assert reader.occupant(PROMPT_TEXT) is not None
        return reader.occupant(PROMPT_TEXT).compress(query, DOCUMENTS)


def task_of(**options: Any) -> PromptQa:
    """The task with options."""
    task = TASKS.get("prompt-qa")(**check_knobs(PromptQa, options, "task prompt-qa"))
    assert isinstance(task, PromptQa)
    return task


def mean_error(reader: LmModel, ctx: FolderContext, method: Method, prepared: Any = None, **options: Any) -> float:
    """Error of the task with a method."""
    with method.apply(reader, prepared):
        return float(np.concatenate([s.errors for s in task_of(**options).evaluate(reader, ctx, 0)]).mean())
