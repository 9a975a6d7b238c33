"""Explicit meters: what the passes between two lines of code took, told by what sits in the model's hooks.

    with meter(model) as reading:
        model.logits(batch)
    reading.cache.stored

Occupants remember their last pass, and any pass may come between the one that is meant and the question what it took. A
meter forgets what was before when it opens, and keeps what it read when it closes, so that no pass before or behind it is
taken for the measured one. ``metered`` gives ``Method.footprint`` what the last closed meter read of its own occupant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from isoflop.core.hook import Hook
from isoflop.models.base import Model
from isoflop.models.byte_trees.tree import Counts
from isoflop.models.hooks.attention import ATTENTION, AttentionPolicy, CacheReport
from isoflop.models.hooks.byte_view import BYTE_VIEW, ByteView
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS, LayerPolicy
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, BlockRun


class BlockTokens(NamedTuple):
    """Tokens in the blocks of a vision encoder.

    Attributes:
        seen: by the attention and by the MLP of each block, prefix tokens included.
        left: patches behind the last block.
    """

    seen: tuple[tuple[int, int], ...]
    left: int


@dataclass
class Reading:
    """What a meter read, once it is closed; None where nothing sits in the hook, or no pass went through it.

    Several passes in one block count as what they leave behind: the steps of a generation add up to its cache.
    """

    _figures: dict[Hook[Any], Any] = field(default_factory=dict)
    _open: bool = True

    @property
    def cache(self) -> CacheReport | None:
        """Bytes of the key-value cache at the end, per example."""
        return self.of(ATTENTION)

    @property
    def tokens_per_layer(self) -> tuple[int, ...] | None:
        """Visual tokens that each layer of the decoder processed in the last pass over a prompt."""
        return self.of(DECODER_LAYERS)

    @property
    def block_tokens(self) -> BlockTokens | None:
        """Tokens in the blocks of the vision encoder."""
        return self.of(VISION_BLOCKS)

    @property
    def trees(self) -> Counts | None:
        """What the covering trees of byte strings took."""
        return self.of(BYTE_VIEW)

    def of(self, hook: Hook[Any]) -> Any:
        """What was read of a hook. Raises RuntimeError while the meter is open."""
        if self._open:
            raise RuntimeError("the meter is still open: read it behind its block")
        return self._figures.get(hook)

    def close(self, figures: Mapping[Hook[Any], Any]) -> None:
        """Keep what was read."""
        self._figures, self._open = dict(figures), False


class _Dial(NamedTuple):
    """How to forget, and to read, what an occupant remembers of its passes; None where there was no pass."""

    reset: Callable[[Any], None]
    read: Callable[[Any], Any]


_LAST: WeakKeyDictionary[Model, dict[Hook[Any], tuple[ref[Any], Any]]] = WeakKeyDictionary()
"""By model and hook: the occupant that the last closed meter saw, and what it read of it."""
_RUNNING: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()


@contextmanager
def meter(model: Model) -> Iterator[Reading]:
    """Read what the passes inside the block take.

    Raises:
        RuntimeError: a meter is running on this model already, whose passes would be forgotten.
    """
    if _RUNNING.get(model):
        raise RuntimeError(f"a meter is running on model {model.info.ref} already")
    watched = {hook: occupant for hook in _DIALS if (occupant := model.occupant(hook)) is not None}
    reading = Reading()
    for hook, occupant in watched.items():
        _DIALS[hook].reset(occupant)
    _RUNNING[model] = True
    try:
        yield reading
    finally:
        del _RUNNING[model]
    figures = {hook: _DIALS[hook].read(occupant) for hook, occupant in watched.items()}
    reading.close(figures)
    _LAST[model] = {hook: (ref(watched[hook]), figure) for hook, figure in figures.items()}


def metered(model: Model, hook: Hook[Any]) -> Any:
    """What the last closed meter read of the present occupant of a hook; None where none has read anything of it."""
    seen, figure = _LAST.get(model, {}).get(hook, (None, None))
    return figure if seen is not None and seen() is not None and seen() is model.occupant(hook) else None


def _cache_of(policy: AttentionPolicy) -> CacheReport | None:
    try:
        return policy.report()
    except ValueError:  # nothing has been compressed
        return None


def _forget_layers(policy: LayerPolicy) -> None:
    vars(policy).update(per_layer=[])


def _layers_of(policy: LayerPolicy) -> tuple[int, ...] | None:
    return tuple(getattr(policy, "per_layer", ())) or None


def _forget_blocks(run: BlockRun) -> None:
    run.counts, run.state = [], None


def _blocks_of(run: BlockRun) -> BlockTokens | None:
    return None if run.state is None else BlockTokens(tuple(run.counts), run.state.patches)


def _forget_trees(view: ByteView) -> None:
    view.counts = Counts()


def _trees_of(view: ByteView) -> Counts | None:
    return view.counts if view.counts.calls else None


_DIALS: dict[Hook[Any], _Dial] = {
    ATTENTION: _Dial(lambda policy: policy.forget(), _cache_of),
    DECODER_LAYERS: _Dial(_forget_layers, _layers_of),
    VISION_BLOCKS: _Dial(_forget_blocks, _blocks_of),
    BYTE_VIEW: _Dial(_forget_trees, _trees_of),
}
