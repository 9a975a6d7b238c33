"""How much a model depends on each of its layers: CPTQuant's three scores, and controls (arXiv 2412.03599).

Layers are the numbered blocks. Whatever is tried on a layer, the others stay as they are, and afterwards all are what they were.

Shape suffixes: N samples, T tokens, d width, K principal components.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.hashing import derive_seed
from isoflop.methods.weights.level_bank import calibration_loss
from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.rules import keep_highest
from isoflop.methods.weights.views import LinearView, replaceable
from isoflop.models.base import Model
from isoflop.models.heads import run_to_head
from isoflop.models.hooks.matrices import BLOCK

SAMPLES_PER_COMPONENT = 10
"""With fewer samples than that, canonical correlations of unrelated states come near 1."""
_FILE = "sensitivity.json"


@dataclass(frozen=True)
class Sensitivity:
    """Scores of the layers by their numbers; the larger, the more a layer matters."""

    scores: dict[int, float]

    def save(self, folder: Path) -> None:
        """Write them."""
        (folder / _FILE).write_text(json.dumps({str(layer): score for layer, score in self.scores.items()}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Sensitivity:
        """The inverse of :meth:`save`."""
        return cls({int(layer): score for layer, score in json.loads((folder / _FILE).read_text()).items()})


def blocks_of(views: Sequence[LinearView]) -> dict[int, str]:
    """The name of each layer's module, by the layer's number."""
    found: dict[int, str] = {}
    for view in views:
        place = BLOCK.search(f"{view.name}.")
        assert place is not None
        found.setdefault(view.layer, view.name[: place.end(1)])
    return dict(sorted(found.items()))


# CMPQ


def correlation_scores(model: Model, views: Sequence[LinearView], batches: Sequence[Any]) -> dict[int, float]:
    """1 - the mean first canonical correlation of a layer's states with those of every other layer, embeddings included."""
    states = mean_states(model, views, batches)
    bases = [principal_directions(states_Nd) for states_Nd in states]
    found = {}
    for place, layer in enumerate(blocks_of(views), start=1):
        others = [first_correlation(bases[place], base) for number, base in enumerate(bases) if number != place]
        found[layer] = 1 - sum(others) / len(others)
    return found


@torch.no_grad()
def mean_states(model: Model, views: Sequence[LinearView], batches: Sequence[Any]) -> list[Tensor]:
    """Hidden states averaged over an example's tokens, padding left out: what enters the first layer, and what each layer gives."""
    blocks = [model.module.get_submodule(name) for name in blocks_of(views).values()]
    kept: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    valid_BT: Tensor | None = None

    def keep(place: int, states: Any) -> None:
        states_BTd = (states[0] if isinstance(states, tuple) else states).float()
        if valid_BT is None or valid_BT.shape != states_BTd.shape[:2]:
            kept[place].append(states_BTd.mean(1).cpu())
            return
        share_BT = valid_BT.to(states_BTd) / valid_BT.to(states_BTd).sum(1, keepdim=True)
        kept[place].append(torch.einsum("btd,bt->bd", states_BTd, share_BT).cpu())

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def leaving(place: int) -> Callable[..., None]:
        return lambda module, args, output: keep(place, output)

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(entering, with_kwargs=True).remove)
        for place, block in enumerate(blocks, start=1):
            stack.callback(block.register_forward_hook(leaving(place)).remove)
        for batch in batches:
            valid_BT = getattr(batch, "valid_BT", getattr(batch, "mask_BT", None))
            run_to_head(model, batch)
    return [torch.cat(parts).double() for parts in kept]


def principal_directions(states_Nd: Tensor) -> Tensor:
    """Orthonormal scores (N, K) of the leading principal components, one for every ten samples."""
    left_NK, values_K, _ = torch.linalg.svd(states_Nd - states_Nd.mean(0), full_matrices=False)
    rank = int((values_K > 1e-8 * values_K.max()).sum())
    return left_NK[:, : max(1, min(rank, len(states_Nd) // SAMPLES_PER_COMPONENT))]


def first_correlation(one_NK: Tensor, other_NK: Tensor) -> float:
    """The first canonical correlation of two sets of variables, by orthonormal bases of them."""
    return min(float(torch.linalg.matrix_norm(one_NK.T @ other_NK, 2)), 1.0)


# PMPQ, TDMPQ, and the loss itself


def pruning_scores(
    model: Model, views: Sequence[LinearView], batches: Sequence[Any], sparsity: float
) -> dict[int, float]:
    """Loss with the smallest share of every parameter of a layer at zero, less that of the model as it is."""

    def pruned(parameter: nn.Parameter) -> Tensor:
        size = parameter.float().abs().reshape(1, -1)
        return parameter * keep_highest(size, sparsity, by_row=False).view(parameter.shape)

    return {layer: rise for layer, (rise,) in _rises(model, views, batches, [pruned]).items()}


def perturbation_scores(
    model: Model, views: Sequence[LinearView], batches: Sequence[Any], sigma: float, draws: int, seed: int
) -> dict[int, float]:
    """Mean over draws of |L(θ + δ) - L(θ)|, δ normal with ``sigma`` times the root mean square of each parameter of a layer."""

    def draw(number: int) -> Callable[[nn.Parameter], Tensor]:
        generator = torch.Generator().manual_seed(derive_seed("cptquant noise", number, seed))

        def noisy(parameter: nn.Parameter) -> Tensor:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            return parameter.float() + sigma * parameter.float().square().mean().sqrt() * noise

        return noisy

    rises = _rises(model, views, batches, [draw(number) for number in range(draws)])
    return {layer: sum(abs(rise) for rise in found) / draws for layer, found in rises.items()}


@torch.no_grad()
def alone_scores(
    model: Model, views: Sequence[LinearView], batches: Sequence[Any], payload_of: Callable[[Tensor], Payload]
) -> dict[int, float]:
    """Loss with a layer's matrices alone compressed, less that of the model as it is: what the other scores stand for."""
    plain, found = calibration_loss(model, list(batches)), {}
    for layer in blocks_of(views):
        own = [view for view in views if view.layer == layer]
        with replaceable(model, sorted({view.parameter for view in own})):
            for view in own:
                view.write(payload_of(view.weight()).decode())
            found[layer] = calibration_loss(model, list(batches)) - plain
    return found


@torch.no_grad()
def _rises(
    model: Model,
    views: Sequence[LinearView],
    batches: Sequence[Any],
    changes: Sequence[Callable[[nn.Parameter], Tensor]],
) -> dict[int, list[float]]:
    """By layer, how the loss rises with each change to all of the layer's parameters."""
    plain = calibration_loss(model, list(batches))
    found: dict[int, list[float]] = {}
    for layer, block in blocks_of(views).items():
        names = [name for name, _ in model.module.named_parameters() if name.startswith(f"{block}.")]
        found[layer] = []
        for change in changes:
            with replaceable(model, names) as parameters:
                for parameter in parameters.values():
                    parameter.data.copy_(change(parameter))
                found[layer].append(calibration_loss(model, list(batches)) - plain)
    return found


def in_groups(scores: Sequence[float], groups: int) -> list[int]:
    """The group of each score, 0 for the highest: k-means in one dimension, solved exactly.

    Groups of a best solution are runs of the sorted scores, so that every way to cut them is tried. None is empty unless there
    are fewer scores than groups.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    groups = min(groups, len(scores))
    best, cuts = float("inf"), tuple(range(1, groups))
    for tried in combinations(range(1, len(scores)), groups - 1):
        spread = sum(_spread([scores[i] for i in order[a:b]]) for a, b in _runs(tried, len(scores)))
        if spread < best:
            best, cuts = spread, tried
    found = [0] * len(scores)
    for number, (start, stop) in enumerate(_runs(cuts, len(scores))):
        for i in order[start:stop]:
            found[i] = number
    return found


def _runs(cuts: Sequence[int], count: int) -> list[tuple[int, int]]:
    return list(zip((0, *cuts), (*cuts, count), strict=True))


def _spread(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)
