"""Orthogonal rotations of a matrix' inputs and outputs, after which no weight stands out.

A rotation of the stream that layers read and add to changes nothing: every matrix that reads it is turned, every one that writes
it is turned back, and the scales of the norms between, which do not commute with it, go into the matrices first. The same holds per head
between values and outputs of attention. Inputs behind a non-linearity can only be turned while the model runs.

Shape suffixes: O outputs (rows), I inputs (columns), D size of a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import log2
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from isoflop.core.hashing import derive_seed
from isoflop.methods.hadamard import hadamard, has_hadamard
from isoflop.methods.weights.folding import Folding, fold_scales, norms_feeding
from isoflop.methods.weights.payloads import PAYLOADS, Payload
from isoflop.methods.weights.views import LinearView
from isoflop.models.base import Model

HADAMARD, RANDOM_HADAMARD, ORTHOGONAL = "hadamard", "random-hadamard", "orthogonal"
ROTATIONS = (RANDOM_HADAMARD, HADAMARD, ORTHOGONAL)
WRITERS = ("o_proj", "down_proj")
"""Roles of matrices that add to the stream."""


@dataclass(frozen=True)
class Rotation:
    """A block-diagonal orthogonal matrix: ``size`` channels after ``size`` channels are turned alike.

    Attributes:
        kind: Hadamard's matrix, the same with random signs before it, or any orthogonal one.
        seed: of the latter two.
    """

    kind: str
    size: int
    seed: int = 0

    def matrix(self) -> Tensor:
        """R (D, D) with R Rᵀ = 1, float32; a row x becomes x R."""
        return _matrix(self.kind, self.size, self.seed)

    def turn(self, x: Tensor) -> Tensor:
        """x R along the last dimension."""
        return (x.unflatten(-1, (-1, self.size)) @ self.matrix().to(x)).flatten(-2)

    def back(self, x: Tensor) -> Tensor:
        """x Rᵀ along the last dimension."""
        return (x.unflatten(-1, (-1, self.size)) @ self.matrix().T.to(x)).flatten(-2)

    def flops(self, width: int) -> float:
        """Of turning ``width`` channels: additions of the fast transform, or products and sums without one."""
        if self.kind == ORTHOGONAL:
            return 2.0 * width * self.size
        core = self.size
        while core % 2 == 0 and (core == 2 or has_hadamard(core // 2)):
            core //= 2
        return width * (core - 1 + log2(self.size // core)) + (width if self.kind == RANDOM_HADAMARD else 0)

    def settings(self) -> list[Any]:
        """As plain JSON types."""
        return [self.kind, self.size, self.seed]


@lru_cache(maxsize=16)
def _matrix(kind: str, size: int, seed: int) -> Tensor:
    rng = np.random.default_rng(derive_seed("rotation", size, seed))
    if kind == ORTHOGONAL:
        q_DD, r_DD = np.linalg.qr(rng.normal(size=(size, size)))
        return torch.from_numpy(q_DD * np.sign(np.diag(r_DD))).float()  # signs: drawn evenly from all rotations
    signs_D = torch.from_numpy(rng.choice([-1.0, 1.0], size)).float()
    return hadamard(size) * signs_D[:, None] if kind == RANDOM_HADAMARD else hadamard(size)


def largest_hadamard(width: int) -> int:
    """The largest divisor of ``width`` for which a Hadamard matrix is known; where it is not ``width``, blocks are turned."""
    return max(size for size in range(1, width + 1) if width % size == 0 and has_hadamard(size))


def rotation_of(kind: str, width: int, seed: int) -> Rotation:
    """Over all of ``width`` channels, or as many together as there is a Hadamard matrix for."""
    return Rotation(kind, width if kind == ORTHOGONAL else largest_hadamard(width), seed)


@dataclass(frozen=True, eq=False)
class RotatedPayload(Payload):
    """A payload of R_out ᵀ·W·R_in; rotations are known by kind and seed and cost nothing.

    Attributes:
        inner: of the turned matrix.
        into, out: rotations of the inputs and of the outputs; None where they stay.
        online: FLOPs per token of turning this matrix' input while the model runs, 0 where the model's weights do it, or where a
            matrix before this one shares the input.
    """

    kind: ClassVar[str] = "rotated"
    inner: Payload
    into: Rotation | None
    out: Rotation | None
    online: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner payload."""
        return self.inner.tensors()

    def settings(self) -> dict[str, Any]:
        """Rotations, and the inner payload's."""
        turns = {name: None if r is None else r.settings() for name, r in (("into", self.into), ("out", self.out))}
        inner = {"inner": self.inner.kind, "settings": self.inner.settings()}
        return {**super().settings(), **turns, "online": self.online, **inner}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RotatedPayload:
        """The inverse of ``settings`` and ``tensors``."""
        inner = PAYLOADS[settings["inner"]].restore(settings["settings"], tensors)
        into, out = (None if settings[name] is None else Rotation(*settings[name]) for name in ("into", "out"))
        return cls(inner.shape, inner, into, out, settings["online"])

    def decode(self) -> Tensor:
        """The matrix for inputs and outputs as the model has them."""
        weight_OI = self.inner.decode().float()
        if self.into is not None:
            weight_OI = self.into.back(weight_OI)
        return weight_OI if self.out is None else self.out.back(weight_OI.T).T.contiguous()


@dataclass
class Turning:
    """How each view is turned.

    Attributes:
        folding: the scales of norms in the matrices that they feed.
        into, out: by the view's name.
        online: FLOPs per token, by the name of the first view with an input that is turned while running.
        within: whether the stream itself is turned.
    """

    folding: Folding = field(default_factory=Folding)
    into: dict[str, Rotation] = field(default_factory=dict)
    out: dict[str, Rotation] = field(default_factory=dict)
    online: dict[str, float] = field(default_factory=dict)
    within: bool = False

    def turned(self, view: LinearView) -> Tensor:
        """The matrix that takes the place of ``view``'s, in float32."""
        weight_OI = self.folding.scaled(view)
        if view.name in self.into:
            weight_OI = self.into[view.name].turn(weight_OI)
        return self.out[view.name].turn(weight_OI.T).T.contiguous() if view.name in self.out else weight_OI

    def hessian(self, view: LinearView, hessian_II: Tensor) -> Tensor:
        """That of the turned matrix' inputs."""
        scale_I = self.folding.scales.get(view.name)
        if scale_I is not None:
            scale_I = scale_I.to(hessian_II)
            hessian_II = hessian_II / (scale_I[:, None] * scale_I)
        into = self.into.get(view.name)
        return hessian_II if into is None else into.turn(into.turn(hessian_II).T)


@torch.no_grad()
def plan_turning(
    model: Model, views: list[LinearView], owner: Mapping[str, str], batch: Any, kind: str, seed: int
) -> Turning:
    """Turn the stream, heads and, while running, inputs of down_proj; every input while running where the stream cannot be turned.

    Args:
        owner: of each view, the one that stands for its input.
        batch: for ``Model.supervised``, on which it is tried whether norms let go of their scales.
    """
    norms = norms_feeding(model, views, batch)
    turning = _within(model, views, owner, norms, batch, kind, seed)
    if turning is None:
        turning = Turning()
        for view in views:
            _while_running(turning, view, owner, model)
    return turning


def _within(
    model: Model,
    views: list[LinearView],
    owner: Mapping[str, str],
    norms: Mapping[str, nn.Module],
    batch: Any,
    kind: str,
    seed: int,
) -> Turning | None:
    """With the stream turned, or None where something between its matrices would notice."""
    readers = [view for view in views if owner[view.name] in norms]
    writers = [view for view in views if owner[view.name] not in norms]
    widths = {view.cols for view in readers} | {view.rows for view in writers}
    if not readers or len(widths) != 1 or any(view.role not in WRITERS or view.expert is not None for view in writers):
        return None
    (width,) = widths
    feeding = {id(norm): norm for norm in norms.values()}
    if not all(_commutes(norm, width) for norm in feeding.values()) or _other_norms(model, views, feeding, width):
        return None
    scales = {view.name: torch.ones(view.cols, device=view.holder.device) for view in views}
    for view in readers:
        norm: Any = norms[owner[view.name]]
        weight_I = norm.weight.detach().float()
        scales[view.name] = weight_I.masked_fill(weight_I == 0, 1.0)
    folding = fold_scales(model, views, scales, owner, batch)
    if folding.divided & {view.name for view in readers}:
        return None
    folding = replace(folding, divided=set(), rows={}, scales={view.name: scales[view.name] for view in readers})
    stream, turning = rotation_of(kind, width, seed), Turning(folding, within=True)
    turning.into |= {view.name: stream for view in readers}
    turning.out |= {view.name: stream for view in writers}
    by_name = {view.name: view for view in views}
    for view in writers:
        attention = view.name.rpartition(".")[0]
        values = by_name.get(f"{attention}.v_proj")
        head = getattr(model.module.get_submodule(attention), "head_dim", None)
        if view.role == "o_proj" and values is not None and head:
            turning.into[view.name] = turning.out[values.name] = rotation_of(kind, head, seed)
        else:
            _while_running(turning, view, owner, model)
    return turning


def _while_running(turning: Turning, view: LinearView, owner: Mapping[str, str], model: Model) -> None:
    """Turn a view's input by Hadamard's matrix, which has a fast transform; of experts only a few run for a token."""
    turning.into[view.name] = rotation_of(HADAMARD, view.cols, 0)
    if owner[view.name] == view.name:
        share = 1.0
        if view.expert is not None:
            share = getattr(model.module.config, "num_experts_per_tok", 1) / view.holder.shape[0]
        turning.online[view.name] = share * turning.into[view.name].flops(view.cols)


def _commutes(norm: nn.Module, width: int) -> bool:
    """Whether a norm without its scale gives the turned output for a turned input; one that takes off means does not."""
    rng = torch.Generator().manual_seed(0)
    x, turn = torch.randn(4, width, generator=rng), Rotation(ORTHOGONAL, width)
    weight: Any = norm.weight
    if getattr(norm, "bias", None) is not None or weight.shape != (width,):
        return False
    kept, probe = weight.data, x.to(weight)
    try:
        for plain in (1.0, 0.0):  # some norms count their scale from 1
            weight.data = torch.full_like(kept, plain)
            straight = norm(probe).float()
            if float(straight.abs().max()) == 0:
                continue
            turned = norm(turn.turn(x).to(weight)).float()
            return torch.allclose(turned, turn.turn(straight), atol=1e-4 if weight.dtype == torch.float32 else 5e-2)
        return False
    finally:
        weight.data = kept


def _other_norms(model: Model, views: list[LinearView], feeding: Mapping[int, nn.Module], width: int) -> bool:
    """Whether the blocks norm the stream elsewhere than before their matrices."""
    from isoflop.methods.weights.sensitivity import blocks_of

    for name in blocks_of(views).values():
        for part in model.module.get_submodule(name).modules():
            weight = getattr(part, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.shape == (width,) and id(part) not in feeding:
                return True
    return False
