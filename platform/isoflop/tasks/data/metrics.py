"""How a generated answer is compared with references: scores in [0, 1], the best over the references.

A user's own metric is a function in a module that the sweep imports::

    from isoflop.tasks.data.metrics import METRICS

    @METRICS.register("my-metric")
    def score(answer: str, references: Sequence[str], pattern: str) -> float: ...
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from isoflop.core.errors import UserError
from isoflop.core.registry import Registry

Metric = Callable[[str, Sequence[str], str], float]
METRICS: Registry[Any] = Registry("metric", ("isoflop.tasks.data.metrics",))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = re.compile(
    rf"(?!(?<!\w)-(?=\.?\d))(?!(?<=\d)\.(?=\d))[{re.escape(string.punctuation)}]"
)  # not of numbers
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def plain(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: how SQuAD's evaluation compares answers."""
    bare = _PUNCTUATION.sub("", text.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split()) or " ".join(text.lower().split())


@METRICS.register("exact")
def exact(answer: str, references: Sequence[str], pattern: str = "") -> float:
    """1 where the answer is a reference, but for case, punctuation, articles and spaces (SQuAD's exact match).

    A number keeps its sign and its decimal point, and a text of nothing else ("A") is compared as it is.
    """
    return float(any(plain(answer) == plain(reference) for reference in references))


@METRICS.register("contains")
def contains(answer: str, references: Sequence[str], pattern: str = "") -> float:
    """1 where a reference stands somewhere in the answer, whatever the case; empty references stand nowhere."""
    return float(any(bool(r.strip()) and r.strip().lower() in answer.lower() for r in references))


@METRICS.register("vqa")
def vqa(answer: str, references: Sequence[str], pattern: str = "") -> float:
    """VQA accuracy (arXiv 1505.00468): the mean, over leaving out one person, of min(1, others who gave the answer / 3).

    With fewer than four references it is ``exact``, since nobody could reach 1.
    """
    if len(references) < 4:
        return exact(answer, references)
    same = [plain(answer) == plain(reference) for reference in references]
    return sum(min(1.0, (sum(same) - mine) / 3) for mine in same) / len(same)


@METRICS.register("f1")
def f1(answer: str, references: Sequence[str], pattern: str = "") -> float:
    """F1 of the words of answer and reference, compared as in ``exact`` (SQuAD's F1)."""
    return max(_f1(plain(answer).split(), plain(reference).split()) for reference in references)


@METRICS.register("rouge-l")
def rouge_l(answer: str, references: Sequence[str], pattern: str = "") -> float:
    """F1 by the longest common subsequence of words in lower case (Lin 2004, β = 1, no stemming)."""
    return max(_rouge_l(_words(answer), _words(reference)) for reference in references)


@METRICS.register("number")
def number(answer: str, references: Sequence[str], pattern: str = "") -> float:
    """1 where the last number of the answer equals a reference's last one, thousands separators aside."""
    found = _last_number(answer)
    return float(found is not None and any(found == _last_number(reference) for reference in references))


@METRICS.register("regex")
def regex(answer: str, references: Sequence[str], pattern: str = "") -> float:
    """1 where what ``pattern`` finds in the answer is a reference; without a pattern, where a reference, as a pattern, is found.

    Raises:
        UserError: no pattern.
    """
    try:
        if not pattern:
            return float(any(re.search(reference, answer) for reference in references))
        match = re.search(pattern, answer)
    except re.error as error:
        raise UserError(f"metric regex: pattern {pattern or references!r} is no regular expression ({error})") from None
    if match is None:
        return 0.0
    taken = match[1] if match.re.groups else match[0]
    return float(any(taken.strip() == reference.strip() for reference in references))


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))


def _rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return 0.0
    row = [0] * (len(reference) + 1)
    for word in answer:
        diagonal = 0
        for place, other in enumerate(reference, start=1):
            diagonal, row[place] = row[place], diagonal + 1 if word == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(answer) + len(reference))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())  # of any script


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
