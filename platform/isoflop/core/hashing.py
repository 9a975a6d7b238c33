"""Content hashes: the same content gives the same id on every machine and in every process."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
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


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, kept for as long as its size and time of change stay."""
    stat = path.stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2**18)
def _file_hash(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derive_seed(*parts: Any) -> int:
    """A 31-bit seed that depends on every part and on nothing else."""
    return int(content_hash(list(parts), 16), 16) % (2**31)
