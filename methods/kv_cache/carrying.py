"""What the layers of one forward pass leave for one another about the tokens that they take at once.

In a one-pass evaluation a layer takes many queries together that a session would bring one by one. A memory belongs to the
queries that are taken together, so that each of them finds what was left about it, and not what was left about the query
before it; and it lives for one pass, so that no step finds the choice of another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isoflop.core.errors import Infeasible
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.moving import moved


class Memory(dict[str, Any]):
    """By name, what was left. Looking up what nobody left is refused in one line."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._layer = layer

    def __missing__(self, name: str) -> Any:
        """Raise Infeasible."""
        raise Infeasible(
            f"no layer up to {self._layer} left {name!r} about the tokens that it takes at once: some layer must leave it, nothing "
            "may drop tokens between that layer and this one, and both must take the same stride"
        )


class Carrying:
    """The memories of one pass."""

    def __init__(self) -> None:
        self._layer = -1
        self._memories: dict[tuple[Any, ...], Memory] = {}

    def enter(self, layer: int) -> None:
        """A layer begins; the first one of a pass, or of a step, finds every memory empty.

        Layers run in ascending order, so that a number which does not rise tells of another pass.
        """
        if layer <= self._layer:
            self._memories = {}
        self._layer = layer

    def onto(self, call: AttentionCall, tokens: tuple[Any, ...]) -> AttentionCall:
        """The call with the memory of its tokens, which goes where the layer is.

        Args:
            tokens: what names them: the same in all layers that take them at once.
        """
        memory = self._memories.setdefault(tokens, Memory(call.layer))
        memory.update((name, moved(left, call.q_BHTD.device)) for name, left in memory.items())
        return replace(call, carried=memory)
