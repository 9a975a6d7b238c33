"""The hook ``visual_tokens``: a compressor between the vision tower and the projector, what it sees and what it returns.

A picture may have several views (crops, a thumbnail): each is compressed by itself, as a row of the batch.

Shape suffixes: B views of a batch, P patches, V visual tokens that enter the language model, Q question tokens, D vision width, d
language width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.core.stage import Stage
from isoflop.models.features import LayerKey
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.training.taught import Taught

TextEncoder = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class VisualInput:
    """What a compressor sees of a batch.

    Attributes:
        x_BPD: what enters the projector, in raster order: patch features of a layer of the tower without prefix tokens, or
            blocks of patches side by side where a class merges them.
        hidden: what the compressor asked for besides: the same of other layers, by their numbers, and attention (B, P)
            by ``attention_in(layer)``.
        grid: patches per side; P = grid². Where pictures keep their own shape, grid² is the largest square up to P.
        question_BQ: token ids of the question, the text after the last image marker; None when there is none.
        question_mask_BQ: 1 for real tokens and 0 for padding (either side); None when nothing is padded.
        ids_B: example numbers, other ones for other views; what is random in a method may depend on them and on nothing else
            of the batch.
        encode_text: the language model on text alone, without gradients and without a cache: (ids, mask) → (B, Q, d),
            last layer after the final norm.
        embed_text: ids → token embeddings (B, Q, d), without gradients.
        square: whether pictures do not keep their own shape.
    """

    x_BPD: Tensor
    hidden: Mapping[LayerKey, Tensor]
    grid: int
    question_BQ: Tensor | None
    question_mask_BQ: Tensor | None
    ids_B: Tensor
    encode_text: TextEncoder
    embed_text: Callable[[Tensor], Tensor]
    square: bool = True


@dataclass(frozen=True)
class CompressedTokens:
    """What a compressor returns.

    Attributes:
        tokens_BVD: input of the projector.
        kept_BV: numbers of the patches that were kept, sorted, for methods that select; None for those that mix.
        places_BV: places that the tokens take among the P places of the image in the prompt, text behind it staying
            where it was; None for V places in a row.
        question_BQd: embeddings that the language model reads in place of those of ``VisualInput.question_BQ``, the text
            right behind the image (LLaVA-Mini fuses the image into them); padding is skipped. None where the question
            stays as it is.
        deep: what is added to the tokens behind the decoder's first layers, (B, V, d) each; the model sees to it.
    """

    tokens_BVD: Tensor
    kept_BV: Tensor | None = None
    places_BV: Tensor | None = None
    question_BQd: Tensor | None = None
    deep: tuple[Tensor, ...] = ()


class Compression(Occupant):
    """The occupant: a compressor between the vision tower and the projector.

    Attributes:
        layers: what it reads of the tower besides the model's own feature layer.
        module: its own weights.
        projector: a projector trained together with it, used instead of the model's.
    """

    layers: tuple[LayerKey, ...] = ()
    module: nn.Module | None = None
    projector: nn.Module | None = None

    def tensors(self) -> Sequence[Tensor]:
        """Those of ``module``."""
        return [] if self.module is None else list(self.module.state_dict().values())

    @abstractmethod
    def __call__(self, view: VisualInput) -> CompressedTokens:
        """Compress a batch."""


class Looking(Compression):
    """An occupant that compresses nothing and keeps what it saw.

    Args:
        layers: what it reads of the tower.
    """

    def __init__(self, layers: tuple[LayerKey, ...]) -> None:
        self.layers = layers
        self.seen: VisualInput | None = None

    def __call__(self, view: VisualInput) -> CompressedTokens:
        """The features as they are."""
        self.seen = view
        return CompressedTokens(view.x_BPD)


class TaughtCompressor(Taught, Protocol):
    """A method of this hook as a training sees it.

    Attributes:
        commutes: the result does not change when the features are shifted and scaled per channel before instead of after.
    """

    commutes: ClassVar[bool]

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        """Compress a batch; gradients flow when they are enabled."""

    def projector(self, module: nn.Module | None) -> nn.Module | None:
        """The part of ``module`` that takes the place of the model's projector; None where the model's stays."""

    def layers(self, info: Any) -> tuple[LayerKey, ...]:
        """What ``compress`` reads of the tower besides the features that feed the projector."""

    def fit_inputs(self, module: nn.Module, view: VisualInput) -> None:
        """Set what ``module`` derives from data (input statistics) from a sample of the training images."""


@dataclass(frozen=True)
class AllTokens:
    """The training without a compressor; in keys of stages it goes by the name of the method that does nothing."""

    name: ClassVar[str] = "none"
    version: ClassVar[str] = "1"
    hooks: ClassVar[tuple[Hook[Any], ...]] = ()
    trains_model: ClassVar[bool] = True
    commutes: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    special_training: ClassVar[bool] = False
    teacher: ClassVar[None] = None

    def as_field(self) -> tuple[Any, ...]:
        """Name and version; no knobs."""
        return self.name, self.version, ()

    def as_trained(self) -> AllTokens:
        """Itself."""
        return self

    def idle(self, info: Any) -> bool:
        """Never: a training has it in place of a compressor."""
        return False

    def trains(self, parameter: str) -> bool:
        """Everything."""
        return True

    def untrained(self, info: Any, seed: int) -> None:
        """No weights."""

    def budgets(self, step: int, steps: int, seed: int) -> Sequence[tuple[float, AllTokens]]:
        """Always the same."""
        return ((1.0, self),)

    def occupants(self, model: Any, prepared: Any) -> Mapping[Hook[Any], Occupant]:
        """None."""
        return {}

    def extra_loss(self, model: Any, occupants: Mapping[Hook[Any], Occupant]) -> None:
        """None."""

    def check(self, info: Any) -> None:
        """Always possible."""

    def prepare(self, info: Any, weights: Stage | None, seed: int, trained_with: tuple[Any, ...] = ()) -> None:
        """Nothing."""

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        """The features as they are."""
        return CompressedTokens(view.x_BPD)

    def projector(self, module: nn.Module | None) -> None:
        """The model's own."""

    def layers(self, info: Any) -> tuple[LayerKey, ...]:
        """None."""
        return ()

    def fit_inputs(self, module: nn.Module, view: VisualInput) -> None:
        """Nothing to fit."""


VISUAL_TOKENS: Hook[Compression] = Hook(
    "visual_tokens", 10, "turns the patch features of an image into fewer tokens for the language model"
)
