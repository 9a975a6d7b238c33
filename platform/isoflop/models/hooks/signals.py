"""Codecs as models see them: a signal becomes byte strings and a signal again before the model looks at it.

One piece of code for every kind of signal; the hooks ``pixels``, ``waveform`` and ``voxels`` say what theirs looks like.

Shape suffixes: B batch; the other dimensions are the signal's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.occupant import Occupant


@dataclass(frozen=True)
class Coded:
    """One example as a byte string, which is all that its decoder gets.

    Attributes:
        data: the bytes.
        header: how many of them are the same for every example of this size and setting: file signatures, sizes, tables
            that do not depend on the content, counts.
    """

    data: bytes
    header: int


class Codec(Occupant):
    """Base class of codecs.

    What encoder and decoder hold beforehand is not part of an example's bytes: settings are not counted, weights are
    (``tensors``), with the model's.
    """

    @abstractmethod
    def encode(self, samples: Tensor) -> list[Coded]:
        """Each example of a batch of raw samples as bytes; an example does not depend on the others of its batch."""

    @abstractmethod
    def decode(self, data: Sequence[bytes]) -> Tensor:
        """The raw samples of byte strings, in the size that they had."""

    def weight_bytes(self, dense_bits: int) -> float:
        """Bytes of ``tensors``, where an element of float32 counts ``dense_bits`` as in the model's own weights."""
        return float(self.held_bytes(dense_bits))


@dataclass(frozen=True)
class CodecBytes:
    """Means over the examples that went through a codec.

    Attributes:
        examples: how many there were.
        coded: bytes per example; ``header`` of them are headers (see ``Coded``).
        raw: bytes per example as raw samples.
        elements: places per example that a rate is told of: pixels, moments of a waveform, voxels.
    """

    examples: int
    coded: float
    header: float
    raw: float
    elements: float


class CodecRun(Occupant):
    """A codec at work in a model, and the bytes of every example that went through it.

    Args:
        codec: encodes and decodes.

    Class attributes:
        what: an example, in messages.
    """

    what: ClassVar[str] = "example"

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._sizes: dict[int, tuple[int, int, float, int]] = {}

    @abstractmethod
    def raw(self, signal: Tensor) -> Tensor:
        """A signal in the model's own values as the samples that a codec is given."""

    @abstractmethod
    def signal(self, samples: Tensor) -> Tensor:
        """The inverse of ``raw``, up to rounding."""

    @abstractmethod
    def sizes(self, samples: Tensor) -> tuple[float, int]:
        """Raw bytes and elements of one example of a batch."""

    def tensors(self) -> Sequence[Tensor]:
        """Those of the codec."""
        return self.codec.tensors()

    @torch.no_grad()
    def through(self, signal: Tensor, ids_B: Tensor | None = None) -> Tensor:
        """What is left of a batch of signals, which become raw samples first.

        Args:
            ids_B: example numbers, under which ``bytes`` counts each example once; those without are not counted.
        """
        samples = self.raw(signal)
        coded = self.codec.encode(samples)
        if ids_B is not None:
            raw, elements = self.sizes(samples)
            for number, code in zip(ids_B.tolist(), coded, strict=True):
                self._sizes[number] = (len(code.data), code.header, raw, elements)
        return self.signal(self.codec.decode([code.data for code in coded])).to(signal.device)

    def bytes(self) -> CodecBytes:
        """Means over the examples so far.

        Raises:
            ValueError: there were none.
        """
        if not self._sizes:
            raise ValueError(
                f"no {self.what} has gone through the codec yet; its bytes are counted on those that the model sees"
            )
        count = len(self._sizes)
        coded, header, raw, elements = (sum(column) / count for column in zip(*self._sizes.values(), strict=True))
        return CodecBytes(count, coded, header, raw, elements)


SIGNALS: dict[str, Hook[CodecRun]] = {}
"""The hooks of this kind by name; each kind's own file adds its hook."""


def signal_hook(name: str, order: int, doc: str) -> Hook[CodecRun]:
    """A hook for codecs of one kind of signal."""
    hook: Hook[CodecRun] = Hook(name, order, doc)
    SIGNALS[name] = hook
    return hook


def signals_of(info: ModelInfo, asker: str) -> Hook[CodecRun]:
    """The hook through which a model's inputs can be coded; Infeasible where it offers none."""
    found = [hook for hook in SIGNALS.values() if hook in info.hooks]
    if not found:
        raise Infeasible(f"{asker} needs one of {', '.join(SIGNALS)}, which model {info.ref} does not offer")
    return found[0]
