"""An occupant of every hook that leaves a model's outputs as they are.

Shape suffixes: those of the hooks' own files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.models.base import Model
from isoflop.models.hooks.adapters import ADAPTERS
from isoflop.models.hooks.attention import ATTENTION, AttentionCall, AttentionPolicy, CacheReport, causal_attention
from isoflop.models.hooks.byte_view import BYTE_VIEW, TokenView
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS, LayerTokens, TokenPolicy
from isoflop.models.hooks.documents import DOCUMENTS, DocumentSelection
from isoflop.models.hooks.experts import EXPERTS, ExpertPolicy, Routing
from isoflop.models.hooks.feed_forward import FEED_FORWARD, MlpPolicy
from isoflop.models.hooks.gradients import GRADIENTS, ExchangeReport
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.pixels import PIXELS, ImageCodec, ImageCodecRun
from isoflop.models.hooks.prompt_text import PROMPT_TEXT, Compressed, ContextCompressor, Document, joined
from isoflop.models.hooks.residual import RESIDUAL, ResidualPolicy
from isoflop.models.hooks.signals import Codec, Coded
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT, Before, PromptPolicy
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, BlockRun, TokenReduction
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS, CompressedTokens, Compression, VisualInput
from isoflop.models.hooks.voxels import VOXELS, VoxelCodecRun
from isoflop.models.hooks.waveform import WAVEFORM, WaveformCodecRun


class CausalAttention(AttentionPolicy):
    """Plain attention over everything, which keeps nothing."""

    def attend(self, call: AttentionCall) -> Tensor:
        """The stock result."""
        return causal_attention(call)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Of the prompt alone: there is no cache to go on from."""
        yield

    def forget(self) -> None:
        """There is nothing to forget."""

    def report(self) -> CacheReport:
        """Nothing."""
        return CacheReport(0.0, 0.0, 0.0, 0.0, 0.0)


class AllTokens(TokenPolicy):
    """Lets every token stay."""

    def change(self, tokens: LayerTokens) -> None:
        """Nothing."""


class WholeUpdate(ResidualPolicy):
    """Takes what the layer gave."""

    def update(self, layer: int, before_BTd: Tensor, after_BTd: Tensor) -> Tensor:
        """As it came."""
        return after_BTd


class NoPrompt(PromptPolicy):
    """A prompt without tokens."""

    def begin(self, ids_BT: Tensor, valid_BT: Tensor | None) -> Before:
        """Never asked."""
        raise NotImplementedError


class ChosenExperts(ExpertPolicy):
    """Takes what the router chose."""

    def route(self, layer: int, hidden_Sd: Tensor, routing: Routing) -> Routing:
        """As it came."""
        return routing


class AllNeurons(MlpPolicy):
    """Switches nothing off."""

    def observed(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}


class AllPatches(Compression):
    """Every patch as a token."""

    def __call__(self, view: VisualInput) -> CompressedTokens:
        """The features."""
        return CompressedTokens(view.x_BPD)


class WholeDocuments(ContextCompressor):
    """The documents one after the other."""

    @property
    def module(self) -> nn.Module | None:
        """None."""
        return None

    def compress(self, query: str, documents: Sequence[Document]) -> Compressed:
        """Everything."""
        return Compressed(joined(documents), None)

    def fresh(self, query: str, documents: Sequence[Document]) -> Compressed:
        """Everything."""
        return self.compress(query, documents)


class RawSamples(Codec):
    """Samples as they are; the last batch's shape and type are remembered, as a decoder would be told them."""

    def encode(self, samples: Tensor) -> list[Coded]:
        """The bytes of each example."""
        self._shape, self._type = samples.shape[1:], samples.dtype
        return [Coded(sample.contiguous().numpy().tobytes(), 0) for sample in samples.cpu()]

    def decode(self, data: Sequence[bytes]) -> Tensor:
        """The samples."""
        return torch.stack([torch.frombuffer(bytearray(d), dtype=self._type).view(self._shape) for d in data])


class RawImages(RawSamples, ImageCodec):
    """Images as they are."""


def neutral(hook: Hook[Any], model: Any) -> Occupant | None:
    """An occupant of a hook that changes nothing in ``model``; None where the suite knows none."""
    make = _NEUTRAL.get(hook)
    return None if make is None else make(model)


_NEUTRAL: dict[Hook[Any], Callable[[Any], Occupant]] = {
    ADAPTERS: lambda model: Occupant(),
    ATTENTION: lambda model: CausalAttention(),
    BYTE_VIEW: lambda model: TokenView(),
    DECODER_LAYERS: AllTokens,
    DOCUMENTS: lambda model: DocumentSelection(np.arange(1), 1, 1),
    EXPERTS: lambda model: ChosenExperts(),
    FEED_FORWARD: lambda model: AllNeurons(),
    GRADIENTS: lambda model: ExchangeReport(1, "simulated", 1, 0),
    MATRICES: lambda model: Occupant(),
    PIXELS: lambda model: ImageCodecRun(RawImages()),
    PROMPT_TEXT: lambda model: WholeDocuments(),
    RESIDUAL: lambda model: WholeUpdate(),
    SOFT_PROMPT: lambda model: NoPrompt(),
    VISION_BLOCKS: lambda model: BlockRun(TokenReduction(), _prefix_of(model)),
    VISUAL_TOKENS: lambda model: AllPatches(),
    VOXELS: lambda model: VoxelCodecRun(RawSamples()),
    WAVEFORM: lambda model: WaveformCodecRun(RawSamples()),
}


def _prefix_of(model: Model) -> int:
    """Prefix tokens of the vision encoder: as the geometry says, or those before the patches of a tower."""
    if "prefix" in model.info.geometry:
        return int(model.info.geometry["prefix"])
    return int(getattr(model, "vision").prefix)  # noqa: B009 - of vision-language models
