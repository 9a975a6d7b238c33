"""Vision-transformer token methods: the base class that owns what sits in the hook ``vision_blocks``.

A method says which tokens go and how they merge; the base class says how many: a schedule over the blocks, either in
the paper's own terms or solved for a budget of MACs, so that methods compare at equal cost.

Shape suffixes: B batch, N tokens of a block's input (prefix tokens first), T patches among them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import Axes, Method
from isoflop.methods.vit_tokens.schedule import SHAPES, largest_amount, model_macs, removals, within_budget
from isoflop.models.base import Model, ModelInfo
from isoflop.models.counting import flops_of
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, BlockRun, Signals, TokenReduction, TokenState, log_sizes
from isoflop.models.vit import VitInfo, VitModel

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class VitTokenMethod(Method):
    """Base class of methods that remove tokens inside the blocks of a vision transformer.

    ``macs`` is the ratio knob of the whole family: the share of the dense model's multiply-adds that an image may cost,
    scoring included; the dearest schedule within it is taken. Instead of it a method may be given the number that its
    paper uses: ``ratio``, the share of patches that a block keeps; ``macs`` then counts for nothing. Two numbers for one
    schedule are refused; only ``macs`` at its default counts as not given, since nobody can tell the two apart. The
    blocks' counts are the same for every image. A head that averages patches weights merged ones by size, and attention that pools
    them adds log sizes where a method's own attention does.

    Class attributes:
        after_block: tokens go after the MLP of a block instead of between attention and MLP.
    """

    family: ClassVar[str] = "vit-tokens"
    ratio_of: ClassVar[str] = "multiply-adds"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (VISION_BLOCKS,)
    after_block: ClassVar[bool] = False

    macs: Annotated[
        float, Knob(low=0.05, high=1.0, ratio=True, doc="share of the dense model's multiply-adds, scoring included")
    ] = 0.7
    ratio: Annotated[
        float,
        Knob(low=0.0, high=1.0, doc="share of the patches that the first block keeps; 0 leaves it to macs"),
    ] = 0.0
    schedule: Annotated[
        str,
        Knob(
            choices=SHAPES,
            doc="every block keeps the same share, removes the same number, or ever fewer down to none",
        ),
    ] = "ratio"

    @classmethod
    def identity(cls, info: ModelInfo) -> VitTokenMethod:
        """All multiply-adds, nothing removed."""
        return cls(macs=1.0)

    @property
    def proportional(self) -> bool:
        """Whether later attention counts a token as often as it has members (log size added to the logits)."""
        return False

    @abstractmethod
    def most(self, patches: int) -> int:
        """The most tokens that a block may remove from so many patches."""

    @abstractmethod
    def scoring_macs(self, geometry: Any, patches: int, removed: int) -> int:
        """MACs of scoring in a block that removes something (products with tensors only, as the counter counts)."""

    @abstractmethod
    def reduce(self, state: TokenState, signals: Signals, block: int, count: int, layers: int) -> TokenState:
        """Remove ``count`` > 0 tokens from every image of the batch."""

    def amount(self, patches: int, ref: str) -> float | None:
        """The schedule's number in the paper's own terms (see ``removals``), or None to solve it for ``macs``.

        Args:
            patches: of the model, whose name for messages is ``ref``.

        Raises:
            Infeasible: more than a block may remove, or a number beside a budget.
        """
        if self.ratio == 0:
            return None
        lowest = rounded_up(1 - largest_amount(self.schedule, patches, self.most) / patches - 1e-12, 4)
        return self.native("ratio", self.ratio, patches * (1 - self.ratio), patches, ref, f"{lowest:g} … 1")

    def native(self, knob: str, value: float, amount: float, patches: int, ref: str, allowed: str) -> float:
        """``amount``, the meaning of a knob in the paper's own terms, when it can be done and no budget stands beside it."""
        if self.macs != VitTokenMethod.macs:
            raise Infeasible(
                f"method {self.name}: macs = {self.macs:g} and {knob} = {value:g} both set the schedule; give one of them"
            )
        if amount > largest_amount(self.schedule, patches, self.most) + 1e-9:
            raise Infeasible(
                f"method {self.name}: {knob} = {value:g} removes more tokens than a block can on {ref} with schedule "
                f"{self.schedule!r}; allowed: {allowed}, or 0 to leave it to macs"
            )
        return amount

    def plan(self, info: VitInfo) -> tuple[int, ...]:
        """Tokens removed in each block. Raises Infeasible, naming the knob and what would work."""
        return _plan(self, info.ref, tuple(sorted(info.geometry.items())))

    def axes(self, info: ModelInfo) -> Axes:
        """Dense multiply-adds over those of the schedule, scoring included."""
        vit = vit_info(info)
        geometry, plan = vit.geometry, self.plan(vit)
        planned = model_macs(geometry, plan, partial(self.scoring_macs, geometry), self.after_block)
        return Axes(ratio=model_macs(geometry, (0,) * geometry["layers"]) / planned)

    def check(self, info: ModelInfo) -> None:
        """Refuse models without the hook, and schedules that they rule out."""
        super().check(info)
        self.plan(vit_info(info))

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """A reduction in every forward pass of the model."""
        vit = vit_model(model)
        return {VISION_BLOCKS: BlockRun(InPlace(self, self.plan(vit.info)), vit.info.geometry["prefix"])}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """``ratio`` is the dense model's multiply-adds over those counted on the live model for one image.

        ``macs_share`` is its inverse, ``scoring_macs`` the method's own part; ``patches_removed`` go in all blocks
        together, and ``first_block_keeps`` is the share that ``ratio`` sets, also when it was solved for ``macs``.
        """
        vit = vit_model(model)
        side, channels = vit.info.geometry["image_side"], vit.info.geometry["channels"]
        counted = counted_macs(vit, torch.zeros(1, channels, side, side))
        dense = model_macs(vit.info.geometry, (0,) * vit.info.geometry["layers"])
        plan, patches = self.plan(vit.info), vit.info.geometry["patches"]
        return {
            "ratio": dense / counted,
            "macs_share": counted / dense,
            "scoring_macs": float(counted - model_macs(vit.info.geometry, plan, None, self.after_block)),
            "patches_removed": float(sum(plan)),
            "first_block_keeps": 1 - plan[0] / patches,
        }

    @classmethod
    def probe(cls) -> Probe:
        """An untrained tiny vision transformer on which the conformance suite runs."""
        from isoflop.methods.vit_tokens.probe import VitProbe

        return VitProbe()


@dataclass
class InPlace(TokenReduction):
    """A method with its schedule inside a model.

    Attributes:
        tracked: follow which original tokens went into which (``TokenState.source_BNM``).
    """

    method: VitTokenMethod
    plan: tuple[int, ...]
    tracked: bool = False

    def start(self, state: TokenState) -> TokenState:
        """With sources when they are tracked."""
        return state.tracked() if self.tracked else state

    def attention_bias(self, state: TokenState, block: int) -> Tensor | None:
        """Log sizes, when the method wants proportional attention and tokens have merged."""
        return log_sizes(state) if self.method.proportional else None

    def pooling_bias(self, state: TokenState) -> Tensor | None:
        """As in the blocks."""
        return log_sizes(state) if self.method.proportional else None

    def after_attention(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        """Remove the block's share here, unless the method does so after the block."""
        return state if self.method.after_block else self._reduce(state, signals, block)

    def after_block(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        """Remove the block's share here, if the method says so."""
        return self._reduce(state, signals, block) if self.method.after_block else state

    def _reduce(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        count = self.plan[block]  # where nothing goes, nothing is computed
        return self.method.reduce(state, signals, block, count, len(self.plan)) if count else state


@torch.no_grad()
def counted_macs(model: VitModel, images_BCHW: Tensor) -> float:
    """MACs per image of the model as it is now, without an image codec in front of it, by ``torch.utils.flop_counter``."""
    flops, _ = flops_of(lambda: model.classify(images_BCHW))
    return flops / 2 / len(images_BCHW)


def vit_info(info: ModelInfo) -> VitInfo:
    """``info`` as that of a vision transformer; Infeasible otherwise."""
    if not isinstance(info, VitInfo):
        raise Infeasible(
            f"model {info.ref} is no vision transformer for classification: vit-tokens methods do not apply"
        )
    return info


def vit_model(model: Model) -> VitModel:
    """``model`` as a vision transformer; Infeasible otherwise."""
    if not isinstance(model, VitModel):
        raise Infeasible(
            f"model {model.info.ref} is no vision transformer for classification: vit-tokens methods do not apply"
        )
    return model


def rounded_up(value: float, digits: int) -> float:
    """A bound for messages: never below ``value``, so that it is accepted when tried."""
    return math.ceil(value * 10**digits) / 10**digits


@lru_cache(maxsize=4096)
def _plan(method: VitTokenMethod, ref: str, geometry_items: tuple[tuple[str, Any], ...]) -> tuple[int, ...]:
    geometry = dict(geometry_items)
    patches, layers = geometry["patches"], geometry["layers"]
    amount = method.amount(patches, ref)
    if amount is not None:
        return removals(method.schedule, amount, patches, layers, method.most)

    def scoring(left: int, removed: int) -> int:
        return method.scoring_macs(geometry, left, removed)

    removed, least = within_budget(geometry, method.schedule, method.macs, method.most, scoring, method.after_block)
    if removed is None:
        raise Infeasible(
            f"method {method.name}: macs = {method.macs:g} is less than schedule {method.schedule!r} reaches on {ref}; "
            f"allowed: {min(1.0, rounded_up(least + 1e-12, 3)):g} … 1"
        )
    return removed
