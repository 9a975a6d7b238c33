"""The hook ``experts``: which experts of a mixture take a token, and with what weight.

Shape suffixes: S tokens (batch times length), E experts, k experts per token, d width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.models.hooks.matrices import BLOCK, ROUTERS
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
    """The occupant: changes what the routers chose. An expert with weight 0 adds nothing."""

    @abstractmethod
    def route(self, layer: int, hidden_Sd: Tensor, routing: Routing) -> Routing:
        """The routing to use in a layer; of the same shapes."""


class ExpertsHook(Hook[ExpertPolicy]):
    """Forward hooks on the routers of the decoder."""

    def installed(self, model: Any, occupant: ExpertPolicy) -> AbstractContextManager[None]:
        """See ``watched_routers``."""
        return watched_routers(routers_of(model.decoder), occupant)


EXPERTS = ExpertsHook("experts", 24, "decides which experts of a mixture take a token")


def routers_of(decoder: nn.Module) -> dict[int, nn.Module]:
    """Routers by layer whose output is (logits, weights, numbers), as transformers' mixtures have it; empty when there is none."""
    found: dict[int, nn.Module] = {}
    for path, module in decoder.named_modules():
        place = BLOCK.search(f"{path}.")
        if place is not None and path.rsplit(".", 1)[-1] in ROUTERS and hasattr(module, "top_k"):
            found[int(place[1])] = module
    return found


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
