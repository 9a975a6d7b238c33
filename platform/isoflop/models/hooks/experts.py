"""The hook ``experts``: which experts of a mixture take a token, and with what weight.

Shape suffixes: S tokens (batch times length), E experts, k experts per token, d width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.models.hooks.matrices import BLOCK, ROUTERS, blocks_matrices
from isoflop.models.hooks.occupant import Occupant


@dataclass(frozen=True)
class Routing:
    """A router's choice for some tokens.

    Attributes:
        logits_SE: of all experts.
        weights_Sk: of the chosen ones.
        experts_Sk: their numbers.
    """

    logits_SE: Tensor
    weights_Sk: Tensor
    experts_Sk: Tensor


class ExpertPolicy(Occupant):
    """The occupant: changes what the routers chose. An expert with weight 0 adds nothing, and does not run for the token."""

    @abstractmethod
    def route(self, layer: int, hidden_Sd: Tensor, routing: Routing) -> Routing:
        """The routing to use in a layer; of the same shapes."""


class ExpertsHook(Hook[ExpertPolicy]):
    """Forward hooks on the routers of the decoder, and experts that run for no token that they have weight 0 for."""

    @contextmanager
    def installed(self, model: Any, occupant: ExpertPolicy) -> Iterator[None]:
        """See ``watched_routers`` and ``sparing_experts``."""
        with watched_routers(routers_of(model.decoder), occupant), sparing_experts(experts_of(model.decoder)):
            yield


EXPERTS = ExpertsHook("experts", 24, "decides which experts of a mixture take a token")


def routers_of(decoder: nn.Module) -> dict[int, nn.Module]:
    """Routers by layer whose output is (logits, weights, numbers), as transformers' mixtures have it; empty when there is none."""
    found: dict[int, nn.Module] = {}
    for path, module in decoder.named_modules():
        place = BLOCK.search(f"{path}.")
        if place is not None and path.rsplit(".", 1)[-1] in ROUTERS and hasattr(module, "top_k"):
            found[int(place[1])] = module
    return found


def experts_of(decoder: nn.Module) -> dict[int, nn.Module]:
    """The module with a layer's experts, beside its router; layers that keep them elsewhere are left out."""
    routers = {id(router): layer for layer, router in routers_of(decoder).items()}
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        experts = getattr(module, "experts", None)
        layers = [routers[id(child)] for child in module.children() if id(child) in routers]
        if isinstance(experts, nn.Module) and layers:
            found[layers[0]] = experts
    return found


def mixture_geometry(decoder: nn.Module) -> dict[str, Any]:
    """Of a decoder all of whose mixtures are of one size: ``experts`` of a layer, ``experts_per_token``, and
    ``expert_matrices``, (rows, cols, how many) of those of all layers; empty for others. ``decoder`` may be a skeleton.
    """
    shapes: Counter[tuple[int, int]] = Counter()
    counts: set[int] = set()
    for _, _, _, holder, _, transposed in blocks_matrices(decoder):
        if holder.dim() == 3:
            rows, cols = holder.shape[-2:][::-1] if transposed else holder.shape[-2:]
            shapes[rows, cols] += holder.shape[0]
            counts.add(holder.shape[0])
    active = {int(router.top_k) for router in routers_of(decoder).values()}  # type: ignore[arg-type]
    if len(counts) != 1 or len(active) != 1:
        return {}
    matrices = tuple((rows, cols, count) for (rows, cols), count in shapes.items())
    return {"experts": counts.pop(), "experts_per_token": active.pop(), "expert_matrices": matrices}


@contextmanager
def watched_routers(routers: dict[int, nn.Module], policy: ExpertPolicy) -> Iterator[None]:
    """Inside the ``with`` block every router's choice goes through ``policy``."""
    with ExitStack() as stack:
        for layer, router in routers.items():
            stack.callback(router.register_forward_hook(_changer(layer, policy)).remove)
        yield


def _changer(layer: int, policy: ExpertPolicy) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def change(router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        found = policy.route(layer, args[0], Routing(*output))
        return found.logits_SE, found.weights_Sk, found.experts_Sk

    return change


@contextmanager
def sparing_experts(experts: dict[int, nn.Module]) -> Iterator[None]:
    """Inside the ``with`` block no expert runs for a token that it has weight 0 for."""
    with ExitStack() as stack:
        for module in experts.values():
            stack.callback(_put_back, module, vars(module).get("forward"))  # a spread model has one of its own there
            module.forward = _sparing(module.forward)
        yield


def _put_back(module: nn.Module, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def _sparing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tokens with equally many experts left run together, so that every way to run experts does without the others."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        given = (*args, *kwargs.values())[:3]
        if len(given) < 3 or given[1].shape != given[2].shape:  # not told which experts take which token
            return forward(*args, **kwargs)
        hidden, experts_Sk, weights_Sk = given
        left_Sk = weights_Sk != 0
        counts_S = left_Sk.sum(-1)
        if bool(left_Sk.all()):
            return forward(*args, **kwargs)
        hidden_Sd = hidden.reshape(-1, hidden.shape[-1])
        out_Sd = torch.zeros_like(hidden_Sd)
        for count in counts_S.unique().tolist():
            if count:
                rows_N = (counts_S == count).nonzero()[:, 0]
                places_Nc = left_Sk[rows_N].nonzero()[:, 1].view(-1, count)
                chosen = (part[rows_N].gather(1, places_Nc) for part in (experts_Sk, weights_Sk))
                out_Sd[rows_N] = forward(hidden_Sd[rows_N], *chosen)
        return out_Sd.view_as(hidden)

    return run
