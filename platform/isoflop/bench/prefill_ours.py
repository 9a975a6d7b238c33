"""Our side of ``isoflop bench prefill``: a process of its own, which reads a prompt under each method and scores what follows.

Shape suffixes: G key-value heads, M kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import torch

from isoflop.bench.prefill_measure import answer, asked, measured
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import KvCacheMethod
from isoflop.models.contexts import Contexts, read_contexts
from isoflop.models.family import family_of
from isoflop.models.lm import LmModel
from isoflop.models.segments import NEVER


def run(lm: LmModel, ids: list[int], tail: list[int], name: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """Read ``ids`` under a method, score ``tail`` behind them."""
    method = None if name == "none" else build(name, knobs)
    with nullcontext() if method is None else method.apply(lm, None):
        opened, prefill = measured(lambda: _opened(lm, ids))
        with opened as contexts:
            scores, scoring = measured(lambda: contexts.score([tail], [len(tail)]))
            kept = _kept(lm, method) if isinstance(method, KvCacheMethod) else None
    return {"prefill": prefill, "scoring": scoring, "nll": float(scores.nll_B[0]) / len(tail), "kept": kept}


def _opened(lm: LmModel, ids: list[int]) -> Any:
    block = read_contexts(lm, [ids])
    contexts = block.__enter__()

    @contextmanager
    def rest() -> Iterator[Contexts]:
        try:
            yield contexts
        finally:
            block.__exit__(None, None, None)

    return rest()


def _kept(lm: LmModel, method: KvCacheMethod) -> list[list[list[int]]] | None:
    """Positions that each head of each layer holds of the prompt, before what was scored."""
    stores = method.cache(lm).stores()
    heads = [stores[layer].segments[0].positions_BGN[0].sort(-1).values.tolist() for layer in sorted(stores)]
    return [[[place for place in head if place != NEVER] for head in layer] for layer in heads]


def loaded(model: str, cache: str) -> LmModel:
    """The checkpoint in float32, as the other side has it, whatever its weights are stored in."""
    family = family_of(model)
    info = family.info(model, {"dtype": "float32"})
    lm = family.load(info, family.weights(info, (), 0), FolderContext(cache))
    assert isinstance(lm, LmModel)
    return lm


def main() -> None:
    """Answer what the bench asked."""
    given = asked()
    torch.set_num_threads(given["threads"])
    with TemporaryDirectory() as folder, torch.no_grad():
        lm = loaded(given["model"], folder)
        rows = []
        for tokens in given["tokens"]:
            ids, tail = given["ids"][:tokens], given["ids"][tokens : tokens + given["scored"]]
            run(lm, ids[:64], tail, "none", {})  # what is only done once
            for name, knobs in given["methods"]:
                rows.append({"method": name, "tokens": tokens, **run(lm, ids, tail, name, knobs)})
        answer(rows)


if __name__ == "__main__":
    main()
