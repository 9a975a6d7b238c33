"""What calibration tells of a mixture's experts: how often each is selected, how heavily, and what its widths cost alone.

Shape suffixes: N tokens, I inputs, k experts per token, E experts, B widths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.methods.weights.blockwise import BlockPasses
from isoflop.methods.weights.expert_grid import rounded
from isoflop.methods.weights.views import LinearView, expert_inner, linear_views
from isoflop.models.base import Model
from isoflop.models.decoder_model import decoder_model
from isoflop.models.hooks.experts import routers_of

_FILE = "experts.json"
Pair = tuple[LinearView, LinearView]
"""The first and the second matrix of an expert."""


@dataclass
class LayerExperts:
    """Of one layer's experts.

    Attributes:
        tokens: T, that its router saw.
        counts_E: how often each expert was selected; together k·T.
        masses_E: sums of its softmax probability over those tokens, before the k are normalised.
        errors_EB: sums over the batches of the Frobenius norm of what rounding that expert alone changes in the block's output.
    """

    tokens: int
    counts_E: list[float]
    masses_E: list[float]
    errors_EB: list[list[float]]


@dataclass
class ExpertStatistics:
    """Attributes: layers: by their numbers; widths: the bits that ``errors_EB`` stand for."""

    widths: tuple[int, ...]
    layers: dict[int, LayerExperts] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write them."""
        layers = {str(layer): vars(found) for layer, found in self.layers.items()}
        (folder / _FILE).write_text(json.dumps({"widths": self.widths, "layers": layers}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ExpertStatistics:
        """The inverse of :meth:`save`."""
        found = json.loads((folder / _FILE).read_text())
        layers = {int(layer): LayerExperts(**values) for layer, values in found["layers"].items()}
        return cls(tuple(found["widths"]), layers)


def expert_pairs(views: Sequence[LinearView]) -> dict[int, list[Pair]]:
    """The experts' matrices by layer, in the order of the experts."""
    found: dict[int, dict[int, dict[bool, LinearView]]] = {}
    for view in views:
        if view.expert is not None:
            parts = found.setdefault(view.layer, {}).setdefault(view.expert, {})
            parts[view.role == "down_proj"] = view
    return {layer: [(experts[e][False], experts[e][True]) for e in sorted(experts)] for layer, experts in found.items()}


@torch.no_grad()
def collect_experts(
    model: Model, batches: Sequence[Any], widths: Sequence[int], group: int, method: str
) -> ExpertStatistics:
    """One pass of all batches through the model as it is now, block by block where it can be.

    What an expert adds to the block's output is its weight times its own output, so that only its own tokens run again.

    Raises:
        Infeasible: the model's mixtures are of a kind whose routers or experts cannot be reached.
    """
    views = linear_views(model)
    pairs = expert_pairs(views)
    routers = routers_of(decoder_model(model, method).decoder)
    if not pairs or not pairs.keys() <= routers.keys():
        raise Infeasible(f"method {method}: model {model.info.ref} has no routers to follow in layers with experts")
    found = ExpertStatistics(tuple(widths))

    @contextmanager
    def watching(some: list[LinearView]) -> Iterator[Callable[[], None]]:
        with ExitStack() as stack:
            watches = {layer: _Watch(own, widths, group) for layer, own in expert_pairs(some).items()}
            for layer, watch in watches.items():
                stack.callback(routers[layer].register_forward_hook(watch.routed).remove)
                experts = watch.pairs[0][0].module
                stack.callback(experts.register_forward_pre_hook(watch.entered, with_kwargs=True).remove)
            yield lambda: None
        found.layers.update({layer: watch.found() for layer, watch in watches.items()})

    BlockPasses(model, views, batches).run(watching)
    return found


class _Watch:
    """Follows one layer's router and experts."""

    def __init__(self, pairs: list[Pair], widths: Sequence[int], group: int) -> None:
        self.pairs = pairs
        self._tokens = 0
        like = pairs[0][0].holder
        self._counts_E = torch.zeros(len(pairs), dtype=torch.float64, device=like.device)
        self._masses_E = torch.zeros_like(self._counts_E)
        self._errors_EB = torch.zeros(len(pairs), len(widths), dtype=torch.float64, device=like.device)
        self._rounded = [
            [tuple(rounded(view.weight(), width, group).decode().to(like.dtype) for view in pair) for width in widths]
            for pair in pairs
        ]

    def routed(self, router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_NE, _, chosen_Nk = output
        mass_Nk = logits_NE.double().softmax(-1).gather(1, chosen_Nk)
        self._tokens += len(logits_NE)
        self._counts_E += torch.bincount(chosen_Nk.flatten(), minlength=len(self.pairs))
        self._masses_E.index_add_(0, chosen_Nk.flatten(), mass_Nk.flatten())

    def entered(self, experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden, chosen_Nk, weights_Nk = (*args, *kwargs.values())[:3]
        tokens_NI = hidden.reshape(-1, hidden.shape[-1])
        for expert, pair in enumerate(self.pairs):
            taken_Nk = chosen_Nk == expert
            rows_N = taken_Nk.any(-1)
            if not bool(rows_N.any()):
                continue
            x_NI, weight_N1 = tokens_NI[rows_N], (weights_Nk * taken_Nk).sum(-1, keepdim=True)[rows_N]
            whole = _output(pair, x_NI, pair[0].weight(), pair[1].weight())
            for place, (first_OI, second_OI) in enumerate(self._rounded[expert]):
                change = weight_N1 * (_output(pair, x_NI, first_OI, second_OI) - whole)
                self._errors_EB[expert, place] += change.double().norm()

    def found(self) -> LayerExperts:
        """What was seen."""
        return LayerExperts(self._tokens, self._counts_E.tolist(), self._masses_E.tolist(), self._errors_EB.tolist())


def _output(pair: Pair, x_NI: Tensor, first_OI: Tensor, second_OI: Tensor) -> Tensor:
    """Of an expert with these matrices; a bias of the second one is left out, because it is not rounded."""
    return nn.functional.linear(expert_inner(pair[0], x_NI, first_OI), second_OI)
