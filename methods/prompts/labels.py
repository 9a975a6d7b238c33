"""Labels of words from a teacher's compressed text (LLMLingua-2, section 3): alignment and quality control.

Here the teacher is a rule instead of a large language model. It knows which sentences of the fact world state facts, keeps
the words that carry them and deletes all others; now and then it decides wrongly (``noise``), and in some chunks it
rewords, as language models do although they are told not to. What comes behind it is the paper's: labels come from
aligning its text with the original, never from the rule itself, and badly aligned chunks are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isoflop.methods.prompts.units import words_of
from isoflop.models.worlds import fact_world as world

WINDOW = 150
"""Words within which an occurrence is looked for on both sides."""
REWORDED = 0.05
"""Share of chunks in which the teacher replaces some words."""
WORST_VARIATION, WORST_GAP = 5.0, 10.0
"""Per cent of chunks that are dropped for words that are not the original's, and of the rest for bad alignment."""


@dataclass(frozen=True)
class Labelled:
    """A chunk with one label per word.

    Attributes:
        words, labels: of the original; True is kept.
        variation: share of the compressed words that the original does not have (VR); 1 where nothing is left.
        gap: share of the original's words that the compressed text has, counted with repetition, minus the share
            labelled True (AG = HR - MR).
    """

    text: str
    words: tuple[str, ...]
    labels: tuple[bool, ...]
    variation: float
    gap: float


def teach(sentences: Sequence[world.Sentence], noise: float, rng: np.random.Generator) -> list[str]:
    """The teacher's compressed text, in words.

    Args:
        noise: probability with which the fate of a word is decided wrongly.
    """
    rewords = rng.random() < REWORDED
    strangers = world.vocabulary()
    kept = []
    for sentence in sentences:
        own = sentence.fact.content if sentence.fact is not None else ()
        for start, end in words_of(sentence.text):
            word = sentence.text[start:end]
            if (word in own) != (rng.random() < noise):
                replaced = rewords and rng.random() < 0.3
                kept.append(strangers[int(rng.integers(len(strangers)))] if replaced else word)
    return kept


def align(original: Sequence[str], compressed: Sequence[str], window: int = WINDOW) -> list[bool]:
    """Labels of the original's words: True for the occurrences that the compressed words stand for.

    Each compressed word, in order, labels the nearest unlabelled occurrence around the place of the one before, ahead
    before behind at equal distance. A hit ahead moves the place there, though by no more than half a window; a hit
    behind moves it back. Case does not count.
    """
    lowered, last = [word.lower() for word in original], len(original) - 1
    labels, place = [False] * len(original), 0
    for word in (word.lower() for word in compressed):
        for distance in range(window if original else 0):
            ahead, behind = min(place + distance, last), max(place - distance, 0)
            if lowered[ahead] == word and not labels[ahead]:
                labels[ahead] = True
                place = min(ahead, place + window // 2)
                break
            if lowered[behind] == word and not labels[behind]:
                labels[behind] = True
                place = behind
                break
    return labels


def label(text: str, compressed: Sequence[str]) -> Labelled:
    """A chunk with its labels and their quality."""
    words = tuple(text[start:end] for start, end in words_of(text))
    labels = align(words, compressed)
    known = {word.lower() for word in words}
    found = sum(word.lower() in known for word in compressed)
    variation = 1 - found / len(compressed) if compressed else 1.0
    gap = (found - sum(labels)) / len(words) if words else 0.0
    return Labelled(text, words, tuple(labels), variation, gap)


def well_labelled(chunks: Sequence[Labelled]) -> list[Labelled]:
    """Without the worst by variation, then without the worst of the rest by alignment gap; those at the cut stay.

    A text of which no word is the original's, an empty one among them, goes whatever the cut.
    """
    cut = np.percentile([chunk.variation for chunk in chunks], 100 - WORST_VARIATION)
    rest = [chunk for chunk in chunks if chunk.variation <= cut and chunk.variation < 1]
    if not rest:
        return []
    cut = np.percentile([chunk.gap for chunk in rest], 100 - WORST_GAP)
    return [chunk for chunk in rest if chunk.gap <= cut]


def draw_chunks(count: int, noise: float, rng: np.random.Generator) -> list[Labelled]:
    """Training documents of two to six sentences, labelled through the teacher."""
    chunks = []
    for _ in range(count):
        sentences = world.draw_sentences(rng, int(rng.integers(0, 4)), int(rng.integers(2, 4)))
        text = " ".join(sentence.text for sentence in sentences)
        chunks.append(label(text, teach(sentences, noise, rng)))
    return chunks
