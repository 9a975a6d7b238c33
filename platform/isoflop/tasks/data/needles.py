"""What is hidden in a haystack, and what is asked about it: the kinds of synthetic questions of RULER (arXiv 2404.06654).

Every kind draws its puzzle from a seed alone; a task lays it into as much text as fits a length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from isoflop.core.errors import UserError, unknown

KEYS = (
    "amber", "anchor", "basil", "beacon", "birch", "bramble", "candle", "cedar", "cobalt", "copper", "coral", "cotton",
    "crystal", "dahlia", "ember", "falcon", "fennel", "flint", "garnet", "ginger", "granite", "harbor", "hazel", "heron",
    "indigo", "ivory", "jasper", "juniper", "lantern", "laurel", "lemon", "lilac", "linen", "magnet", "maple", "marble",
    "meadow", "mint", "nettle", "nickel", "nutmeg", "olive", "onyx", "orchid", "otter", "pearl", "pepper", "pewter",
    "plum", "poplar", "quartz", "raven", "ribbon", "robin", "saffron", "silver", "sorrel", "sparrow", "thistle", "timber",
    "topaz", "velvet", "violet", "walnut", "willow", "zephyr",
)  # fmt: skip
SEVERAL = 4
"""Keys, values or questions of the kinds that have several."""
HOPS = 4
COMMON, FREQUENT = 10, 3
"""Words asked of the kinds about counts."""


@dataclass(frozen=True)
class Puzzle:
    """What goes into a haystack.

    Attributes:
        before: instruction in front of the haystack.
        needles: sentences to be hidden, the asked one first; in the order in which they must stand where ``ordered``.
        question: behind the haystack, to where the answer begins.
        answers: texts that a right answer names, all of them.
        fill: haystack of so many words instead of the user's text; None for the text.
        ordered: needles stand in their order.
        tokens: enough for the answer.
    """

    before: str
    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    fill: Callable[[int], str] | None = None
    ordered: bool = False
    tokens: int = 24


def _said(key: str, value: str) -> str:
    return f"The secret number of {key} is {value}."


_NUMBERS = "Some secret numbers are hidden in the text below. Read it carefully: you will be asked about them.\n\n"


def _asked(keys: Sequence[str]) -> str:
    if len(keys) == 1:
        return f"\n\nQuestion: What is the secret number of {keys[0]} in the text above?\nAnswer: The secret number of {keys[0]} is"
    named = f"{', '.join(keys[:-1])} and {keys[-1]}"
    return f"\n\nQuestion: What are the secret numbers of {named} in the text above?\nAnswer: The secret numbers of {named} are"


def _values(rng: np.random.Generator, count: int) -> list[str]:
    return [str(n) for n in rng.choice(np.arange(1_000_000, 10_000_000), count, replace=False)]


def _keys(rng: np.random.Generator, count: int) -> list[str]:
    return [KEYS[n] for n in rng.choice(len(KEYS), count, replace=False)]


def single(rng: np.random.Generator) -> Puzzle:
    """One key with one number."""
    (key,), (value,) = _keys(rng, 1), _values(rng, 1)
    return Puzzle(_NUMBERS, (_said(key, value),), _asked([key]), (value,))


def multi_key(rng: np.random.Generator) -> Puzzle:
    """Several keys with a number each; one is asked."""
    keys, values = _keys(rng, SEVERAL), _values(rng, SEVERAL)
    return Puzzle(_NUMBERS, tuple(map(_said, keys, values)), _asked(keys[:1]), (values[0],))


def multi_value(rng: np.random.Generator) -> Puzzle:
    """One key with several numbers, all of which are asked."""
    (key,), values = _keys(rng, 1), _values(rng, SEVERAL)
    question = f"\n\nQuestion: What are all the secret numbers of {key} in the text above?\nAnswer: The secret numbers of {key} are"
    return Puzzle(_NUMBERS, tuple(_said(key, value) for value in values), question, tuple(values), tokens=48)


def multi_query(rng: np.random.Generator) -> Puzzle:
    """Several keys with a number each, all of which are asked."""
    keys, values = _keys(rng, SEVERAL), _values(rng, SEVERAL)
    return Puzzle(_NUMBERS, tuple(map(_said, keys, values)), _asked(keys), tuple(values), tokens=64)


def variable_tracking(rng: np.random.Generator) -> Puzzle:
    """A chain of assignments; asked are all variables that hold its value."""
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choice(letters, 5))
        names += [name] if name not in names else []
    (value,) = (str(n) for n in rng.integers(10_000, 100_000, 1))
    lines = [f"VAR {names[0]} = {value}."] + [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    before = "Follow the assignments of variables that are hidden in the text below.\n\n"
    question = (
        f"\n\nQuestion: Which variables of the text above hold the value {value}? There are {len(names)}.\n"
        f"Answer: The variables that hold {value} are"
    )
    return Puzzle(before, tuple(lines), question, tuple(names), ordered=True, tokens=48)


def common_words(rng: np.random.Generator) -> Puzzle:
    """A list of words in which ten stand about ten times as often as the others."""
    order = [KEYS[n] for n in rng.permutation(len(KEYS))]
    common, others = order[:COMMON], order[COMMON:]
    shuffle = int(rng.integers(2**31))

    def fill(words: int) -> str:
        rare = max(1, words // (10 * COMMON + len(others)))
        often = max(2 * rare, (words - rare * len(others)) // COMMON)
        listed = common * often + others * rare
        mixed = np.random.default_rng(shuffle).permutation(len(listed))
        return " ".join(f"{place}. {listed[n]}" for place, n in enumerate(mixed, start=1))

    before = f"Below is a numbered list of words, in which some stand more often than others. Remember the {COMMON} most common.\n\n"
    question = (
        f"\n\nQuestion: Which {COMMON} words are the most common in the list above?\nAnswer: The most common words are"
    )
    return Puzzle(before, (), question, tuple(common), fill, tokens=64)


def frequent_words(rng: np.random.Generator) -> Puzzle:
    """Made-up words by Zipf's law (exponent 2); asked are the three most frequent."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = list(dict.fromkeys("".join(rng.choice(letters, 6)) for _ in range(60)))[:50]
    shuffle = int(rng.integers(2**31))

    def fill(count: int) -> str:
        shares = 1.0 / np.arange(1, len(words) + 1) ** 2
        times = np.maximum((count * shares / shares.sum()).astype(int), 1)
        times[:FREQUENT] += np.arange(FREQUENT, 0, -1)  # no ties among those that are asked
        listed = [word for word, n in zip(words, times.tolist(), strict=True) for _ in range(n)]
        return " ".join(listed[n] for n in np.random.default_rng(shuffle).permutation(len(listed)))

    before = "Below is a text in a made-up language. Watch how often its words stand there.\n\n"
    question = (
        f"\n\nQuestion: Which {FREQUENT} words stand most often in the text above?\nAnswer: The most frequent words are"
    )
    return Puzzle(before, (), question, tuple(words[:FREQUENT]), fill, tokens=32)


KINDS: Mapping[str, Callable[[np.random.Generator], Puzzle]] = {
    "single": single,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variable-tracking": variable_tracking,
    "common-words": common_words,
    "frequent-words": frequent_words,
}
QUESTIONS = "question-answering"
"""The kind whose questions and texts a user brings."""


def hidden(puzzle: Puzzle, sentences: Sequence[str], depth: float, rng: np.random.Generator) -> str:
    """Sentences with the needles between them.

    Args:
        depth: where the asked needle stands, 0 for the beginning and 1 for the end; the others stand at random, or, in order,
            spread over what lies behind the first.
    """
    count, needles = len(sentences), puzzle.needles
    first = round(depth * count)
    if puzzle.ordered:
        # a chain that begins at ``depth`` of what leaves room for the rest of it
        first = round(depth * count / len(needles))
        places = [first, *sorted(rng.integers(first, count + 1, len(needles) - 1).tolist())]
    else:
        places = [first, *rng.integers(0, count + 1, len(needles) - 1).tolist()]
    at: dict[int, list[str]] = {}
    for place, needle in zip(places, needles, strict=True):
        at.setdefault(place, []).append(needle)
    parts = [part for place in range(count + 1) for part in (*at.get(place, []), *sentences[place : place + 1])]
    return " ".join(parts)


def check_kinds(kinds: Sequence[str], where: str) -> None:
    """Raise UserError for a kind that does not exist or stands there twice."""
    for kind, count in Counter(kinds).items():
        if kind not in KINDS and kind != QUESTIONS:
            raise unknown("kind of needle", kind, [*KINDS, QUESTIONS], where)
        if count > 1:
            raise UserError(f"{where}: {kind!r} stands there {count} times")
