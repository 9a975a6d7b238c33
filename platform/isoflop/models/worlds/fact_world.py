"""A world of facts in plain English: documents, questions about them, and which sentences hold the answers.

A fact reads "the colour of falcon is red."; entities and attributes recur within a context, so that neither alone names a
fact. Filler mentions entities, attributes and values as well ("the colour of the river was pale."), so that a word by
itself does not tell whether it belongs to a fact. What is asked is never memorised: facts are drawn anew for every
context, and only reading them answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isoflop.core.hashing import derive_seed
from isoflop.models.hooks.prompt_text import Document


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ENTITIES = _words(
    "falcon otter badger heron lynx marten raven stoat beaver bison camel donkey eagle ferret gibbon hare ibex jackal "
    "koala lemur mole newt osprey panda quail rabbit salmon tapir urchin viper walrus zebra"
)
VALUES = {
    "colour": _words(
        "red blue green yellow black white brown grey pink purple orange violet silver golden scarlet indigo"
    ),
    "home": _words(
        "rome paris london madrid berlin vienna prague lisbon dublin athens oslo cairo delhi tokyo lima quito"
    ),
    "food": _words(
        "bread rice corn beans cheese honey apples grapes figs plums nuts olives carrots onions pears melons"
    ),
    "friend": _words("anna bruno clara david emma felix greta hugo irene jonas karla leon maria nico olga peter"),
}
CHOICES = 16
"""Values of an attribute."""
NOUNS = _words("river bridge market garden window letter road tower harbour valley kitchen forest island station")
ADJECTIVES = _words("pale quiet narrow broken early distant heavy empty strange pleasant")
VERBS = _words("waited rested appeared vanished remained returned")
NUMBERS = _words("3 7 12 40 365")
FILLER = (
    "a {adjective} {noun} {verb} near the {noun}.",
    "people said that the {noun} was {adjective}.",
    "for {number} days the {noun} {verb}.",
    "the {entity} {verb} near the {adjective} {noun}.",
    "nobody talked about {value} in the {noun}.",
    "the {attribute} of the {noun} was {adjective}.",
)
FRAME = _words("context : question the of is .")
"""The words of a prompt, and those of a fact that do not carry it."""


def vocabulary() -> tuple[str, ...]:
    """Every word and mark, in a fixed order."""
    words = [
        *FRAME,
        *VALUES,
        *ENTITIES,
        *(value for values in VALUES.values() for value in values),
        *(word for word in _words(" ".join(FILLER).replace(".", " ")) if not word.startswith("{")),
        *NOUNS,
        *ADJECTIVES,
        *VERBS,
        *NUMBERS,
    ]
    return tuple(dict.fromkeys(words))


@dataclass(frozen=True)
class Fact:
    """The ``attribute`` of ``entity`` is ``value``."""

    attribute: str
    entity: str
    value: str

    @property
    def question(self) -> str:
        """A text that the value completes."""
        return f"the {self.attribute} of {self.entity} is"

    @property
    def sentence(self) -> str:
        """The fact as a document states it."""
        return f"{self.question} {self.value}."

    @property
    def content(self) -> tuple[str, str, str]:
        """The words that carry it, in the order of the sentence."""
        return self.attribute, self.entity, self.value


@dataclass(frozen=True)
class Sentence:
    """A sentence of a document, and the fact that it states, if any."""

    text: str
    fact: Fact | None = None


@dataclass(frozen=True)
class FactQuestion:
    """Documents and a question about one of their facts.

    Attributes:
        evidence: where the answering sentence stands: document id, start and end in characters.
    """

    documents: tuple[Document, ...]
    query: str
    answer: str
    evidence: tuple[str, int, int]


def draw_sentences(rng: np.random.Generator, facts: int, filler: int) -> list[Sentence]:
    """Sentences in random order; each entity of the facts has about two of them, no two about the same attribute.

    Raises:
        ValueError: more facts than pairs of an entity and an attribute.
    """
    named = min(len(ENTITIES), max(2, -(-facts // 2)))
    entities = [ENTITIES[i] for i in rng.permutation(len(ENTITIES))[:named]]
    pairs = [(entity, attribute) for entity in entities for attribute in VALUES]
    if facts > len(pairs):
        raise ValueError(f"{facts} facts exceed the {len(pairs)} pairs of entity and attribute")
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:facts]]
    stated = [Fact(attribute, entity, _one(rng, VALUES[attribute])) for entity, attribute in chosen]
    sentences = [Sentence(fact.sentence, fact) for fact in stated]
    sentences += [Sentence(draw_filler(rng)) for _ in range(filler)]
    return [sentences[i] for i in rng.permutation(len(sentences))]


def draw_filler(rng: np.random.Generator) -> str:
    """A sentence that states no fact."""
    text = FILLER[int(rng.integers(len(FILLER)))]
    attribute = _one(rng, tuple(VALUES))
    fixed = {"entity": ENTITIES, "attribute": tuple(VALUES), "value": VALUES[attribute], "number": NUMBERS}
    for place, words in {**fixed, "adjective": ADJECTIVES, "verb": VERBS}.items():
        text = text.replace("{" + place + "}", _one(rng, words))
    while "{noun}" in text:
        text = text.replace("{noun}", _one(rng, NOUNS), 1)
    return text


def question_number(number: int, facts: int, filler: int, documents: int, purpose: str) -> FactQuestion:
    """The question of this number: the same for the same arguments, whoever asks.

    Args:
        facts, filler: sentences of the context, dealt out over ``documents``.
        purpose: questions for different purposes have nothing in common.
    """
    rng = np.random.default_rng(derive_seed(purpose, number, facts, filler, documents))
    sentences = draw_sentences(rng, facts, filler)
    asked = int(rng.choice([i for i, sentence in enumerate(sentences) if sentence.fact is not None]))
    bounds = np.linspace(0, len(sentences), documents + 1).round().astype(int)
    texts, evidence = [], ("", 0, 0)
    for part, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        text = ""
        for i in range(first, last):
            text += " " if text else ""
            if i == asked:
                evidence = f"d{part}", len(text), len(text) + len(sentences[i].text)
            text += sentences[i].text
        texts.append(Document(f"d{part}", text))
    fact = sentences[asked].fact
    assert fact is not None
    return FactQuestion(tuple(texts), fact.question, fact.value, evidence)


def _one(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]
