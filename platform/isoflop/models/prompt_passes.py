"""Passes over prompts that a model has made, kept for the next method on the cache.

Most methods on the cache leave the pass over a prompt what it is and differ in what they make of its keys and values. Among jobs of one
worker that read the same prompts, the first pays for the pass; the others are handed its queries, keys and values layer by layer. Figures
are the same to the last bit, and costs are measured on passes that really run (``read_contexts`` is told when it may look here).

What has been kept stays until there is no room and it has long not been asked for: tasks come round and round, and dropping what was used
longest ago would drop everything just before it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.memory import memory_of

MOST_BYTES = 4 * 2**30
SHARE_OF_FREE = 0.2
"""Of the free memory when the first pass is kept; never more than ``MOST_BYTES``."""


@dataclass
class PromptPass:
    """What is known of one pass.

    Attributes:
        calls: of every layer, in order.
        last_BW: logits behind the prompts' last tokens.
        used: number of the last look-up that wanted it.
    """

    calls: Sequence[AttentionCall]
    last_BW: Tensor
    used: int = 0

    @property
    def bytes(self) -> int:
        """Of queries, keys and values."""
        return sum(x.numel() * x.element_size() for c in self.calls for x in (c.q_BHTD, c.k_BGTD, c.v_BGTD))


class PromptPasses:
    """The passes of one model.

    Args:
        most_bytes: of all that is kept; None for a share of what is free when the first one comes.
    """

    def __init__(self, most_bytes: float | None = None) -> None:
        self._most = most_bytes
        self._kept: dict[bytes, PromptPass] = {}
        self._looked = 0

    def find(self, key: bytes) -> PromptPass | None:
        """The pass over prompts, by all that it depends on."""
        self._looked += 1
        found = self._kept.get(key)
        if found is not None:
            found.used = self._looked
        return found

    def keep(self, key: bytes, one: PromptPass) -> None:
        """Keep a pass where there is room."""
        if self._most is None:
            free = memory_of(str(one.last_BW.device))[0]
            self._most = min(MOST_BYTES, SHARE_OF_FREE * free)
        held = sum(other.bytes for other in self._kept.values())
        stale = sorted(
            (k for k, other in self._kept.items() if self._forgotten(other)), key=lambda k: self._kept[k].used
        )
        for other in stale:
            if held + one.bytes <= self._most:
                break
            held -= self._kept.pop(other).bytes
        if held + one.bytes <= self._most:
            one.used = self._looked
            self._kept[key] = one

    def _forgotten(self, one: PromptPass) -> bool:
        return self._looked - one.used > 4 * len(self._kept)
