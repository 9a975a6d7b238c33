"""How many bytes a compressor makes of a text; the standard library's compressors only.

Level 0 of gzip and zlib stores the data as they are, so that lengths would be all that counts: it is refused.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable

Compress = Callable[[bytes, int], bytes]
COMPRESSORS: dict[str, tuple[Compress, range]] = {
    "gzip": (lambda data, level: gzip.compress(data, level, mtime=0), range(1, 10)),
    "zlib": (zlib.compress, range(1, 10)),
    "bz2": (bz2.compress, range(1, 10)),
    "lzma": (lambda data, level: lzma.compress(data, preset=level), range(10)),
}
"""Compressors by name, each with the levels that compress."""


class CompressedLength:
    """C(x): compressed bytes of a text in UTF-8. Counts its work: ``calls`` and the ``read`` bytes of what was compressed.

    Args:
        name: one of ``COMPRESSORS``.
        level: as the compressor counts them.
        cache: keep the lengths that :meth:`kept` is asked for.

    Raises:
        ValueError: the compressor has no such level.
    """

    def __init__(self, name: str, level: int, cache: bool = True) -> None:
        self._compress, levels = COMPRESSORS[name]
        if level not in levels:
            raise ValueError(f"{name} has no level {level} that compresses")
        self._level = level
        self._cache: dict[str, int] | None = {} if cache else None
        self.calls = self.read = 0

    def __call__(self, text: str) -> int:
        """Computed anew."""
        data = text.encode()
        self.calls += 1
        self.read += len(data)
        return len(self._compress(data, self._level))

    def kept(self, text: str) -> int:
        """Of a text that is asked for again and again."""
        if self._cache is None:
            return self(text)
        if text not in self._cache:
            self._cache[text] = self(text)
        return self._cache[text]

    @property
    def nbytes(self) -> float:
        """Bytes of the kept lengths, eight each."""
        return 8.0 * len(self._cache or ())


def ncd(length: CompressedLength, x: str, y: str) -> float:
    """Normalised compression distance (C(xy) - min(C(x), C(y))) / max(C(x), C(y)); not symmetric."""
    shorter, longer = sorted((length.kept(x), length.kept(y)))
    return (length(x + y) - shorter) / longer
