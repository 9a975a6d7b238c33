"""The hook ``residual``: what each decoder layer adds to the residual stream, token by token.

Shape suffixes: B batch, T tokens, d width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.models.hooks.occupant import Occupant


class ResidualPolicy(Occupant):
    """The occupant: says what enters the next layer, from what entered this one and what it gave. Gradients flow."""

    @abstractmethod
    def update(self, layer: int, before_BTd: Tensor, after_BTd: Tensor) -> Tensor:
        """The stream behind a layer, (B, T, d).

        Args:
            before_BTd, after_BTd: the stream as the layer found it and as it left it.
        """


class ResidualHook(Hook[ResidualPolicy]):
    """Forward hooks on the decoder's layers."""

    def installed(self, model: Any, occupant: ResidualPolicy) -> AbstractContextManager[None]:
        """See ``watched_layers``."""
        return watched_layers(model.decoder_layers, occupant)


RESIDUAL = ResidualHook("residual", 22, "decides what a decoder layer adds to the residual stream, token by token")


@contextmanager
def watched_layers(layers: nn.ModuleList, policy: ResidualPolicy) -> Iterator[None]:
    """Inside the ``with`` block the output of every layer goes through ``policy``."""
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(_changer(number, policy)).remove)
        yield


def _changer(number: int, policy: ResidualPolicy) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def change(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (policy.update(number, args[0], output[0]), *output[1:])
        return policy.update(number, args[0], output)

    return change
