"""Answers of whoever measured to whoever must choose: a sentence each, with its numbers and how sure it is.

What asks is :mod:`.questions` and :mod:`.speed_up`. Each question is about the candidates of one task (and, where it needs an
uncompressed model, of one model): errors of different tasks are never averaged. What rows cannot tell is said to be unknown, and why.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from isoflop.core.numbers import quantity, short
from isoflop.core.result import Result
from isoflop.frontier.evidence import Candidate
from isoflop.laws.render import wrapped

_SHARES = {
    0.5: "half",
    0.25: "a quarter",
    0.125: "an eighth",
    0.0625: "a sixteenth",
    0.75: "three quarters",
    1.0: "all",
}


@dataclass(frozen=True)
class Asked:
    """Whom and what a question is about.

    Attributes:
        key: task, and model where it is about one.
        cost: what is spent, in words ("bytes of the KV cache"); unit: of a cost ("B"), "" for shares of the uncompressed.
        level: of statements; seed: of draws.
    """

    key: Mapping[str, str]
    cost: str
    unit: str = ""
    level: float = 0.95
    seed: int = 0

    @property
    def axis(self) -> str:
        """What costs are, as the label of an axis."""
        if self.unit:
            return self.cost
        return (
            f"share left of {self.cost}"
            if self.cost.startswith("what ")
            else f"{self.cost}, as a share of the uncompressed model's"
        )

    @property
    def where(self) -> str:
        """The beginning of a sentence."""
        return " on ".join(self.key.values())


@dataclass
class Answer:
    """A sentence and its numbers.

    Attributes:
        question: best, largest ratio, speed-up.
        key: task, and model where it is about one.
        values: numbers of the answer by name; None for what is not known.
        candidates: what was compared: title, method, model, cost, share, error, and the probability that was asked for.
        unknown: why the answer, or how sure it is, cannot be known.
        notes: what a reader must know.
        axis: what the candidates' costs are; reference: the uncompressed candidate, at such a cost.
    """

    question: str
    key: dict[str, str]
    sentence: str
    values: dict[str, Any]
    candidates: list[dict[str, Any]] = field(default_factory=list)
    unknown: str = ""
    notes: list[str] = field(default_factory=list)
    axis: str = ""
    reference: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"question": self.question, **self.key, "sentence": self.sentence, **self.values,
                "unknown": self.unknown or None, "notes": self.notes, "candidates": self.candidates}  # fmt: skip


@dataclass
class Answers(Result):
    """Answers to the questions that were asked, in their order.

    Attributes:
        cost: what is spent, in words; notes: what holds for all of them.
    """

    answers: list[Answer]
    cost: str = ""
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, i: int) -> Answer:
        return self.answers[i]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"cost": self.cost, "answers": [a.to_dict() for a in self.answers], "notes": self.notes}

    def to_arrow(self) -> pa.Table:
        """One row per answer."""
        rows = [{"question": a.question, **a.key, **a.values, "sentence": a.sentence} for a in self.answers]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])

    def told(self) -> tuple[list[tuple[str, list[str]]], list[str]]:
        """Sentences with their notes, and the notes that hold for all of them: each once.

        A note that several answers of one task and model share stands behind the last of them.
        """
        everywhere = (
            [n for n in self.answers[0].notes if all(n in a.notes for a in self.answers)] if len(self) > 1 else []
        )
        pairs: list[tuple[str, list[str]]] = []
        for i, a in enumerate(self.answers):
            if any(a.sentence == sentence for sentence, _ in pairs):  # several questions without an answer
                continue
            later = {note for b in self.answers[i + 1 :] if b.key == a.key for note in b.notes}
            own = [n for n in dict.fromkeys(a.notes) if n not in later and n not in everywhere]
            pairs.append((a.sentence, own))
        return pairs, list(dict.fromkeys([*everywhere, *self.notes]))

    def __str__(self) -> str:
        lines: list[str] = []
        pairs, everywhere = self.told()
        for sentence, notes in pairs:
            lines += wrapped(sentence, "", "  ")
            for note in notes:
                lines += wrapped(f"! {note}", "  ", "    ")
        for note in everywhere:
            lines += wrapped(f"! {note}", "", "  ")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        pairs, everywhere = self.told()
        texts = [". ".join([sentence, *notes]) for sentence, notes in pairs] + everywhere
        return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def reference(candidates: Sequence[Candidate]) -> Candidate | None:
    """The uncompressed candidate: the one called none, else the cheapest; None where nothing is uncompressed."""
    dense = [c for c in candidates if c.uncompressed]
    return min(dense, key=lambda c: (c.method != "none", c.cost), default=None)


def no_reference(question: str, asked: Asked, values: dict[str, Any]) -> Answer:
    """The answer where a question needs an uncompressed run and there is none."""
    missing = "no uncompressed run to compare with; add the method none"
    return Answer(question, dict(asked.key), f"{asked.where}: unknown: {missing}", values, unknown=missing)


def only_reference(question: str, asked: Asked, values: dict[str, Any], dense: Candidate) -> Answer:
    """The answer where nothing but uncompressed models was measured."""
    missing = "only the uncompressed baseline was measured"
    words = f"{asked.where}: unknown: {missing}, {dense.title}; run a method beside it"
    return Answer(question, dict(asked.key), words, values, unknown=missing)


def fewer(cost: str) -> str:
    """The beginning of "fewer bytes" and "less of what its method cuts"."""
    return f"less of {cost}" if cost.startswith("what ") else f"fewer {cost}"


def spent(c: Candidate, asked: Asked) -> str:
    """A cost in words: with its unit, or as a part of the uncompressed one."""
    if not asked.unit and c.cost == 1:
        return f"all of {_them(asked.cost)}"
    return f"{short(c.cost)} of {_them(asked.cost)}" if not asked.unit else quantity(c.cost, asked.unit)


def _them(cost: str) -> str:
    return "it" if cost.startswith("what ") else "them"


def part(share: float, cost: str) -> str:
    """A share of a cost in words: "half the bytes", "a quarter of the bytes", "half of what its method cuts"."""
    clause = cost.startswith("what ")
    of = " of" if clause or share not in (0.5, 1.0) else ""
    return _SHARES.get(share, f"{share:g}") + of + (f" {cost}" if clause else f" the {cost}")


def chance(probability: float | None) -> str:
    """Two digits, never a certainty that draws cannot show."""
    p = probability or 0.0
    return "> 0.99" if p > 0.99 else "< 0.01" if p < 0.01 else f"{p:.2f}"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = list(dict.fromkeys(names))
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def row_of(c: Candidate, asked: Asked, error: float, probability: float | None) -> dict[str, Any]:
    """A candidate as plain JSON types."""
    cost = None if not math.isfinite(c.cost) else c.cost
    return {
        "configuration": c.title, "method": c.method, "model": c.model or None, "cost": cost, "error": error,
        "uncompressed": c.uncompressed, "probability": probability,
    }  # fmt: skip
