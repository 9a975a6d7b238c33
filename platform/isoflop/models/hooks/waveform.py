"""The hook ``waveform``: 16-bit sound goes through a codec before the model hears it.

Shape suffixes: B batch, C channels, T moments.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from isoflop.models.hooks.signals import Codec, CodecRun, Coded, signal_hook

WAVEFORM = signal_hook("waveform", 3, "turns sound into bytes and sound again before the model hears it")
FULL_SCALE = 32767


class WaveformCodec(Codec):
    """Base class of sound codecs: their samples are 16-bit PCM."""

    @abstractmethod
    def encode(self, sound_BCT: Tensor) -> list[Coded]:
        """Each sound, int16, as bytes; a sound does not depend on the others of its batch."""

    @abstractmethod
    def decode(self, data: Sequence[bytes]) -> Tensor:
        """The sounds (B, C, T) of byte strings, int16, in the length that they had."""


class WaveformCodecRun(CodecRun):
    """The occupant: a sound codec at work. Signals are waveforms in [-1, 1]; elements are moments."""

    what: ClassVar[str] = "sound"

    def raw(self, sound_BCT: Tensor) -> Tensor:
        """Rounded to 16 bits."""
        return (sound_BCT.clamp(-1, 1) * FULL_SCALE).round().to(torch.int16)

    def signal(self, sound_BCT: Tensor) -> Tensor:
        """In [-1, 1]."""
        return sound_BCT.float() / FULL_SCALE

    def sizes(self, sound_BCT: Tensor) -> tuple[float, int]:
        """Two bytes per channel and moment; moments."""
        channels, moments = sound_BCT.shape[1:]
        return 2 * channels * moments, moments
