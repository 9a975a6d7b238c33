"""MiniCache: pairs of layers share the directions of their keys and values (arXiv 2405.14366).

The authors' repository holds no code; equations are the paper's. Its condition for what is not merged is printed the other way
round than its text describes it, and both readings are values of a knob.

Shape suffixes: B batch, G key-value heads, N tokens, D head width, M query rows of a key-value head, R retained tokens of all
rows and heads, in their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.kv_cache.base import KvCacheMethod, empty_recent, full_layers, whole_prompt
from isoflop.methods.kv_cache.layer_pairs import OwnPart, Pair, PairPart, PairSegment, angles, between
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, Segment, attend_segments

if TYPE_CHECKING:
    from isoflop.methods.kv_cache.probe import KvCacheProbe

SLERP, AVERAGE = "slerp", "average"


@METHODS.register("minicache")
@dataclass(frozen=True)
class MiniCache(KvCacheMethod):
    """Of two adjacent layers in the upper part of the model, one direction per token is kept, and the norms of both.

    The direction lies between those of the two layers on the sphere they share. Tokens whose directions are furthest apart are
    kept as they are, in both layers. A new token is merged when both layers have read it exactly. Layers that have no pair stay
    whole. Keys are merged behind RoPE, which turns both layers by the same angle.
    """

    paper: ClassVar[str] = "arXiv 2405.14366"
    version: ClassVar[str] = "2"  # the limits of heads are counted
    spans_layers: ClassVar[bool] = True

    start: Annotated[float, Knob(low=0.0, high=1.0, ratio=True, doc="share of the layers below the first merged pair")] = 0.5  # fmt: skip
    gamma: Annotated[float, Knob(low=0.0, high=1.0, doc="part of the range of angles, from the widest on, whose tokens are kept as they are; 1 keeps all")] = 0.05  # fmt: skip
    t: Annotated[float, Knob(low=0.0, high=1.0, doc="where between the lower (0) and the upper layer (1) the shared direction lies")] = 0.6  # fmt: skip
    mode: Annotated[str, Knob(choices=(SLERP, AVERAGE), doc="spherical interpolation with both norms, or the plain mean for both layers")] = SLERP  # fmt: skip
    what: Annotated[str, Knob(choices=("kv", "k", "v"), doc="what is merged")] = "kv"
    retain: Annotated[str, Knob(choices=("distinct", "similar"), doc="tokens kept as they are: those far apart, or the printed condition, which keeps those that are alike")] = "distinct"  # fmt: skip
    merge_new: Annotated[bool, Knob(doc="merge tokens behind the prompt, too; each then takes a pass of its own")] = True  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """No layer merged."""
        return cls(start=1.0)

    @classmethod
    def probe(cls) -> KvCacheProbe:
        """A decoder of four layers, whose upper two are a pair."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        return KvCacheProbe(layers=4)

    @property
    def merges_later(self) -> bool:
        """The knob ``merge_new``."""
        return self.merge_new and self.start < 1

    def axes(self, info: ModelInfo) -> Axes:
        """All layers over those that are left, norms and kept tokens left out."""
        layers = len(full_layers(info))
        saved = len(self.pairs(full_layers(info))) * (1 if self.what == "kv" else 0.5)
        return Axes(ratio=layers / (layers - saved))

    def check(self, info: ModelInfo) -> None:
        """Refuse a start behind which there is no pair."""
        super().check(info)
        layers = len(full_layers(info))
        if self.start < 1 and not self.pairs(full_layers(info)):
            raise Infeasible(
                f"method minicache: start = {self.start:g} leaves no pair of the {layers} layers that attend to all tokens; allowed: "
                f"{f'up to {math.floor(1000 * (layers - 2) / layers) / 1000:g}, or ' if layers > 1 else ''}1 for none on purpose"
            )

    def pairs(self, layers: list[int]) -> list[tuple[int, int]]:
        """Adjacent layers from ``start`` on, lower and upper, the last one always among them; an odd one below stays alone."""
        upper = layers[math.floor(self.start * len(layers) + 0.5) :]
        upper = upper[len(upper) % 2 :]
        return list(zip(upper[::2], upper[1::2], strict=True))

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """The prompt as it is, until all layers have seen it."""
        return LayerStore([whole_prompt(prompt)], empty_recent(prompt))

    def read(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Over shared directions with the layer's own norms."""
        return attend_segments(query.q_BHTD, store.all(), query.softmax, query.order_BT)[0]

    def stride(self, store: LayerStore) -> int | None:
        """One token, where new ones are merged."""
        return 1 if self.merges_later else None

    def merge(self, stores: dict[int, LayerStore], prepared: Any) -> None:
        """Merge the prompt, or the tokens that have come since, of every pair of layers."""
        for lower, upper in self.pairs(sorted(stores)):
            layers = stores[lower], stores[upper]
            first = layers[0].segments[0]
            if isinstance(first, PairSegment):
                pair = first.pair
                if layers[0].recent.tokens:
                    pair.append(self._merged([store.recent for store in layers], pair))
                    for store in layers:
                        store.recent = _emptied(store.recent)
            else:
                pair = self._merged([store.segments[0] for store in layers], None)
            for side, store in enumerate(layers):
                store.segments = [pair.segment(side)]

    def _merged(self, layers: list[Segment], before: Pair | None) -> Pair:
        """Two layers' tokens as one pair; ``before`` has the limits that tokens behind a prompt go by."""
        lower, upper = layers
        assert isinstance(lower, DenseSegment)
        assert isinstance(upper, DenseSegment)
        parts: dict[str, PairPart | OwnPart] = {}
        devices = lower.k_BGND.device, upper.k_BGND.device
        for name, x_BGND, y_BGND in (("k", lower.k_BGND, upper.k_BGND), ("v", lower.v_BGND, upper.v_BGND)):
            y_BGND = y_BGND.to(devices[0])
            if name not in self.what:
                parts[name] = OwnPart([x_BGND, y_BGND])
                continue
            known = None if before is None else getattr(before, name).limits_BG
            parts[name] = self._part(x_BGND, y_BGND, lower.log_bias_BGN, known)
        return Pair(parts["k"], parts["v"], lower.positions_BGN, lower.log_bias_BGN, devices)

    def _part(
        self, lower_BGND: Tensor, upper_BGND: Tensor, bias_BGN: Tensor | None, limits_BG: Tensor | None
    ) -> PairPart:
        angle_BGN = angles(lower_BGND, upper_BGND)
        real_BGN = torch.ones_like(angle_BGN, dtype=torch.bool) if bias_BGN is None else bias_BGN == 0
        limits_BG = self._limits(angle_BGN, real_BGN) if limits_BG is None else limits_BG
        far = angle_BGN >= limits_BG[..., None] if self.retain == "distinct" else angle_BGN <= limits_BG[..., None]
        kept_BGN = far & real_BGN
        both = [lower_BGND, upper_BGND]
        norms = [x.float().norm(dim=-1).to(x.dtype) for x in both] if self.mode == SLERP else None
        shared_BGND = between(lower_BGND, upper_BGND, self.t) if self.mode == SLERP else (lower_BGND + upper_BGND) / 2
        owner_R, place_R = kept_BGN.flatten(0, 1).nonzero().int().unbind(1)
        exceptions = owner_R.clone(), place_R.clone(), [x[kept_BGN] for x in both]
        return PairPart(shared_BGND, norms, *exceptions, limits_BG if self.merges_later else None)

    def _limits(self, angle_BGN: Tensor, real_BGN: Tensor) -> Tensor:
        """The angle of each head from which on tokens are kept, or up to which: D_max - γ (D_max - D_min), or the other way round.

        Where all angles are the same nothing is far apart, and nothing is kept but by γ = 1.
        """
        widest_BG = angle_BGN.masked_fill(~real_BGN, -torch.inf).amax(-1)
        least_BG = angle_BGN.masked_fill(~real_BGN, torch.inf).amin(-1)
        if self.gamma >= 1:
            return torch.full_like(widest_BG, -torch.inf if self.retain == "distinct" else torch.inf)
        span_BG = widest_BG - least_BG
        if self.retain == "distinct":
            return (widest_BG - self.gamma * span_BG).masked_fill(span_BG == 0, torch.inf)
        return (least_BG + self.gamma * span_BG).masked_fill(span_BG == 0, -torch.inf)


def _emptied(recent: DenseSegment) -> DenseSegment:
    """A segment without tokens, to which later ones are added; it keeps none of the old one's tensors alive."""
    return DenseSegment(
        recent.positions_BGN[:, :, :0].clone(),
        None,
        *(torch.empty_like(x[:, :, :0]) for x in (recent.k_BGND, recent.v_BGND)),
    )
