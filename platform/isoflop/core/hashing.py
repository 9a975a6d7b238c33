"""Content hashes: the same content gives the same id on every machine and in every process."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any


def canonical(value: Any) -> Any:
    """``value`` as plain JSON types with one spelling per content (1.0 and 1 are the same number)."""
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0]))}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return repr(value)
        return int(value) if value == int(value) and abs(value) < 2**53 else value
    raise TypeError(f"{type(value).__name__} has no canonical form: {value!r}")


def content_hash(value: Any, length: int = 20) -> str:
    """Hexadecimal SHA-256 of the canonical JSON of ``value``, cut to ``length`` digits (80 bits by default)."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def derive_seed(*parts: Any) -> int:
    """A 31-bit seed that depends on every part and on nothing else."""
    return int(content_hash(list(parts), 16), 16) % (2**31)
