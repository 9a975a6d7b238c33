"""A world of reviews in plain English, each with one to five stars: labelled text that is the same on every machine.

The stars of a review follow from the sum of what its sentences say. "the room was very clean." counts double, "nobody found the
soup good." the other way round, and "we had hoped for a superb view." judges nothing: words alone tell something, but only what
stands around them tells what they are worth. There is no noise, so that whoever reads exactly makes no errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isoflop.core.hashing import derive_seed

VERSION = "1"
"""Changes when the same numbers would give other reviews."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ASPECTS = _words("room soup view garden breakfast music bed coffee pool lamp window kitchen terrace bath menu hall")
ADJECTIVES = {
    2: _words("superb perfect wonderful brilliant"),
    1: _words("good clean pleasant quiet"),
    -1: _words("dull noisy narrow stale"),
    -2: _words("awful filthy dreadful horrible"),
}
"""By what they are worth."""
STRENGTHS = tuple(ADJECTIVES)
PER_STRENGTH = 4
"""Of each strength."""
PLAIN, VERY, NOT, NOBODY, HOPED = range(5)
FORMS = (PLAIN,) * 5 + (VERY,) * 2 + (NOT, NOBODY, HOPED)
"""Of sentences, as often as they occur."""
TEXTS = {
    PLAIN: "the {aspect} was {adjective}.",
    VERY: "the {aspect} was very {adjective}.",
    NOT: "the {aspect} was not {adjective}.",
    NOBODY: "nobody found the {aspect} {adjective}.",
    HOPED: "we had hoped for a {adjective} {aspect}.",
}
WORTH = {PLAIN: 1, VERY: 2, NOT: -1, NOBODY: -1, HOPED: 0}
"""What a sentence makes of its adjective's strength."""
SENTENCES = (2, 4)
"""Fewest and most of a review."""
BOUNDS = (-3, -1, 0, 2)
"""Largest sums with one, two, three and four stars."""
STARS = tuple(f"{number} star{'s' * (number > 1)}" for number in range(1, len(BOUNDS) + 2))
"""Names of the classes, in order."""
_CHOICES = (len(FORMS), len(STRENGTHS), len(ASPECTS), PER_STRENGTH)


def vocabulary() -> tuple[str, ...]:
    """Every word and the full stop, in a fixed order."""
    fixed = [word for text in TEXTS.values() for word in text.replace(".", " .").split()]
    words = [*(word for word in fixed if not word.startswith("{")), *ASPECTS]
    return tuple(dict.fromkeys([*words, *(word for group in ADJECTIVES.values() for word in group)]))


@dataclass(frozen=True)
class Review:
    """A text and its class: stars less one."""

    text: str
    label: int


def draw_review(rng: np.random.Generator, label: int) -> Review:
    """A review of a class: reviews are drawn until one is of it, so that a class is not told by how it was made."""
    while True:
        count = int(rng.integers(SENTENCES[0], SENTENCES[1] + 1))
        sentences = rng.integers(0, _CHOICES, (count, len(_CHOICES))).tolist()
        if class_of(sum(worth_of(form, strength) for form, strength, _, _ in sentences)) == label:
            return Review(" ".join(text_of(*sentence) for sentence in sentences), label)


def text_of(form: int, strength: int, aspect: int, adjective: int) -> str:
    """A sentence by its numbers."""
    words = ADJECTIVES[STRENGTHS[strength]]
    return TEXTS[FORMS[form]].format(aspect=ASPECTS[aspect], adjective=words[adjective])


def worth_of(form: int, strength: int) -> int:
    """What it adds to the sum."""
    return WORTH[FORMS[form]] * STRENGTHS[strength]


def class_of(total: int) -> int:
    """The class of a sum."""
    return sum(total > bound for bound in BOUNDS)


def review_number(number: int, purpose: str) -> Review:
    """The review of this number, whoever asks; its class is the number's remainder by five.

    Args:
        purpose: reviews for different purposes are drawn apart.
    """
    return draw_review(np.random.default_rng(derive_seed("review", purpose, number)), number % len(STARS))
