"""Two questions of whoever must choose: what is best at a budget, and how far one may compress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from isoflop.core.numbers import quantity, short
from isoflop.frontier.answers import (
    Answer,
    Asked,
    chance,
    fewer,
    listed,
    no_reference,
    only_reference,
    part,
    reference,
    row_of,
    spent,
)
from isoflop.frontier.evidence import Candidate, gather

_SLACK = 0.05  # half of a cache is at most 52.5 % of it, since some tokens are always kept


def best(candidates: Sequence[Candidate], asked: Asked, budget: float, share: bool = False) -> Answer:
    """The configuration of least error that a budget pays for.

    Args:
        budget: a cost, or with ``share`` a part of what the uncompressed model costs.

    Returns:
        An answer whose values hold ``budget``, ``configuration`` (None where nothing fits), ``error``, ``uncompressed_error``,
        ``cost``, ``probability`` (None where nothing is known of chance, or nothing else fits) and ``cheapest``.
    """
    most = budget + _SLACK * min(budget, 1 - budget) if share else budget
    fits = [c for c in candidates if c.cost <= most * (1 + 1e-9)]
    place = f"at {part(budget, asked.cost)}" if share else f"at {quantity(budget, asked.unit)} ({asked.cost})"
    head = f"{asked.where}, {place}: "
    values: dict[str, Any] = dict.fromkeys(
        ("budget", "configuration", "method", "model", "error", "uncompressed_error", "cost", "probability")
    )
    values |= {"model": asked.key.get("model"), "budget": budget, "cheapest": min(c.cost for c in candidates)}
    dense = reference(candidates)
    if share and not fits and dense is not None and all(c.uncompressed for c in candidates):
        return only_reference("best", asked, values, dense)
    if not fits:
        cheapest = min(candidates, key=lambda c: c.cost)
        words = f"nothing that was measured fits; the cheapest, {cheapest.title}, takes {spent(cheapest, asked)}"
        return Answer("best", dict(asked.key), head + words, values, unknown="nothing fits the budget")
    found = gather(fits, asked.seed)
    sure = None if found.unknown or len(fits) == 1 else found.best()
    order = sorted(range(len(fits)), key=lambda i: (found.error[i], fits[i].cost, fits[i].title))
    first = order[0]
    chosen = fits[first]
    dense = reference([c for c in candidates if c.model == chosen.model])  # of the chosen one's model
    plain = None if dense is None else _mean_error(dense, chosen)
    probability = None if sure is None else float(sure[first])
    ties = [fits[i].title for i in order[1:] if found.error[i] == found.error[first]]
    words = f"{chosen.title}, at {spent(chosen, asked)}, error {short(found.error[first])}"
    if dense is not None and dense is not chosen:
        words += f" (uncompressed {short(plain)})"
    if len(fits) == 1:
        words += (
            f"; the only one of {len(candidates)} configurations that fits"
            if len(candidates) > 1
            else "; nothing else was measured"
        )
    elif sure is None:
        words += f", the least of {len(fits)}; how sure is unknown: {found.unknown}"
    else:
        words += f"; best with probability {chance(probability)} over {found.told}"
    notes = list(found.notes)
    if ties:
        notes.insert(0, f"its error is also that of {listed(ties)}; it is the cheapest of them")
    rows = [
        row_of(c, asked, float(found.error[i]), None if sure is None else float(sure[i])) for i, c in enumerate(fits)
    ]
    values |= {
        "configuration": chosen.title, "method": chosen.method, "model": chosen.model or asked.key.get("model"), "error": float(found.error[first]),
        "uncompressed_error": plain, "cost": chosen.cost, "probability": probability,
    }  # fmt: skip
    return Answer("best", dict(asked.key), head + words, values, [rows[i] for i in order], found.unknown, notes)


def largest_ratio(candidates: Sequence[Candidate], asked: Asked, margin: float) -> Answer:
    """The largest compression whose error exceeds the uncompressed one's by no more than ``margin``.

    Sure to ``asked.level`` for all methods at once: the settings of each method are tried from its least compression on, until one
    is not within the margin (tests in a fixed sequence need no correction), at a level that is divided among methods (Bonferroni).

    Returns:
        An answer whose values hold ``margin``, ``configuration``, ``ratio``, ``error``, ``uncompressed_error``, ``probability``;
        the configuration is None where none is that sure.
    """
    dense = reference(candidates)
    values: dict[str, Any] = dict.fromkeys(
        ("configuration", "method", "ratio", "error", "uncompressed_error", "probability")
    )
    values = {"margin": margin, **values}
    if dense is None:
        return no_reference("largest ratio", asked, values)
    tried = [c for c in candidates if _ratio(c, dense) > 1 and not c.uncompressed]
    if all(c.uncompressed for c in candidates):
        return only_reference("largest ratio", asked, values, dense)
    if not tried:
        words = f"{asked.where}: nothing takes {fewer(asked.cost)} than uncompressed"
        return Answer("largest ratio", dict(asked.key), words, values, unknown="nothing is compressed")
    found = gather([dense, *tried], asked.seed)
    ratios = [_ratio(c, dense) for c in tried]
    inside = [found.at_most(i + 1, 0, margin) for i in range(len(tried))]
    families: dict[str, list[int]] = {}
    for i, c in enumerate(tried):
        families.setdefault(c.chain, []).append(i)
    needed = 1 - (1 - asked.level) / len(families)
    passed: list[int] = []
    for own in families.values():
        for i in sorted(own, key=lambda i: (ratios[i], tried[i].title)):
            if found.unknown or inside[i] < needed:
                break
            passed.append(i)
    plain = float(found.error[0])
    values["uncompressed_error"] = plain
    head = f"{asked.where}: "
    aim = f"within {margin:g} of the uncompressed error ({short(plain)})"
    if passed:
        i = max(passed, key=lambda i: (ratios[i], inside[i]))
        head += f"largest ratio {aim}, in {asked.cost}: "
        tail = f", {100 * asked.level:g} % sure over {found.told}"
    else:
        fitting = [i for i in range(len(tried)) if found.error[i + 1] - plain <= margin + 1e-12]
        i = max(fitting or range(len(tried)), key=lambda i: (ratios[i] if fitting else inside[i], inside[i]))
        if found.unknown:
            head += (
                f"largest ratio {aim}, in {asked.cost} and as measured: "
                if fitting
                else f"nothing was measured {aim}; the nearest: "
            )
            tail = f"; how sure is unknown: {found.unknown}"
        else:
            head += f"no ratio in {asked.cost} is {aim} with {100 * asked.level:g} % confidence; "
            head += "as measured, the largest would be " if fitting else "the likeliest is "
            tail = f", with probability {chance(inside[i])} over {found.told}"
    chosen, error = tried[i], float(found.error[i + 1])
    sentence = f"{head}{short(ratios[i])}× ({chosen.title}, error {short(error)}){tail}"
    if passed:
        values |= {"configuration": chosen.title, "method": chosen.method, "ratio": ratios[i], "error": error, "probability": inside[i]}  # fmt: skip
    rows = [
        row_of(c, asked, float(found.error[k + 1]), None if found.unknown else inside[k]) | {"ratio": ratios[k], "sure": k in passed}
        for k, c in enumerate(tried)
    ]  # fmt: skip
    rows.insert(0, row_of(dense, asked, plain, None) | {"ratio": 1.0, "sure": True})
    return Answer("largest ratio", dict(asked.key), sentence, values, rows, found.unknown, list(found.notes))


def _mean_error(dense: Candidate, other: Candidate) -> float:
    """Over the repeats that both have, where there are such."""
    shared = [r for r in dense.errors if r in other.errors] or list(dense.errors)
    return float(np.mean([dense.errors[r] for r in shared]))


def _ratio(c: Candidate, dense: Candidate) -> float:
    return dense.cost / c.cost
