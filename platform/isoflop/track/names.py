"""Names in MLflow: letters, digits and ``_ - . space : /``, at most 250. What has other names keeps apart from what has not.

A character that MLflow does not take is spelt, ``hit@1`` as ``hit_at_1``, so that two names which differ in it stay two, in
every run by the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from isoflop.core.text import safe_name

MOST = 250
_FOREIGN = re.compile(r"[^A-Za-z0-9_\-. :/]")
_WORDS = {
    "@": "at", "#": "hash", "%": "percent", "<": "lt", ">": "gt", "=": "eq", "+": "plus", "*": "times", "&": "and", "|": "or",
    "!": "not", "?": "ask", "^": "pow", "~": "approx", "$": "dollar",
}  # fmt: skip


def spelt(name: str) -> str:
    """``name`` as MLflow takes it; a name that it takes already stays as it is."""
    text = _FOREIGN.sub(lambda found: _spelt_character(found[0]), safe_name(name, MOST))
    return text if len(text) <= MOST else safe_name(text, MOST).replace("…", "_")


def _spelt_character(character: str) -> str:
    if character in "()[]{},;'\"\\`":  # brackets and the like say nothing
        return "_"
    return f"_{_WORDS.get(character, f'x{ord(character):x}')}_"


def spelt_apart(names: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Each name as MLflow takes it, no two alike: what would be a second of its spelling gets a number.

    Args:
        taken: spellings that are used otherwise.
    """
    used, found = set(taken), {}
    for name in sorted(names, key=lambda n: (spelt(n) != n, n)):  # those that stay as they are come first
        plain = text = spelt(name)
        number = 2
        while text in used:
            tail = f" {number}"
            text, number = plain[: MOST - len(tail)] + tail, number + 1
        used.add(text)
        found[name] = text
    return found
