"""Methods that drop visual tokens inside the language model: the first K layers see all of them, later ones see some.

The base class owns what sits in the hook ``decoder_layers``.

Shape suffixes: B batch, V visual tokens, L tokens of the prompt.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import Axes, Method
from isoflop.methods.vision_language import vlm_info, vlm_model
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS, LayerChange, LayerTokens, TokenPolicy
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.metering import metered
from isoflop.models.taps import Tap, attention_in
from isoflop.models.vlm import VlmModel

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class Candidates:
    """What a method chooses from.

    Attributes:
        ids_B: example numbers.
        count: V, visual tokens of each prompt.
        attention: attention (B, V) that they get from the last prompt token in layer K - 1, mean over the heads.
    """

    ids_B: Tensor
    count: int
    attention: Callable[[], Tensor]


@dataclass(frozen=True)
class DecoderTokenMethod(Method):
    """Base class of methods that drop a share of the visual tokens before one decoder layer."""

    family: ClassVar[str] = "decoder-tokens"
    ratio_of: ClassVar[str] = "visual tokens, mean over layers"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (DECODER_LAYERS,)

    drop: Annotated[
        float,
        Knob(low=0.0, high=1.0, ratio=True, doc="share of the visual tokens that go, rounded down; one at least stays"),
    ] = 0.5
    layer: Annotated[int, Knob(low=1, high=127, doc="K: the decoder layer, counted from 0, before which they go")] = 2

    @abstractmethod
    def kept(self, candidates: Candidates, count: int) -> Tensor:
        """Numbers of the ``count`` visual tokens that stay, ascending, (B, count)."""

    @classmethod
    def identity(cls, info: ModelInfo) -> Method | None:
        """Nothing is dropped."""
        return cls(drop=0.0, layer=info.geometry["layers"] - 1) if info.geometry["layers"] > 1 else None

    def tokens_left(self, count: int) -> int:
        """How many of ``count`` visual tokens stay."""
        return count - int(count * self.drop + 1e-9)

    def axes(self, info: ModelInfo) -> Axes:
        """Visual tokens of each layer where all of them enter the decoder, and all over their mean."""
        vlm = vlm_info(info)
        layers, tokens = vlm.geometry["layers"], vlm.tokens_of_image()
        each = tuple(float(tokens if n < self.layer else self.tokens_left(tokens)) for n in range(layers))
        return Axes(visual_tokens=each, ratio=tokens * layers / sum(each))

    def check(self, info: ModelInfo) -> None:
        """Refuse layers that the decoder does not have, and shares that leave no visual token.

        A share that rounds to no token dropped is the identity.
        """
        super().check(info)
        vlm = vlm_info(info)
        layers, tokens = vlm.geometry["layers"], vlm.tokens_of_image()
        if self.layer >= layers:
            works = f"1 … {layers - 1}" if layers > 1 else "none, it has one layer"
            raise Infeasible(
                f"method {self.name}: layer = {self.layer} is not inside the {layers} decoder layers of {info.ref}; "
                f"allowed: {works}"
            )
        if self.tokens_left(tokens) < 1:
            raise Infeasible(
                f"method {self.name}: drop = {self.drop:g} leaves none of the {tokens} visual tokens of {info.ref}; "
                "allowed: every share below 1, which leaves at least one"
            )

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """What drops the tokens."""
        return {DECODER_LAYERS: Dropping(self, vlm_model(model))}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """``ratio``: visual tokens without dropping over their mean over the layers, in the pass that was metered last.

        Of the last pass where there was no meter.
        """
        dropping = model.occupant(DECODER_LAYERS)
        if not isinstance(dropping, Dropping):
            raise ValueError(f"method {self.name} is not applied")
        read = metered(model, DECODER_LAYERS)
        entering, mean = (dropping.entering, dropping.mean_tokens) if read is None else (read[0], sum(read) / len(read))
        return {"ratio": entering / mean, "layer_visual_tokens": mean}

    @classmethod
    def probe(cls) -> Probe:
        """An untrained model with three decoder layers."""
        from isoflop.methods.decoder_tokens.probe import DecoderTokenProbe

        return DecoderTokenProbe()


class Dropping(TokenPolicy):
    """A method at work in a decoder."""

    def __init__(self, method: DecoderTokenMethod, model: VlmModel) -> None:
        super().__init__(model)
        self.method = method
        self._tap = Tap(attention_in(model.decoder_layers[method.layer - 1]))

    @property
    def entering(self) -> float:
        """Visual tokens in the first layer. Raises ValueError when nothing has run yet."""
        if not self.per_layer:
            raise ValueError(f"method {self.method.name}: no prompt has been run yet")
        return float(self.per_layer[0])

    @property
    def mean_tokens(self) -> float:
        """Visual tokens per layer."""
        return sum(self.per_layer) / len(self.per_layer)

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """Also a tap on the layer whose attention may be asked for."""
        with self._tap.listening(), super().at_work(model):
            yield

    def change(self, tokens: LayerTokens) -> LayerChange | None:
        """The method's choice before its layer."""
        prompt = tokens.layout
        left = self.method.tokens_left(prompt.count)
        if tokens.layer != self.method.layer or left == prompt.count:
            return None
        columns_BV = prompt.image_BL.nonzero()[:, 1].view(-1, prompt.count)

        def attention() -> Tensor:
            row_BHL = self._tap.last_row(tokens.kwargs.get("position_embeddings"), prompt.valid_BL, prompt.end)
            return row_BHL.mean(1).gather(1, columns_BV)

        kept_BN = self.method.kept(Candidates(prompt.ids_B, prompt.count, attention), left)
        stays_BL = ~prompt.image_BL
        stays_BL = stays_BL.scatter(1, columns_BV.gather(1, kept_BN), True)
        return LayerChange(stays_BL.nonzero()[:, 1].view(len(stays_BL), -1))
