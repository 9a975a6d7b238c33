"""Toy methods, one for each thing that methods to come need of the house; none takes more than 60 lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.methods.base import Method
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.residual import RESIDUAL, ResidualPolicy
from isoflop.models.hooks.signals import Coded
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, BlockRun, Signals, TokenReduction, TokenState
from isoflop.models.hooks.visual_tokens import CompressedTokens, VisualInput
from isoflop.models.hooks.waveform import WAVEFORM, WaveformCodec, WaveformCodecRun
from isoflop.models.training.taught import Teacher


class Routers(ResidualPolicy):
    """A router per layer: the share of tokens with the lowest logits keeps what it had before the layer."""

    def __init__(self, routers: nn.ModuleList, skip: float) -> None:
        self.routers, self.skip = routers, skip

    def tensors(self) -> list[Tensor]:
        return list(self.routers.parameters())

    def update(self, layer: int, before_BTd: Tensor, after_BTd: Tensor) -> Tensor:
        gate_BT1 = 1 + 0.2 * torch.tanh(self.routers[layer](before_BTd))
        skipped = int(self.skip * before_BTd.shape[1])
        order_BT = gate_BT1[..., 0].argsort(dim=-1, stable=True)
        runs_BT = torch.ones_like(gate_BT1[..., 0], dtype=torch.bool).scatter(1, order_BT[:, :skipped], False)
        return torch.where(runs_BT[..., None], before_BTd + gate_BT1 * (after_BTd - before_BTd), before_BTd)


@dataclass(frozen=True)
class SkipsLayers(Method):
    """Mixture of depths: trained routers decide which tokens skip a decoder layer."""

    name: ClassVar[str] = "toy-skip"
    family: ClassVar[str] = "toys"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (RESIDUAL,)
    trains_model: ClassVar[bool] = True

    skip: Annotated[float, Knob(low=0.0, high=0.9, ratio=True, doc="share of the tokens that skip")] = 0.5

    def build(self, info: ModelInfo) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(info.geometry["width"], 1) for _ in range(info.geometry["layers"]))

    def occupants(self, model: Model, prepared: Any) -> Mapping[Hook[Any], Occupant]:
        module = self.module_of(model, prepared)
        assert isinstance(module, nn.ModuleList)
        return {RESIDUAL: Routers(module, self.skip)}


class Slimming(TokenReduction):
    """Patches become fewer behind a block: soft combinations by learned weights."""

    def __init__(self, weight_MP: Tensor, block: int) -> None:
        self.weight_MP, self.block = weight_MP, block

    def after_block(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        if block != self.block:
            return state
        patches_BMC = self.weight_MP.softmax(-1) @ state.x_BNC[:, state.prefix :]
        return replace(state, x_BNC=torch.cat((state.x_BNC[:, : state.prefix], patches_BMC), dim=1))


class Weights(nn.Module):
    """One matrix."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(rows, columns))


@dataclass(frozen=True)
class Slims(Method):
    """A self-slimmed ViT in small: trained inside the blocks, following the model that was trained without it."""

    name: ClassVar[str] = "toy-slim"
    family: ClassVar[str] = "toys"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (VISION_BLOCKS,)
    trains_model: ClassVar[bool] = True

    tokens: Annotated[int, Knob(low=1, high=64, ratio=True, doc="patches behind the first block")] = 8

    @property
    def teacher(self) -> Teacher:
        return Teacher("trained", weight=0.25, temperature=2.0)

    def build(self, info: ModelInfo) -> Weights:
        return Weights(self.tokens, info.geometry["patches"])

    def occupants(self, model: Model, prepared: Any) -> Mapping[Hook[Any], Occupant]:
        module = self.module_of(model, prepared)
        assert isinstance(module, Weights)
        return {VISION_BLOCKS: BlockRun(Slimming(module.matrix, 0), model.info.geometry["prefix"])}


@dataclass(frozen=True)
class Stages(VisualTokenMethod):
    """LLaVolta in small: heavy pooling in the first third of the training, light in the second, none in the last."""

    name: ClassVar[str] = "toy-stages"

    tokens: Annotated[int, Knob(low=1, high=36, ratio=True, doc="V")] = 36

    def tokens_left(self, grid: int) -> int:
        return self.tokens

    def as_trained(self) -> Stages:
        return Stages()

    def budgets(self, step: int, steps: int, seed: int) -> Sequence[tuple[float, Stages]]:
        return ((1.0, Stages((4, 9, 36)[3 * step // steps])),)

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        return CompressedTokens(view.x_BPD.unflatten(1, (self.tokens, -1)).mean(2))


@dataclass(frozen=True)
class Nested(Stages):
    """Matryoshka in small: every step trains all budgets at once."""

    name: ClassVar[str] = "toy-nested"

    def budgets(self, step: int, steps: int, seed: int) -> Sequence[tuple[float, Nested]]:
        return tuple((1 / 3, Nested(tokens)) for tokens in (4, 9, 36))

    def as_trained(self) -> Nested:
        return Nested()


class EightBits(WaveformCodec):
    """Every sample's upper byte."""

    def encode(self, sound_BCT: Tensor) -> list[Coded]:
        upper = (sound_BCT.int() + 32768) >> 8
        return [Coded(np.uint8(len(x)).tobytes() + x.to(torch.uint8).numpy().tobytes(), 1) for x in upper]

    def decode(self, data: Sequence[bytes]) -> Tensor:
        sounds = [torch.from_numpy(np.frombuffer(d, np.uint8, offset=1).copy()).view(d[0], -1) for d in data]
        return ((torch.stack(sounds).int() << 8) + 128 - 32768).to(torch.int16)


@dataclass(frozen=True)
class HalfTheSamples(Method):
    """A codec on waveforms."""

    name: ClassVar[str] = "toy-sound"
    family: ClassVar[str] = "toys"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (WAVEFORM,)

    def occupants(self, model: Model, prepared: Any) -> Mapping[Hook[Any], Occupant]:
        return {WAVEFORM: WaveformCodecRun(EightBits())}
