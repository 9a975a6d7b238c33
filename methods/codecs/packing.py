"""Codes as bytes: equal numbers of bits, packed without gaps behind one byte that says how many codes there are.

Shape suffixes: M codes, b bits.
"""

from __future__ import annotations

import numpy as np

MOST_CODES = 256
"""The leading byte holds the number of codes less one."""
COUNT_BYTES = 1


def packed_bytes(count: int, bits: int) -> int:
    """Length of ``write_codes``: the leading byte, and ⌈count · bits / 8⌉."""
    return COUNT_BYTES + (count * bits + 7) // 8


def write_codes(codes_M: np.ndarray, bits: int) -> bytes:
    """One to 256 codes of ``bits`` bits each, most significant bit first.

    Raises:
        ValueError: no code, too many, or one that does not fit.
    """
    if not 1 <= len(codes_M) <= MOST_CODES:
        raise ValueError(f"{len(codes_M)} codes; 1 … {MOST_CODES} can be written")
    if codes_M.min() < 0 or codes_M.max() >= 2**bits:
        raise ValueError(f"codes from {codes_M.min()} to {codes_M.max()} do not fit into {bits} bits")
    digits_Mb = codes_M[:, None] >> np.arange(bits - 1, -1, -1) & 1
    return bytes([len(codes_M) - 1]) + np.packbits(digits_Mb.astype(np.uint8)).tobytes()


def read_codes(data: bytes, bits: int) -> np.ndarray:
    """The codes, int64 (M,), that ``write_codes`` wrote."""
    count = data[0] + 1
    digits_Mb = np.unpackbits(np.frombuffer(data, np.uint8, offset=COUNT_BYTES), count=count * bits).reshape(
        count, bits
    )
    return digits_Mb.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1))
