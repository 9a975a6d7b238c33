"""Methods that act through a hook are refused by tasks that never look at it."""

from __future__ import annotations

import pytest

from isoflop.core.errors import UserError
from isoflop.methods.base import METHODS
from isoflop.models.hooks.byte_view import BYTE_VIEW
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.hooks.prompt_text import PROMPT_TEXT
from isoflop.sweep.resolve import resolve
from isoflop.tasks.base import TASKS


def plan(model: str, method: object, task: str) -> int:
    """Jobs that would run."""
    sweep = resolve({"name": "s", "models": [model], "methods": [method], "tasks": [task]})
    return sum(len(sweep.jobs_of(config)) for config in sweep.space.grid())


@pytest.mark.parametrize(
    ("model", "method", "task", "named"),
    [
        ("tiny-lm/text-d64", "byte-probs", "bits-per-byte", "byte-completion"),
        ("tiny-lm/facts-d64", "byte-greedy", "prompt-qa", "words of a small world"),
        ("tiny-lm/text-d64", "llmlingua2", "bits-per-byte", "prompt-qa"),
        ("tiny-lm/mixed-d64", "byte-probs", "byte-completion", "has seen parts in training"),
        ("tiny-lm/text-d64", {"byte-probs": {"members": "tiny-lm/mixed-d64"}}, "byte-completion", "has seen parts"),
        ("tiny-lm/facts-d64", "byte-tokens", "byte-completion", "words of a small world"),
    ],
)
def test_a_method_or_model_that_a_task_cannot_use_is_refused_at_plan(
    model: str, method: object, task: str, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        plan(model, method, task)


def test_what_a_task_asks_for_some_method_gives() -> None:
    given = {hook for name in METHODS.names() for hook in METHODS.get(name).hooks if hook.asked}
    assert given == {PROMPT_TEXT, BYTE_VIEW, FEED_FORWARD} == {hook for name in TASKS for hook in TASKS.get(name).asks}


def test_they_are_accepted_where_they_act() -> None:
    assert plan("tiny-lm/text-d64", "byte-probs", "byte-completion") == 1
    assert plan("tiny-lm/facts-d64", "llmlingua2", "prompt-qa") == 1
