"""Scales of input channels and where their inverses go.

Scaling the columns of a matrix by s and its input by 1/s changes nothing. The 1/s is folded into what computes the input,
where that is a norm (weight and bias) or the rows of another matrix: up_proj for down_proj, v_proj for o_proj unless
queries share values. Everything else keeps s and divides. Norms are found by watching which module returns the very
tensor that a view is given; each fold is then tried on the model and dropped where the outputs move.

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.methods.weights.artefact import in_place
from isoflop.methods.weights.views import LinearView, observed, replaceable
from isoflop.models.base import Model

HALF_MAX = 6e4
FOLD_EXAMPLES = 4
"""Training examples on which folds are tried."""
_FEEDS = {"down_proj": ("up_proj", "gate_proj"), "o_proj": ("v_proj", "q_proj")}
"""Consumer: the matrix whose rows take 1/s, and one that must be there too (a gated MLP, an ordinary attention)."""


@dataclass(frozen=True)
class Carrier:
    """What takes up 1/s of some views' common input: a norm's parameters, or the rows of a matrix and its bias."""

    parameters: tuple[str, ...]
    view: LinearView | None = None


@dataclass
class Folding:
    """Scaled views and what undoes the scaling.

    Attributes:
        scales: s_I of each scaled view, on the float16 grid.
        rows: factor on a view's rows, where another view's 1/s is folded in.
        vectors: new values of norm weights and biases, by parameter name.
        divided: views that keep s and divide.
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    divided: set[str] = field(default_factory=set)

    def scaled(self, view: LinearView) -> Tensor:
        """The matrix that takes the place of ``view``'s, in float32."""
        weight_OI = view.weight().float()
        if view.name in self.scales:
            weight_OI = weight_OI * self.scales[view.name]
        if view.name in self.rows:
            weight_OI = weight_OI * self.rows[view.name][:, None]
        return weight_OI

    def divisor(self, view: LinearView) -> Tensor | None:
        """s in float16 for a view that divides."""
        return self.scales[view.name].half() if view.name in self.divided else None


def as_stored(scale_I: Tensor) -> Tensor:
    """Scales on the float16 grid, in float32."""
    return scale_I.clamp(max=HALF_MAX).half().float()


@torch.no_grad()
def fold_scales(
    model: Model,
    views: list[LinearView],
    scales: Mapping[str, Tensor],
    owner: Mapping[str, str],
    batch: Any | None,
) -> Folding:
    """Scale every view.

    Args:
        scales: of the input channels by the view's name, as stored; the same for all views with a common input.
        owner: of each view, the one that stands for its input (``Statistics.owner``).
        batch: for ``Model.supervised``, on which folds are found and tried; None to divide everywhere.
    """
    folding = Folding(dict(scales), divided={view.name for view in views})
    if batch is None:
        return folding
    groups: dict[str, list[LinearView]] = {}
    for view in views:
        groups.setdefault(owner[view.name], []).append(view)
    carriers = _carriers(model, views, groups, batch)
    before, _ = model.supervised(batch)
    chosen = dict(carriers)
    if not _harmless(model, views, _fold(model, folding, groups, chosen), batch, before):
        chosen = {
            owner: carrier
            for owner, carrier in carriers.items()
            if _harmless(model, views, _fold(model, folding, groups, {owner: carrier}), batch, before)
        }
    folded = _fold(model, folding, groups, chosen)
    return folded if _harmless(model, views, folded, batch, before) else folding


def _carriers(
    model: Model, views: list[LinearView], groups: Mapping[str, list[LinearView]], batch: Any
) -> dict[str, Carrier]:
    """What could take up the scales of each group of views with a common input, by the group's owner."""
    names = {id(p): name for name, p in model.module.named_parameters()}
    norms = norms_feeding(model, views, batch)
    by_name = {view.name: view for view in views}
    found: dict[str, Carrier] = {}
    for owner, members in groups.items():
        norm = norms.get(owner)
        if norm is not None:
            parts = (getattr(norm, "weight", None), getattr(norm, "bias", None))
            found[owner] = Carrier(tuple(names[id(p)] for p in parts if p is not None))
            continue
        parent, _, role = owner.rpartition(".")
        feeder, companion = (by_name.get(f"{parent}.{name}") for name in _FEEDS.get(role, ("", "")))
        if len(members) == 1 and feeder is not None and companion is not None and feeder.rows == members[0].cols:
            bias = getattr(feeder.module, "bias", None)
            found[owner] = Carrier(() if bias is None else (names[id(bias)],), feeder)
    return found


def norms_feeding(model: Model, views: list[LinearView], batch: Any) -> dict[str, nn.Module]:
    """The norm whose output object a view is given, by the view's name."""
    returned: dict[int, tuple[nn.Module, Tensor]] = {}
    found: dict[str, nn.Module] = {}

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            returned[id(output)] = (module, output)

    def look_up(view: LinearView, x: Tensor) -> None:
        if id(x) in returned:
            found[view.name] = returned[id(x)][0]

    norms = [
        part
        for part in model.module.modules()
        if isinstance(weight := getattr(part, "weight", None), nn.Parameter) and weight.dim() == 1
    ]
    handles = [norm.register_forward_hook(remember) for norm in norms]
    try:
        with observed(views, look_up):
            model.supervised(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _fold(
    model: Model, folding: Folding, groups: Mapping[str, list[LinearView]], carriers: Mapping[str, Carrier]
) -> Folding:
    """``folding`` with the scales of some groups folded into their carriers."""
    parameters = dict(model.module.named_parameters())
    folded = Folding(dict(folding.scales), {}, {}, set(folding.divided))
    for owner, carrier in carriers.items():
        s_I = folding.scales[owner]
        for name in carrier.parameters:
            folded.vectors[name] = (parameters[name].detach().float() / s_I).to(parameters[name].dtype)
        if carrier.view is not None:
            folded.rows[carrier.view.name] = 1 / s_I
        folded.divided -= {view.name for view in groups[owner]}
    return folded


def _harmless(model: Model, views: list[LinearView], folding: Folding, batch: Any, before: Tensor) -> bool:
    """Whether the model computes the same with the folded scales."""
    with replaceable(model, sorted({view.parameter for view in views})), in_place(model, folding.vectors):
        for view in views:
            divisor_I = folding.divisor(view)
            scaled_OI = folding.scaled(view)
            view.write(scaled_OI if divisor_I is None else scaled_OI / divisor_I.float())
        after, _ = model.supervised(batch)
    tolerance = 1e-4 if before.dtype == torch.float32 else 5e-2
    return float((after - before).abs().max()) <= tolerance * float(before.abs().max())
