"""Prompts from the fields of a row: a template, where the context in it ends, and the whole in a model's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from isoflop.core.errors import UserError, unknown
from isoflop.models.worlds.lm_text import byte_ends

CONTEXT = "context"
"""The field of a template that is the context where the task's options name none."""
_MARK = "\x02\x03"
"""Stands where the context ends while a chat template is laid around a prompt."""


@dataclass(frozen=True)
class PromptText:
    """One prompt as text.

    Attributes:
        before: what stands before the context: instructions, examples.
        context: what methods on prompts may shorten; methods on the cache compress up to its end.
        behind: from there to where the answer begins.
        marked: whether a context was named. Where none was, all of the prompt is the context, but for its last token.
    """

    before: str
    context: str
    behind: str
    marked: bool = True

    @property
    def text(self) -> str:
        """All of it."""
        return self.before + self.context + self.behind

    @property
    def end(self) -> int:
        """Characters up to the end of the context."""
        return len(self.before) + len(self.context)


@dataclass(frozen=True)
class Template:
    """Text with fields in braces, as Python formats it: ``{passage}``, and ``{{`` for a brace.

    Attributes:
        pieces: literal text, and the field behind it or None.
        context: the field that is the context, or None.
    """

    pieces: tuple[tuple[str, str | None], ...]
    context: str | None

    @classmethod
    def of(cls, text: str, context: str, where: str) -> Template:
        """Read a template.

        Args:
            context: the field that is the context; empty for ``{context}``, where the template has it.
            where: for messages.

        Raises:
            UserError: braces that do not match, a field with a format or an index, a context that the template lacks, or that
                stands there twice.
        """
        pieces = []
        try:
            for literal, field, form, conversion in Formatter().parse(text):
                if form or conversion or (field is not None and not field.strip()):
                    raise UserError(f"{where}: {field or ''!r} in {text!r} is not a plain field; allowed: {{name}}")
                pieces.append((literal, field))
        except ValueError as error:
            raise UserError(
                f"{where}: {text!r} is no template ({error}); allowed: {{name}}, and {{{{ for a brace"
            ) from None
        fields = [field for _, field in pieces if field is not None]
        wanted = context or (CONTEXT if CONTEXT in fields else None)
        if wanted is not None and fields.count(wanted) != 1:
            if not fields.count(wanted):
                raise unknown("field of the template", wanted, fields, f"{where}: context")
            raise UserError(
                f"{where}: the context {{{wanted}}} stands {fields.count(wanted)} times in {text!r}; allowed: once"
            )
        return cls(tuple(pieces), wanted)

    @property
    def fields(self) -> list[str]:
        """Names of the fields, each once."""
        return list(dict.fromkeys(field for _, field in self.pieces if field is not None))

    def fill(self, row: Mapping[str, Any], shots: str = "") -> PromptText:
        """The prompt of a row.

        Args:
            shots: answered examples before it.

        Raises:
            UserError: the row lacks a field.
        """
        parts = {"before": shots, "context": "", "behind": ""}
        place = "before"
        for literal, field in self.pieces:
            parts[place] += literal
            if field is None:
                continue
            if field == self.context:
                parts["context"], place = shown(row, field), "behind"
            else:
                parts[place] += shown(row, field)
        if self.context is None:
            return PromptText("", parts["before"], "", marked=False)
        return PromptText(parts["before"], parts["context"], parts["behind"])


def shown(row: Mapping[str, Any], field: str) -> str:
    """A field of a row as text; lists line by line."""
    if field not in row or row[field] is None:
        raise unknown("field of a row", field, row)
    value = row[field]
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt in a model's tokens.

    Attributes:
        context: at least one token, which methods on the cache compress.
        behind: read behind the compressed context: at least one token, unless the whole prompt has one.
    """

    context: tuple[int, ...]
    behind: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """All of them."""
        return len(self.context) + len(self.behind)


class PromptTokenizer:
    """How a model wants its prompts: with what at the beginning, and in its chat template or as they are.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        chat: lay the checkpoint's chat template around every prompt.
        where: for messages.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, chat: bool, where: str) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{where}: chat = true, but the checkpoint's tokenizer has no chat template; allowed: chat: false"
            )
        first = tokenizer("", verbose=False)["input_ids"]
        bos = tokenizer.bos_token_id
        self._first = tuple(first[:1]) if first and first[0] == bos else ()
        self._empty = bos if bos is not None else tokenizer.eos_token_id

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        found = {self._tokenizer.eos_token_id}
        if self._chat:  # turns end with tokens of their own in many templates
            for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"):
                found.add(self._tokenizer.get_vocab().get(name))
        return frozenset(token for token in found if token is not None)

    def prompt(self, text: PromptText, whole: bool = False) -> TokenPrompt:
        """A prompt in tokens; a token across the end of the context belongs to what follows.

        Args:
            whole: keep spaces and lines at its end, which else are left to the answer, so that its words keep their tokens.
        """
        laid, end, first = (*self._in_chat(text), ()) if self._chat else (text.text, text.end, self._first)
        laid = laid.rstrip() if not (self._chat or whole) and laid.strip() else laid
        found = self._tokenizer(laid, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if tuple(found["input_ids"][: len(first)]) == first:
            first = ()  # a chat template that somebody laid around the text has brought it
        ids = [*first, *found["input_ids"]]
        inside = len(first) + sum(stop <= end for _, stop in found["offset_mapping"])
        if not ids:  # something has to be read before the first token of an answer
            return TokenPrompt((self.first_id,), ())
        cut = min(max(inside, 1), max(len(ids) - 1, 1))
        return TokenPrompt(tuple(ids[:cut]), tuple(ids[cut:]))

    def answer(self, text: PromptText, answer: str) -> tuple[int, ...]:
        """Tokens of an answer behind a prompt: what it adds to the tokens of the prompt alone.

        Spaces at the end of the prompt are read as the beginning of the answer, so that words keep their tokens.
        """
        if self._chat:
            return tuple(self.plain(answer))
        before = text.text.rstrip() if text.text.strip() else text.text
        space = text.text[len(before) :]
        alone, both = self.plain(before), self.plain(before + space + answer)
        return tuple(both[len(alone) :]) or tuple(self.plain(answer))

    @property
    def first_id(self) -> int:
        """What stands before a text that has nothing before it: the token of beginning, or else of end."""
        return self._empty or 0

    @property
    def first_ids(self) -> tuple[int, ...]:
        """What the model wants at the beginning of every text, if anything."""
        return self._first

    def plain(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def with_ends(self, text: str, special: bool = True) -> tuple[list[int], list[int]]:
        """A document's tokens, with the UTF-8 bytes up to the end of each.

        Args:
            special: with what the model wants at the beginning.
        """
        first = self._first if special else ()
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = byte_ends(text, [stop for _, stop in found["offset_mapping"]])
        return [*first, *found["input_ids"]], [*(0 for _ in first), *ends.tolist()]

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text, without special ones."""
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded

    def _in_chat(self, text: PromptText) -> tuple[str, int]:
        content = text.before + text.context + _MARK + text.behind
        laid = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        head, mark, tail = laid.partition(_MARK)
        if not mark:
            raise UserError("the checkpoint's chat template does not show what the user says; allowed: chat: false")
        return head + tail, len(head)
