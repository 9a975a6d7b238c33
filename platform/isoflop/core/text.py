"""Text that comes from outside, made safe to keep and to show.

Error messages, names of metrics, paths and the output of models may hold anything: half of a surrogate pair, which no file
and no database takes; NUL, which ends a line of C; BEL and escape sequences, which a terminal obeys; characters that turn
the direction of what stands beside them; a megabyte of it. This module alone says what becomes of them. It is called where
text enters (a worker's report, a ledger or a file that somebody else may have written) and where it leaves for a terminal,
a log or MLflow.
"""

from __future__ import annotations

import re
from typing import Any

from isoflop.core.hashing import content_hash
from isoflop.core.secrets import redacted

MOST = 4000
"""Characters that are kept of a text."""
NAME = 200
"""Characters that are kept of a name."""

# C0 but tab and newline, DEL and C1; surrogates; line and paragraph separators; overrides of direction; no characters at all
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"
)

STORED = r"[\x00-\x08\x0b-\x1f\x7f-\x{9f}\x{2028}-\x{202e}\x{2066}-\x{2069}\x{feff}\x{fffe}\x{ffff}]"
"""The same in RE2, for columns of text; what is stored holds no surrogates."""


def safe_text(value: object, most: int | None = MOST) -> str:
    """``value`` as text that any file, database and terminal takes: what is unsafe in it stands as its escape, ``\\x07``,
    and a password in an address as ``***``.

    Text without such characters, and short enough, is returned as it is; so is what this function gave.

    Args:
        value: text, or anything with a ``str``, which may fail.
        most: characters that are kept; the rest is counted. None keeps all.
    """
    try:
        text = redacted(str(value))
    except Exception:  # of somebody's own class
        text = f"({type(value).__name__} without words)"
    if _UNSAFE.search(text):
        # two halves of a character that came one by one are that character
        text = text.replace("\r\n", "\n").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        text = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    if most is not None and len(text) > most:
        text = _cut(text, most)
    return text


def _cut(text: str, most: int) -> str:
    """The beginning, and how much is left out; ``most`` characters in all."""
    tail = f" … ({len(text) - most:,} characters more)"
    return text[: max(0, most - len(tail))] + tail


def safe_line(value: object, most: int | None = MOST) -> str:
    """:func:`safe_text` in one line, with single blanks."""
    return " ".join(safe_text(value, most).split())


def safe_name(value: object, most: int = NAME) -> str:
    """:func:`safe_line` for what names something: two long names that differ stay two."""
    whole = safe_line(value, None)
    return whole if len(whole) <= most else f"{whole[: most - 10]}…{content_hash(whole, 9)}"


def safe_tree(value: Any) -> Any:
    """Dicts and lists as JSON has them, with every text in them, keys too, made safe."""
    if isinstance(value, str):
        return safe_text(value)
    if isinstance(value, dict):
        return {safe_name(k): safe_tree(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [safe_tree(v) for v in value]
    return value


def storable(text: str) -> bool:
    """Whether ``text`` can be written to a file: no half of a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
