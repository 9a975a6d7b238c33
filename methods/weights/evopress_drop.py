"""EvoPress for depth: which attentions and MLPs to leave out (arXiv 2410.14649, section 4.1).

Shape suffixes: B batch, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.artefact import Serving
from isoflop.methods.weights.base import Served
from isoflop.methods.weights.fitness import Fitness
from isoflop.methods.weights.payloads import AbsentPayload, DensePayload, Payload
from isoflop.methods.weights.search_base import SearchMethod
from isoflop.methods.weights.space import Levels, LevelSpace
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.occupant import Occupant

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

ATTENTIONS, MLPS = ("self_attn", "attn"), ("mlp", "block_sparse_moe")
DROPPED, KEPT = 0, 1


@dataclass(frozen=True, eq=False)
class Half:
    """Attention or MLP of one block: a module whose output is added to the residual stream.

    Attributes:
        name: of the module, from the model's root.
        layer: number of the block.
        attention: which of the two.
        module: the module.
    """

    name: str
    layer: int
    attention: bool
    module: nn.Module


def halves(model: Model) -> list[Half]:
    """Attentions, then MLPs, by block.

    Raises:
        Infeasible: the blocks are not made of these two.
    """
    modules = dict(model.module.named_modules())
    found: dict[str, Half] = {}
    for view in linear_views(model):
        parts = view.name.split(".")
        place = next((i for i, part in enumerate(parts) if part in (*ATTENTIONS, *MLPS)), None)
        if place is None or parts[place - 1] != str(view.layer):
            raise Infeasible(
                f"method evopress-drop: {view.name} of model {model.info.ref} belongs neither to an attention "
                f"({', '.join(ATTENTIONS)}) nor to an MLP ({', '.join(MLPS)}) that could be left out"
            )
        name = ".".join(parts[: place + 1])
        found[name] = Half(name, view.layer, parts[place] in ATTENTIONS, modules[name])
    return sorted(found.values(), key=lambda half: (not half.attention, half.layer))


class Skipping:
    """Leaves out the halves in ``dropped`` while :meth:`installed`."""

    def __init__(self, found: list[Half]) -> None:
        self._halves = found
        self.dropped: frozenset[str] = frozenset()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside the ``with`` block ``dropped`` counts."""
        with ExitStack() as stack:
            for half in self._halves:
                stack.enter_context(self._instead(half))
            yield

    @contextmanager
    def _instead(self, half: Half) -> Iterator[None]:
        module, original = half.module, half.module.forward
        before = vars(module).get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            if half.name not in self.dropped:
                return original(*args, **kwargs)
            zeros_BTd = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
            if not half.attention:
                return zeros_BTd
            _count_tokens(kwargs.get("past_key_values"), module, zeros_BTd)
            return zeros_BTd, None

        module.forward = forward
        try:
            yield
        finally:
            if before is None:
                del module.forward
            else:
                module.forward = before


def _count_tokens(cache: Any, module: nn.Module, x_BTd: torch.Tensor) -> None:
    """A dropped attention caches nothing, but a cache's first layer is asked how many tokens have passed."""
    if cache is not None and getattr(module, "layer_idx", None) == 0:
        stand_in = x_BTd[:, None, :, :1]
        cache.update(stand_in, stand_in, 0)


@METHODS.register("evopress-drop")
@dataclass(frozen=True)
class EvoPressDrop(SearchMethod):
    """As many attentions as MLPs left out, a share ``dropped`` of the blocks, each chosen by itself.

    What is left out is neither stored nor computed, and adds nothing to the residual stream. The search starts from random
    configurations. ``dp`` leaves out the halves whose loss alone does the least harm; ``uniform`` leaves out whole blocks at even
    distances.
    """

    dropped: Annotated[float, Knob(low=0.0, high=0.9, ratio=True, doc="share of attentions, and of MLPs, that are left out")] = 0.25  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> EvoPressDrop:
        """Nothing left out."""
        return cls(dropped=0.0)

    def check(self, info: ModelInfo) -> None:
        """A share above 0 leaves out at least one block; attentions are found by their hook."""
        super().check(info)
        info.check_offers(f"method {self.name}", (ATTENTION,), ())
        layers = info.geometry.get("layers")
        if layers and self.dropped > 0 and not self.count(layers):
            raise Infeasible(
                f"method evopress-drop: dropped = {self.dropped:g} leaves out none of {layers} blocks; "
                f"allowed: 0, or from {1 / layers:g}"
            )

    def axes(self, info: ModelInfo) -> Axes:
        """Blocks over those that are left."""
        layers = info.geometry["layers"]
        return Axes(ratio=layers / (layers - self.count(layers)))

    def count(self, blocks: int) -> int:
        """Attentions left out of so many, and MLPs."""
        return int(self.dropped * blocks + 1e-9)

    def relevant(self) -> EvoPressDrop:
        """Where nothing goes there is one configuration."""
        if self.dropped == 0:
            return self.at_defaults("allocation", "generations", "offspring", "survivors")
        return super().relevant()

    def names(self, model: Model) -> list[str]:
        """Attentions, then MLPs."""
        return [half.name for half in halves(model)]

    def problem(self, model: Model, parts: Any) -> DropProblem:
        """Which halves to keep."""
        return DropProblem(halves(model), self)

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """What was found is left out, and not stored."""
        skipping = Skipping(halves(model))
        skipping.dropped = self._dropped(prepared)
        views = linear_views(model)
        return {MATRICES: Shortened(views, *self.served(model, views, prepared), skipping)}

    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """Nothing for the matrices of what is left out, all others as they are."""
        gone = tuple(f"{name}." for name in self._dropped(prepared))

        def payload_of(view: LinearView) -> AbsentPayload | DensePayload:
            if f"{view.name}.".startswith(gone):
                return AbsentPayload((view.rows, view.cols))
            return DensePayload.of(view.weight())

        return payload_of, {}

    @classmethod
    def probe(cls) -> Probe:
        """A decoder of four layers."""
        from isoflop.methods.weights.search_probe import SearchProbe

        return SearchProbe(layers=4)

    def _dropped(self, prepared: Any) -> frozenset[str]:
        return frozenset(name for name, level in self.found(prepared).levels.items() if level == DROPPED)


class Shortened(Serving):
    """A model without some of its halves."""

    def __init__(
        self,
        views: list[LinearView],
        payload_of: Callable[[LinearView], Payload],
        vectors: Mapping[str, Tensor],
        skipping: Skipping,
    ) -> None:
        super().__init__(views, payload_of, vectors)
        self._skipping = skipping

    @contextmanager
    def at_work(self, model: Model) -> Iterator[None]:
        """Also skips what is left out."""
        with super().at_work(model), self._skipping.installed():
            yield


class DropProblem:
    """The search for what to keep (a ``Problem``): level 1 keeps a half, level 0 leaves it out."""

    def __init__(self, found: list[Half], method: EvoPressDrop) -> None:
        self._halves = found
        kinds = [tuple(i for i, half in enumerate(found) if half.attention is kind) for kind in (True, False)]
        self._groups = tuple(group for group in kinds if group)
        self._counts = [method.count(len(group)) for group in self._groups]
        self.space = LevelSpace((DROPPED,) * len(found), (KEPT,) * len(found), self._groups)

    def starts(self, count: int, rng: np.random.Generator) -> list[Levels]:
        """Random configurations."""
        return [self._without(rng.permutation(group)[:n] for group, n in self._each()) for _ in range(count)]

    def uniform(self) -> Levels:
        """Blocks at even distances."""
        return self._without([group[int((i + 0.5) * len(group) / n)] for i in range(n)] for group, n in self._each())

    def additive(self, judge: Fitness) -> Levels:
        """What does the least harm by itself."""
        whole = self._without([])
        alone = [self._without([[i]]) for i in range(len(whole))]
        harm = judge.scores(alone, len(judge), np.random.default_rng(0))
        # halves of a kind cost the same, so the least sum is that of the least
        return self._without(sorted(group, key=lambda i: harm[i])[:n] for group, n in self._each())

    @contextmanager
    def serving(self) -> Iterator[Callable[[Levels], None]]:
        """Halves are left out without touching a weight."""
        skipping = Skipping(self._halves)

        def serve(levels: Levels) -> None:
            gone = (half.name for half, level in zip(self._halves, levels, strict=True) if level == DROPPED)
            skipping.dropped = frozenset(gone)

        with skipping.installed():
            yield serve

    def _each(self) -> list[tuple[tuple[int, ...], int]]:
        """The halves of a kind, and how many of them go."""
        return list(zip(self._groups, self._counts, strict=True))

    def _without(self, gone: Any) -> Levels:
        chosen = {int(i) for part in gone for i in part}
        return tuple(DROPPED if i in chosen else KEPT for i in range(len(self._halves)))
