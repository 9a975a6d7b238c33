"""What tests of repairs share: a decoder, texts, and prompts made of real tokens.

Shape suffixes: B rows, T tokens, N tokens of a prompt, d width, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.jobs.job import Job, MethodSpec
from isoflop.methods.base import build
from isoflop.methods.own_weights import trained
from isoflop.methods.repair.base import RepairMethod
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT, Before, PromptPolicy
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel

VOCABULARY = 48
PAIRS = tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Bench:
    """A loaded decoder, and where stages are kept."""

    lm: LmModel
    ctx: FolderContext

    def embeds(self, ids: Tensor) -> Tensor:
        """Of tokens, by the model's own table."""
        found: Tensor = self.lm.decoder.get_input_embeddings()(ids).detach()
        return found

    @contextmanager
    def applied(self, *methods: tuple[str, dict[str, Any]], learned: Any = None) -> Iterator[None]:
        """Methods in place; ``learned`` is what the repair among them has learned."""
        with ExitStack() as stack:
            for name, knobs in methods:
                method = build(name, knobs)
                stack.enter_context(method.apply(self.lm, learned if isinstance(method, RepairMethod) else None))
            yield

    def learn(self, name: str, seed: int = 0, **knobs: Any) -> tuple[Any, list[float]]:
        """What a repair learns of the model as it is now, and the losses."""
        method = build(name, knobs)
        assert isinstance(method, RepairMethod)
        return trained(method, self.lm, self.ctx, seed)


class Given(PromptPolicy):
    """Embeddings that a test gives: the same for every row, or of each its own; some rows' may be shorter."""

    def __init__(self, embeds_BNd: Tensor, valid_BN: Tensor | None = None) -> None:
        self.embeds_BNd, self.valid_BN = embeds_BNd, valid_BN
        self.tokens = embeds_BNd.shape[1]

    def begin(self, ids_BT: Tensor, valid_BT: Tensor | None) -> Before:
        return Before(self.embeds_BNd, self.valid_BN)


@contextmanager
def behind(bench: Bench, ids_N: Tensor) -> Iterator[None]:
    """Embeddings of real tokens before every text."""
    with bench.lm.occupy(SOFT_PROMPT, Given(bench.embeds(ids_N)[None])):
        yield


def texts(rows: int = 3, tokens: int = 16, seed: int = 0) -> Tensor:
    """Random token ids (B, T)."""
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def asked(ids_BT: Tensor, prefix: int = 0, pads: tuple[int, ...] = ()) -> LmBatch:
    """All tokens of texts, the first of each row left out where it is padded."""
    valid_BT = None
    if pads:
        valid_BT = torch.arange(ids_BT.shape[1])[None] >= torch.tensor(pads)[:, None]
        ids_BT = ids_BT * valid_BT
    targets_BT = torch.full_like(ids_BT, NOT_SCORED)
    targets_BT[:, :-1] = ids_BT[:, 1:]
    return LmBatch(ids_BT, targets_BT, prefix, valid_BT)


def off(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def trial(*methods: tuple[str, dict[str, Any]], model: str = "tiny-lm/text-d64", task: str = "bits-per-byte") -> Job:
    """A job of some methods, as a sweep would make it."""
    specs = tuple(MethodSpec.of(name, build(name, knobs).knobs()) for name, knobs in methods)
    return Job(model, specs, task, 0, 0)
