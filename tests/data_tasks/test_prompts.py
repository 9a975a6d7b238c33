"""Templates, where contexts end, and prompts in tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.core.errors import UserError
from isoflop.tasks.data.prompts import PromptText, PromptTokenizer, Template
from isoflop.testing.task_probes import reader_of_text

ROW = {"passage": "A long text.", "question": "Why?", "n": 3, "many": ["x", "y"], "context": "C"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def test_a_template_is_cut_behind_its_context() -> None:
    template = Template.of("Read {passage}\n\nQ{n}: {question} {{no}}", "passage", "here")
    text = template.fill(ROW, shots="first\n")
    assert text == PromptText("first\nRead ", "A long text.", "\n\nQ3: Why? {no}")
    assert text.text[: text.end] == "first\nRead A long text."
    assert template.fields == ["passage", "n", "question"]


def test_the_field_context_is_the_context_where_none_is_named() -> None:
    assert Template.of("{context} {question}", "", "here").context == "context"
    assert Template.of("{context} {question}", "question", "here").context == "question"
    whole = Template.of("{question} {many}", "", "here").fill(ROW)
    assert whole == PromptText("", "Why? x\ny", "", marked=False)


@pytest.mark.parametrize(
    ("template", "context", "message"),
    [
        ("{question", "", "is no template"),
        ("{question!r}", "", "not a plain field"),
        ("{question:>4}", "", "not a plain field"),
        ("{}", "", "not a plain field"),
        ("{passage} {question}", "pasage", r"'pasage' \(did you mean 'passage'\?\)"),
        ("{passage} {passage}", "passage", "stands 2 times"),
    ],
)
def test_wrong_templates_are_refused(template: str, context: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Template.of(template, context, "task x: prompt")
    assert str(caught.value).startswith("task x: prompt")


def test_a_row_without_a_field_is_refused() -> None:
    with pytest.raises(UserError, match="'missing'"):
        Template.of("{missing}", "", "here").fill(ROW)
    with pytest.raises(UserError, match="'empty'"):
        Template.of("{empty}", "", "here").fill({"empty": None})


@pytest.fixture(scope="module")
def tokens() -> PromptTokenizer:
    model, _ = reader_of_text()
    return PromptTokenizer(model.tokenizer, False, "here")


@given(TEXT, TEXT, TEXT)
def test_a_prompt_keeps_its_tokens_and_cuts_where_the_context_ends(before: str, context: str, behind: str) -> None:
    model, _ = _READER
    prompts = PromptTokenizer(model.tokenizer, False, "here")
    text = PromptText(before, context, behind)
    found = prompts.prompt(text)
    assert len(found.context) >= 1
    assert len(found.behind) >= 1 or found.tokens == 1
    shown = text.text.rstrip() if text.text.strip() else text.text
    whole = model.tokenizer(shown, add_special_tokens=False)["input_ids"]
    if len(whole) >= 2:
        assert [*found.context, *found.behind] == whole
        inside = model.tokenizer.decode(found.context)
        assert shown.startswith(inside.rstrip("�")) or len(found.context) == 1
        assert len(inside) <= max(text.end, 1) or len(found.context) == 1


_READER = reader_of_text()


def test_an_answer_is_what_it_adds_to_the_prompt(tokens: PromptTokenizer) -> None:
    text = PromptText("", "it's the weather", "\nAnswer: ")
    prompt = tokens.prompt(text)
    answer = tokens.answer(text, "other")
    whole = tokens.answer(PromptText("", "", ""), "it's the weather\nAnswer: other")
    assert (*prompt.context, *prompt.behind, *answer) == whole


def test_a_prompt_begins_once_though_a_template_has_begun_it() -> None:
    model, _ = reader_of_text()
    tokenizer = model.tokenizer
    prompts = PromptTokenizer(tokenizer, False, "here")
    bos = tokenizer.bos_token_id
    prompts._first = (bos,)
    for text in ("the weather", f"{tokenizer.bos_token}the weather"):
        found = prompts.prompt(PromptText("", text, "", marked=False))
        assert [*found.context, *found.behind].count(bos) == 1


def test_a_chat_template_is_laid_around_the_prompt_and_keeps_the_end_of_the_context() -> None:
    model, _ = _READER
    tokenizer = model.tokenizer
    with pytest.raises(UserError, match="chat = true, but the checkpoint's tokenizer has no chat template"):
        PromptTokenizer(tokenizer, True, "task x")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}<assistant>"
    try:
        prompts = PromptTokenizer(tokenizer, True, "task x")
        found = prompts.prompt(PromptText("read: ", "the weather", "\nwhy?"))
        assert prompts.text(found.context) == "<user>read: the weather"
        assert prompts.text(found.behind) == "\nwhy?</><assistant>"
    finally:
        tokenizer.chat_template = None
