"""Methods that drop visual tokens inside the language model: the first K layers see all of them, later ones see some.

The base class owns the hook point. Pre-hooks on the decoder's layers cut hidden states, rotary embeddings, positions and
masks to the tokens that stay; every token keeps the position it had. The attention slot sees shorter calls from layer K
on, so that methods on the KV cache compress what is left.

Shape suffixes: B batch, V visual tokens, L tokens of the prompt, K tokens that stay, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.methods.vision_language import vlm_info, vlm_model
from isoflop.models.base import Model, ModelInfo
from isoflop.models.taps import Tap
from isoflop.models.vlm import PromptLayout, VlmModel

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
    slot: ClassVar[str] = "decoder-tokens"
    needs: ClassVar[frozenset[str]] = frozenset({"visual-tokens", "attention"})
    order: ClassVar[int] = 20

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

    def check(self, info: ModelInfo) -> None:
        """Refuse layers that the decoder does not have, and shares that leave no visual token.

        A share that rounds to no token dropped is the identity.
        """
        super().check(info)
        layers, tokens = (vlm_info(info).geometry[name] for name in ("layers", "visual_tokens"))
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

    @contextmanager
    def apply(self, model: Model, prepared: Any) -> Iterator[None]:
        """Hook the decoder's layers."""
        self.check(model.info)
        vlm = vlm_model(model)
        if vlm.dropping is not None:
            raise Infeasible(f"method {self.name}: another method drops tokens in the decoder already")
        dropping = Dropping(self, vlm)
        with dropping.hooked():
            vlm.dropping = dropping
            try:
                yield
            finally:
                vlm.dropping = None

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """``ratio``: visual tokens without dropping over their mean over the layers, from the last pass."""
        dropping = vlm_model(model).dropping
        if not isinstance(dropping, Dropping):
            raise ValueError(f"method {self.name} is not applied")
        return {"ratio": dropping.entering / dropping.mean_tokens, "layer_visual_tokens": dropping.mean_tokens}

    @classmethod
    def probe(cls) -> Probe:
        """An untrained model with three decoder layers."""
        from isoflop.methods.decoder_tokens.probe import DecoderTokenProbe

        return DecoderTokenProbe()


class Dropping:
    """A method at work in a decoder (``VlmModel.dropping``); acts on prompts and leaves every other pass alone.

    Attributes:
        per_layer: visual tokens that each layer processed in the last pass over a prompt.
    """

    def __init__(self, method: DecoderTokenMethod, model: VlmModel) -> None:
        self.method, self.model = method, model
        self.per_layer: list[int] = []
        self._prompt: PromptLayout | None = None
        self._kept_BK: Tensor | None = None
        self._tap = Tap(model.decoder.layers[method.layer - 1].self_attn)

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
    def hooked(self) -> Iterator[None]:
        """Hooks in place inside the block."""
        with ExitStack() as stack:
            stack.enter_context(self._tap.listening())
            for number, layer in enumerate(self.model.decoder.layers):
                hook = partial(self._before, number)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def prompt(self, layout: PromptLayout) -> Iterator[None]:
        """The pass inside the block is over a prompt."""
        self._prompt, self.per_layer = layout, []
        try:
            yield
        finally:
            self._prompt = self._kept_BK = None

    def _before(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prompt = self._prompt
        if prompt is None:
            return None
        hidden = args[0]
        if number == self.method.layer:
            self._kept_BK = self._choose(prompt, kwargs)
            if self._kept_BK is not None:
                hidden = rows_of(hidden, self._kept_BK)
                self._move_prefix(self._kept_BK)
        self.per_layer.append(hidden.shape[1] - prompt.image_BL.shape[1] + prompt.count)
        if self._kept_BK is None:
            return None
        return (hidden, *args[1:]), cut(kwargs, self._kept_BK)

    def _choose(self, prompt: PromptLayout, kwargs: dict[str, Any]) -> Tensor | None:
        """Columns of the prompt that stay, ascending, (B, K); None for all of them."""
        left = self.method.tokens_left(prompt.count)
        if left == prompt.count:
            return None
        columns_BV = prompt.image_BL.nonzero()[:, 1].view(-1, prompt.count)

        def attention() -> Tensor:
            row_BHL = self._tap.last_row(kwargs["position_embeddings"], prompt.valid_BL)
            return row_BHL.mean(1).gather(1, columns_BV)

        kept_BN = self.method.kept(Candidates(prompt.ids_B, prompt.count, attention), left)
        stays_BL = ~prompt.image_BL
        stays_BL = stays_BL.scatter(1, columns_BV.gather(1, kept_BN), True)
        return stays_BL.nonzero()[:, 1].view(len(stays_BL), -1)

    def _move_prefix(self, kept_BK: Tensor) -> None:
        """Tell the attention policy how much of its prefix is left; the prompt's end restores it."""
        policy = self.model.attention
        if policy is None or policy.prefix is None:
            return
        left_B = (kept_BK < policy.prefix).sum(1)
        if not bool((left_B == left_B[0]).all()):
            raise ValueError("the prompts of a batch must keep as many tokens before the question")
        policy.prefix = int(left_B[0])


def rows_of(x: Tensor, kept_BK: Tensor) -> Tensor:
    """Rows of (B or 1, L, …) that stay, (B, K, …)."""
    x = x.expand(len(kept_BK), *x.shape[1:])
    index = kept_BK.view(*kept_BK.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def cut(kwargs: dict[str, Any], kept_BK: Tensor) -> dict[str, Any]:
    """A decoder layer's keyword arguments for the tokens that stay."""
    cos, sin = kwargs["position_embeddings"]
    found = {**kwargs, "position_embeddings": (rows_of(cos, kept_BK), rows_of(sin, kept_BK))}
    if kwargs.get("position_ids") is not None:
        found["position_ids"] = rows_of(kwargs["position_ids"], kept_BK)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        found["attention_mask"] = rows_of(mask, kept_BK) if mask.dim() == 2 else _cut_square(mask, kept_BK)
    return found


def _cut_square(mask_B1LL: Tensor, kept_BK: Tensor) -> Tensor:
    rows_BKL = rows_of(mask_B1LL[:, 0], kept_BK)
    return rows_BKL.gather(2, kept_BK[:, None].expand(-1, kept_BK.shape[1], -1))[:, None]
