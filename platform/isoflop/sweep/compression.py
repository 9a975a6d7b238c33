"""How much a row is compressed, for people: one definition per method, by name, wherever a table or a report shows it.

A row's ``ratio`` is what the method's family cuts, as the family counts it: of a cache, what must stay resident behind the
prompt; of weights, the matrices alone. Whoever asks for half the bytes means those that an answer takes. So where the task
measured these (``Method.ratio_bytes``: the whole cache at the answer's end, all weights), they are compared; a combination by
the bytes of weights and cache together; elsewhere ``ratio`` stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from isoflop.methods.base import METHODS

COLUMNS = ("method", "family", "ratio", "footprint")
"""What :func:`compression` reads of a row."""
_BASELINE = "none"
_TOGETHER = ("bytes_dense", "bytes")


@dataclass(frozen=True)
class Compression:
    """Dense over compressed.

    Attributes:
        of: what is compared, e.g. "bytes of the KV cache".
        times: the quotient.
    """

    of: str
    times: float


def compression(row: Mapping[str, Any]) -> Compression | None:
    """Of a row of the ledger; None where nothing is known.

    Args:
        row: with :data:`COLUMNS`.
    """
    names = str(row["method"]).split("+")
    several = "+" in str(row.get("family") or "+") and len(names) > 1  # two methods of one family share its place
    of, keys = ("bytes of weights and cache", _TOGETHER) if several else _declared(names[0], row.get("family"))
    footprint = dict(row.get("footprint") or ())
    if keys is not None and footprint.get(keys[0]) and footprint.get(keys[1]):
        return Compression(of, footprint[keys[0]] / footprint[keys[1]])
    ratio = row.get("ratio")
    if ratio is None or not math.isfinite(ratio):
        return None
    return Compression(of if keys is None else f"{of}, as the method counts them", float(ratio))


def _declared(method: str, family: str | None) -> tuple[str, tuple[str, str] | None]:
    """What a method's ratio compares; of one that is not registered here, its family's name is all that is known."""
    if method not in METHODS:
        return f"what {family or 'its method'} cuts", None
    cls = METHODS.get(method)
    return cls.ratio_of or f"what {cls.family} cuts", cls.ratio_bytes


def definitions(found: Iterable[tuple[str, Compression | None]]) -> str:
    """What the ratios of (method, compression) compare, in one phrase: the methods are named where they differ."""
    by_meaning: dict[str, list[str]] = {}
    for method, one in found:
        if one is not None and method not in by_meaning.setdefault(one.of, []):
            by_meaning[one.of].append(method)
    # the baseline compares nothing
    by_meaning = {of: methods for of, methods in by_meaning.items() if methods != [_BASELINE]}
    if not by_meaning:
        return "nothing compressed here"
    if len(by_meaning) == 1:
        return next(iter(by_meaning))
    return "; ".join(f"{of} ({', '.join(methods)})" for of, methods in by_meaning.items())
