"""Bits per byte, the one currency of language models with different tokenizers."""

from __future__ import annotations

import math

import numpy as np

from isoflop.models.byte_trees.vocabulary import Segmenter


class ByteMeter:
    """Collects negative log-likelihoods with the bytes that they are of.

    Args:
        segmenter: how the scored text was cut into units, where it was; text that it does not cover is refused.
    """

    def __init__(self, segmenter: Segmenter | None = None) -> None:
        self._segmenter = segmenter
        self._nats: list[float] = []
        self._bytes: list[int] = []

    def add(self, nats: float, scored: bytes, text: bytes | None = None) -> None:
        """Count ``scored`` bytes that cost ``nats``.

        Args:
            text: the whole text that was cut, where it is more than what is scored.

        Raises:
            ValueError: nothing is scored, or the units do not join to the text.
        """
        if not scored:
            raise ValueError("nothing is scored: bits per byte need at least one byte")
        if self._segmenter is not None and not self._segmenter.lossless(scored if text is None else text):
            raise ValueError(
                f"{type(self._segmenter).__name__} loses bytes of {scored[:32]!r}; its bits do not compare"
            )
        self._nats.append(nats)
        self._bytes.append(len(scored))

    def each(self) -> np.ndarray:
        """Bits per byte of every addition."""
        return bits_per_byte(np.array(self._nats), np.array(self._bytes))

    def total(self) -> float:
        """Bits per byte of all bytes together."""
        return float(bits_per_byte(np.array([sum(self._nats)]), np.array([sum(self._bytes)]))[0])


def bits_per_byte(nats_B: np.ndarray, bytes_B: np.ndarray) -> np.ndarray:
    """Negative log-likelihoods in nats over bytes, as bits."""
    found: np.ndarray = nats_B / math.log(2) / bytes_B
    return found
