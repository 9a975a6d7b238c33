"""What messages and names from outside may hold."""

from __future__ import annotations

import os

TEXTS = {
    "half": "cannot decode \ud83d",
    "bytes": f"[Errno 2] No such file: {os.fsdecode(b'/data/caf' + bytes([0xE9]))!s}",
    "nul": "stopped at \0 in a name",
    "bell": "\a\a\b\b\x7f done",
    "escape": "\x1b]0;owned\x07\x1b[31mred\x1b[0m \x9b31m",
    "lines": "one\r\ntwo\rthree\x0bfour\u2028five\x85six",
    "turned": "abc \u202egnp.exe\u2069 \ufeff\ufffe",
    "long": "x" * 300_000,
}
