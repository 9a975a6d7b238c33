"""ODP: tokens whose second expert hardly counts do without it (arXiv 2410.06270, section 3.3).

Shape suffixes: S scored tokens, W vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.experts.pruning import IMPORTANCES, PER_TOKEN, RECEIVED, Pruning, RatioNotes, pair_routers
from isoflop.models.base import Model, ModelInfo
from isoflop.models.decoder_model import decoder_model
from isoflop.models.hooks.experts import EXPERTS
from isoflop.models.lm import LmModel

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

GRID = np.linspace(0.0, 1.0, 1001)
"""Quantiles that are kept of a layer's ratios."""
_FILE = "ratios.json"


@dataclass
class RouterRatios:
    """Of a calibration.

    Attributes:
        quantiles: of w₁/w₀ over the tokens, at ``GRID``, by layer.
        losses: nats per token where only that layer prunes, by layer; empty where all layers prune.
    """

    quantiles: dict[int, list[float]]
    losses: dict[int, float] = field(default_factory=dict)

    def threshold(self, layer: int, quantile: float) -> float:
        """μ of a layer; beyond every ratio at 1, so that all second experts go."""
        return math.inf if quantile >= 1 else float(np.interp(quantile, GRID, self.quantiles[layer]))

    def chosen(self, share: float) -> list[int]:
        """The layers that prune: those that lose the least by it, at least one."""
        count = max(1, math.floor(share * len(self.quantiles) + 0.5))
        return sorted(sorted(self.quantiles, key=lambda layer: (self.losses.get(layer, 0.0), layer))[:count])

    def save(self, folder: Path) -> None:
        """Write them."""
        (folder / _FILE).write_text(json.dumps({"quantiles": self.quantiles, "losses": self.losses}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RouterRatios:
        """The inverse of :meth:`save`."""
        found = json.loads((folder / _FILE).read_text())
        return cls(*({int(layer): value for layer, value in found[name].items()} for name in ("quantiles", "losses")))


@METHODS.register("odp")
@dataclass(frozen=True)
class Odp(Method):
    """A token keeps its first expert alone where w₁/w₀, of the weights its router gives its two experts, is below μ.

    μ is a layer's own: the ``quantile`` of that ratio over calibration text, in the paper the median. The kept weight becomes 1
    where the router makes weights sum to 1, and stays where it does not. ``protect`` is the share of a text's tokens that keep
    both: those with the most ‖h‖₁ times the mean attention that they get from the tokens behind them, which says that a token's
    experts depend on what follows it in the same pass; where one token enters at a time, only the ratio counts. ``released``
    importance is what the released code computes: it sums attention over keys, which is 1, so that ‖h‖₁/(T−j) is left and late
    tokens are protected. Use it on mixtures with two experts per token, beside ``mc-moe`` or any other form of the weights.
    It trades a little loss for the FLOPs, and weights read, of experts; measured FLOPs count the products behind the
    attention once more, where ``protect`` asks for it. Thresholds come from the uncompressed model, as released.

    ``layers`` below 1 prunes where the calibration's loss rises least when that layer prunes alone (a pass per layer); the
    released code has 10 of Mixtral's 32, by losses and thresholds that are written in it.
    """

    family: ClassVar[str] = "experts"
    paper: ClassVar[str] = "arXiv 2410.06270"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (EXPERTS,)
    ratio_of: ClassVar[str] = "experts per token"
    calibrates: ClassVar[bool] = True

    quantile: Annotated[float, Knob(low=0.0, high=1.0, ratio=True, doc="share of calibration tokens that lose their second expert; 0 leaves all as they are")] = 0.5  # fmt: skip
    protect: Annotated[float, Knob(low=0.0, high=1.0, doc="share of a text's tokens that keep both, the most important ones")] = 0.02  # fmt: skip
    importance: Annotated[str, Knob(choices=IMPORTANCES, doc="what importance is: attention that a token gets times its norm, or as released")] = RECEIVED  # fmt: skip
    layers: Annotated[float, Knob(low=0.01, high=1.0, doc="share of the layers that prune, those where it costs least")] = 1.0  # fmt: skip
    n_calib: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples to calibrate on")] = 128  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> Odp:
        """All keep both."""
        return cls(quantile=0.0)

    @classmethod
    def probe(cls) -> Probe:
        """An untrained mixture."""
        from isoflop.methods.experts.probe import PruningProbe

        return PruningProbe()

    def check(self, info: ModelInfo) -> None:
        """Refuse models without experts, those that do not send tokens to two, and windows where attention is asked for."""
        if EXPERTS not in info.hooks:
            raise Infeasible(
                f"method odp: model {info.ref} is no mixture of experts; allowed: tiny-lm/moe-…, and Mixtral's like"
            )
        super().check(info)
        active = info.geometry.get("experts_per_token", PER_TOKEN)
        if active != PER_TOKEN:
            raise Infeasible(
                f"method odp: model {info.ref} sends a token to {active} experts; allowed: {PER_TOKEN} experts per token"
            )
        if self.protect and self.importance == RECEIVED and any(info.geometry.get("windows") or ()):
            raise Infeasible(
                f"method odp: protect = {self.protect:g} asks for attention to all tokens before, and layers of {info.ref} have "
                "windows; allowed: protect = 0, or importance = released"
            )

    def axes(self, info: ModelInfo) -> Axes:
        """Both experts, over those that are left of them where text is like that of the calibration."""
        return Axes(ratio=PER_TOKEN / (PER_TOKEN - self.quantile * (1 - self.protect) * self.layers))

    def measured(self) -> Odp:
        """The configuration that a calibration depends on: one for all quantiles, unless layers are to be told apart."""
        kept = replace(type(self)(), n_calib=self.n_calib)
        return kept if self.layers == 1 else replace(kept, layers=0.5, quantile=self.quantile)

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> RatioStage:
        """The stage with what the routers do on calibration text."""
        self.check(info)
        return RatioStage(**OnModel.source(info, weights, seed, trained_with), method=self.measured())

    @torch.no_grad()
    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> RouterRatios:
        """What the stage computes, on a loaded model."""
        decoder = decoder_model(model, self.name)
        assert isinstance(decoder, LmModel)
        pair_routers(decoder, self.name)
        batches = list(decoder.calibration(ctx, self.n_calib, derive_seed("odp calibration", seed)))
        notes = RatioNotes()
        with decoder.occupy(EXPERTS, notes):
            nats_per_token(decoder, batches)
        ratios = {layer: torch.cat(parts).double().numpy() for layer, parts in notes.ratios.items()}
        found = RouterRatios({layer: np.quantile(own, GRID).tolist() for layer, own in ratios.items()})
        if self.layers < 1:
            for layer in found.quantiles:
                alone = {layer: found.threshold(layer, self.quantile)}
                with decoder.occupy(EXPERTS, Pruning(decoder, alone, 0.0, RECEIVED, self.name)):
                    found.losses[layer] = nats_per_token(decoder, batches)
        return found

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Pruning]:
        """The thresholds of the layers that prune."""
        decoder, thresholds = decoder_model(model, self.name), {}
        if self.quantile > 0:
            if not isinstance(prepared, RouterRatios):
                raise ValueError("method odp is calibrated: apply() needs the value of its prepare() stage")
            thresholds = {layer: prepared.threshold(layer, self.quantile) for layer in prepared.chosen(self.layers)}
        return {EXPERTS: Pruning(decoder, thresholds, self.protect, self.importance, self.name)}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Over the real tokens of all passes so far.

        ``active_experts``: that ran, per token and layer; ``ratio``: both over these, which is that of the experts' FLOPs;
        ``active_params``: parameters of the layers that a token meets, experts that did not run for it left out.
        """
        pruning = model.occupant(EXPERTS)
        if not isinstance(pruning, Pruning):
            raise ValueError("method odp is not applied")
        active = pruning.active_experts()
        return {"ratio": PER_TOKEN / active, "active_experts": active, "active_params": pruning.active_params()}


def nats_per_token(model: LmModel, batches: Sequence[Any]) -> float:
    """Mean cross-entropy of what batches ask for."""
    total, count = 0.0, 0
    for batch in batches:
        for logits_SW, targets_S in model.scored_logits(batch):
            total += float(F.cross_entropy(logits_SW.float(), targets_S, reduction="sum"))
            count += len(targets_S)
    return total / count


@dataclass(frozen=True)
class RatioStage(OnModel):
    """What a mixture's routers do on calibration text."""

    kind: ClassVar[str] = "router-ratios"

    method: Odp

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """A pass, and one per layer where layers are told apart."""
        with self.model(ctx) as model:
            self.method.calibrate(model, ctx, self.seed).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> RouterRatios:
        """The quantiles."""
        return RouterRatios.load(folder)
