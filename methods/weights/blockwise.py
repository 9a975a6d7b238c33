"""A model's passes over many batches, block by block: all batches through the first block, then all through the second.

What is measured inside the blocks is then held for one block at a time, and besides it the hidden states of the batches. The model
is not taken apart: it runs as ever up to its blocks, in whose places stand recorders that note how each is called; then the
blocks run on what was noted, the last one's states in the place of what they were given. Where a model does more between its blocks
than hand states on, which one row shows, the passes run whole. The head of a language model never runs.

Suffixes: B batch, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.methods.weights.fitness import rows_of
from isoflop.methods.weights.views import LinearView
from isoflop.models.base import Model
from isoflop.models.heads import run_to_head
from isoflop.models.hooks.matrices import BLOCK

CLOSE = 1e-3
"""Largest difference of states, relative to the largest, at which passes in two orders are the same."""


class _Enough(Exception):
    """Ends a pass at the last block."""


@dataclass(eq=False)
class _Call:
    """How a block is called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def states(self) -> Any:
        """The hidden states that it is given."""
        return self.args[0] if self.args else self.kwargs.get("hidden_states")

    def on(self, states_BTd: Tensor | None) -> _Call:
        """The same call with other states, or none."""
        if self.args:
            return _Call((states_BTd, *self.args[1:]), self.kwargs)
        return _Call((), {**self.kwargs, "hidden_states": states_BTd})

    def forgetful(self) -> _Call:
        """The same call without a cache, into which a block that runs again would write again."""
        from transformers import Cache

        def known(value: Any) -> Any:
            return None if isinstance(value, Cache) else value

        return _Call(tuple(map(known, self.args)), {name: known(value) for name, value in self.kwargs.items()})


class _Recorder(nn.Module):
    """Stands where a block was; all that is asked of it but to run the block answers."""

    def __init__(self, block: nn.Module, wrap: Callable[[Tensor], Any], last: bool, calls: list[_Call]) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a part of this one
        self.wrap, self.last, self.calls = wrap, last, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(_Call(args, kwargs))
        if self.last:
            raise _Enough
        return self.wrap(self.calls[-1].states)


class BlockPasses:
    """Passes of a model, in whichever order holds the least.

    Args:
        model: as it is now.
        views: its matrices.
        batches: for ``Model.supervised``.
    """

    def __init__(self, model: Model, views: Sequence[LinearView], batches: Sequence[Any]) -> None:
        self._model, self._views, self._batches = model, list(views), batches
        self._list = _list_of_blocks(model, views)

    @torch.no_grad()
    def run(self, watching: Callable[[list[LinearView]], Any]) -> None:
        """Run every batch; ``watching(views)`` gives a context in which all batches pass through the blocks of these views.

        The context's value is called after each batch. Contexts follow each other, block by block, or there is one for all.
        """
        if self._list is None or self._model.occupied or not self._hands_states_on():
            with watching(self._views) as ended:
                for batch in self._batches:
                    run_to_head(self._model, batch)
                    ended()
            return
        recorded = [self._recorded(batch) for batch in self._batches]
        states = [first for first, _ in recorded]
        for number, block in enumerate(self._list):
            with watching([view for view in self._views if view.layer == number]) as ended:
                for place, (_, calls) in enumerate(recorded):
                    states[place] = _run(block, calls[number], states[place])
                    calls[number] = _Call((), {})  # what only this block was given goes
                    ended()

    @torch.no_grad()
    def blocks(self) -> Iterator[tuple[int, Callable[[bool], None]]]:
        """One block after the other: its number, and a call that runs all batches through it, as often as is wanted.

        The call's argument says whether what comes out goes on to the next block; it must, once, the last time.

        Raises:
            ValueError: the model cannot be run block by block.
        """
        if self._list is None or self._model.occupied or not self._hands_states_on():
            raise ValueError("its blocks cannot be run one by one")
        recorded = [self._recorded(batch) for batch in self._batches]
        states = [first for first, _ in recorded]
        called = [[call.forgetful() for call in calls] for _, calls in recorded]
        for number, block in enumerate(self._list):

            def run(on: bool, number: int = number, block: nn.Module = block) -> None:
                for place, calls in enumerate(called):
                    found = _run(block, calls[number], states[place])
                    if on:
                        states[place], calls[number] = found, _Call((), {})

            yield number, run

    def _recorded(self, batch: Any) -> tuple[Any, list[_Call]]:
        """The states that the first block is given, and how each block is called besides."""
        assert self._list is not None
        calls: list[_Call] = []
        with _replaced(self._list, self._wraps, calls), suppress(_Enough):
            self._model.supervised(batch)
        return calls[0].states, [call.on(None) for call in calls]

    def _hands_states_on(self) -> bool:
        """Whether one row comes out of the last block as it does in a whole pass."""
        assert self._list is not None
        if not self._batches:
            return False
        row = rows_of(self._batches[0], [0])
        outputs: list[Any] = []
        with ExitStack() as stack:
            for block in self._list:
                stack.callback(block.register_forward_hook(lambda _m, _a, output: outputs.append(output)).remove)
            run_to_head(self._model, row)
        if len(outputs) != len(self._list):  # blocks that run twice, or not at all
            return False
        self._wraps = [_wrap_like(output) for output in outputs]
        wanted_BTd = _first(outputs.pop())
        try:
            states_BTd, calls = self._recorded(row)
            for block, call in zip(self._list, calls, strict=True):
                states_BTd = _run(block, call, states_BTd)
            return float((states_BTd - wanted_BTd).abs().max()) <= CLOSE * float(wanted_BTd.abs().max())
        except Exception:  # shapes that do not fit, things that are not there: each architecture in its own way
            return False


def _list_of_blocks(model: Model, views: Sequence[LinearView]) -> nn.ModuleList | None:
    """The list that all views lie in; None where there are several, another kind of container, or modules that blocks share."""
    names = {f"{view.name}."[: found.start(1) - 1] for view in views if (found := BLOCK.search(f"{view.name}."))}
    container = model.module.get_submodule(names.pop()) if len(names) == 1 else None
    if not isinstance(container, nn.ModuleList):
        return None
    watched = {id(view.module): view.layer for view in views}
    inside = [
        (watched[id(part)], number)
        for number, block in enumerate(container)
        for part in block.modules()
        if id(part) in watched
    ]
    return container if all(own == number for own, number in inside) else None


@contextmanager
def _replaced(blocks: nn.ModuleList, wraps: Sequence[Callable[[Tensor], Any]], calls: list[_Call]) -> Iterator[None]:
    kept = list(blocks)
    try:
        for number, (block, wrap) in enumerate(zip(kept, wraps, strict=True)):
            blocks[number] = _Recorder(block, wrap, number == len(kept) - 1, calls)
        yield
    finally:
        for number, block in enumerate(kept):
            blocks[number] = block


def _run(block: nn.Module, call: _Call, states_BTd: Tensor) -> Tensor:
    call = call.on(states_BTd)
    found: Tensor = _first(block(*call.args, **call.kwargs))
    return found


def _first(output: Any) -> Any:
    """The states that a block gives, alone or before other things."""
    return output[0] if isinstance(output, tuple) else output


def _wrap_like(output: Any) -> Callable[[Tensor], Any]:
    """Makes of states what a block gives."""
    extra = len(output) - 1 if isinstance(output, tuple) else None
    return lambda states: states if extra is None else (states, *[None] * extra)
