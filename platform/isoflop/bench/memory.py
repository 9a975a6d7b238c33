"""``isoflop bench memory``: how the memory of a long prompt grows with its tokens, for every method on the KV cache.

What is alive at once is counted tensor by tensor on an untrained decoder with the proportions of a Llama of 8 billion
parameters at an eighth of its width, in bfloat16, so that figures are the same on every machine. Two depths tell what each
layer keeps from what a pass holds at its widest layer. Both are proportional to the width, so that the whole model's follow:
eight times as much per token and layer, 32 layers.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import click
import numpy as np
import torch

from isoflop.cli.common import console, emit, grid, json_option
from isoflop.core.errors import UserError, unknown
from isoflop.core.folder_context import FolderContext
from isoflop.core.knobs import KnobValue
from isoflop.methods.base import METHODS, build, method_knobs
from isoflop.methods.kv_cache.base import KvCacheMethod
from isoflop.methods.kv_cache.probe import RandomTokens
from isoflop.methods.untrained import untrained_llama
from isoflop.models.contexts import read_contexts
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.live_bytes import LiveBytes
from isoflop.models.lm import LmInfo, LmModel

VOCABULARY = 512
SHRUNK = 8
"""How much narrower the decoder is than the one whose figures are worked out."""
WIDTH, INNER, HEADS, KV_HEADS, LAYERS = 4096, 14336, 32, 8, 32
"""Of Llama 3.1 8B."""
DEPTHS = (2, 4)
SCORED, GENERATED = 64, 8
TRIED: dict[str, KnobValue] = {"keep": 0.5, "rolling": False, "dense_layers": 0, "sparse_start": 0, "start": 0.0}
"""Knobs of methods that have them: half of the tokens, and all layers of the shallow decoder compressed."""
PHASES = ("read", "score", "decode")
FULL = "none"
COLUMNS = {
    "method": "method", "read_slope": "read", "score_slope": "score", "decode_slope": "decode",
    "cache_gib": "cache GiB", "read_gib": "read GiB", "score_gib": "score GiB", "decode_gib": "decode GiB",
}  # fmt: skip


def bench_memory(tokens: tuple[int, ...], target: int, methods: tuple[str, ...] = ()) -> dict[str, Any]:
    """Peaks of reading a prompt, scoring what follows and decoding behind it.

    Args:
        tokens: lengths of prompts, two at least.
        target: tokens for which the large model's figures are worked out.
        methods: names; all on the KV cache when empty.

    Raises:
        UserError: fewer than two lengths, or a name that is none of a method on the cache.
    """
    lengths = sorted(set(tokens))
    if len(lengths) < 2:
        raise UserError("--tokens: one length has no slope; allowed: two or more")
    known = cache_methods()
    for name in methods:
        if name not in known:
            raise unknown("method on the KV cache", name, known)
    rows = []
    for name in methods or known:
        peaks = {(n, depth): _peaks(name, n, depth) for n in lengths for depth in DEPTHS}
        rows.append(_row(name, lengths, peaks, target))
    return {"tokens": lengths, "target": target, "rows": rows}


def cache_methods() -> list[str]:
    """Names of the methods that are measured: the model as it is, then all on the cache."""
    return [FULL, *(n for n in METHODS.names() if issubclass(METHODS.get(n), KvCacheMethod) and n != FULL)]


def _method(name: str) -> KvCacheMethod | None:
    """With half of the tokens, or with its defaults; what can go on evicting stops behind the prompt, as a server does."""
    if name == FULL:
        return None
    knobs = method_knobs(name)
    given = {k: v for k, v in TRIED.items() if k in knobs}
    method = build(name, given)
    assert isinstance(method, KvCacheMethod)
    return method


@torch.no_grad()
def _peaks(name: str, tokens: int, depth: int) -> dict[str, int]:
    """Bytes at the peak of each phase, above the weights, and bytes that stay behind the prompt."""
    lm = decoder(depth, tokens + SCORED + GENERATED + 1)
    rng = np.random.default_rng(0)
    context = rng.integers(0, VOCABULARY, tokens).tolist()
    tail = rng.integers(0, VOCABULARY, SCORED).tolist()
    method = _method(name)
    prepared = method.calibrate(lm, FolderContext.temporary(), 0) if hasattr(method, "calibrate") else None  # type: ignore[union-attr]
    found = {}
    applied = nullcontext() if method is None else method.apply(lm, prepared)
    with applied, LiveBytes() as live, read_contexts(lm, [context]) as read:
        found["read"], found["cache"] = live.peak, live.now
        live.forget_peak()
        read.score([tail], [SCORED])
        found["score"] = live.peak
        live.forget_peak()
        read.generate([tail[:1]], GENERATED, frozenset())
        found["decode"] = live.peak
    return found


def decoder(layers: int, positions: int) -> LmModel:
    """The narrow decoder, untrained, in bfloat16."""
    module, n_params, geometry = untrained_llama(
        VOCABULARY, width=WIDTH // SHRUNK, mlp=INNER // SHRUNK, layers=layers, heads=HEADS // SHRUNK,
        kv_heads=KV_HEADS // SHRUNK, positions=positions, spread=0.15, seed=0,
    )  # fmt: skip
    info = LmInfo(
        ref="bench/llama", family="bench", version="1", n_params=n_params, hooks=frozenset({ATTENTION}), geometry=geometry,
        text=RandomTokens(VOCABULARY, 256),
    )  # fmt: skip
    return LmModel(info, module.to(torch.bfloat16))


def _row(name: str, lengths: list[int], peaks: dict[tuple[int, int], dict[str, int]], target: int) -> dict[str, Any]:
    shallow, deep = DEPTHS
    (first, last), span = (lengths[0], lengths[-1]), lengths[-1] - lengths[0]
    row: dict[str, Any] = {"method": name, "peak_bytes": {n: peaks[n, deep] for n in lengths}}
    for phase in PHASES:
        row[f"{phase}_slope"] = math.log(peaks[last, deep][phase] / peaks[first, deep][phase]) / math.log(last / first)
    for what in ("cache", *PHASES):
        # per token: what a layer adds, and what is there once
        rise = {depth: (peaks[last, depth][what] - peaks[first, depth][what]) / span for depth in DEPTHS}
        of_layer = (rise[deep] - rise[shallow]) / (deep - shallow)
        once = rise[shallow] - shallow * of_layer
        row[f"{what}_gib"] = (LAYERS * of_layer + once) * SHRUNK * target / 2**30
    return row


@click.command("memory")
@click.argument("methods", nargs=-1)
@click.option(
    "--tokens",
    multiple=True,
    type=click.IntRange(256),
    default=(1024, 2048, 4096, 8192),
    show_default=True,
    help="Of a prompt; may be repeated.",
)
@click.option("--target", default=32768, show_default=True, type=click.IntRange(256), help="tokens of the large model")
@json_option
def memory(methods: tuple[str, ...], tokens: tuple[int, ...], target: int, as_json: bool) -> None:
    """Memory of long prompts: slopes of each METHOD on the cache (default: all), and what a model of 8B would take."""
    found = bench_memory(tokens, target, methods)

    def human() -> None:
        cells = [[row["method"], *(f"{row[c]:.2f}" for c in list(COLUMNS)[1:])] for row in found["rows"]]
        console().print(grid(list(COLUMNS.values()), cells, right=list(COLUMNS.values())[1:]))
        console().print(
            f"Slopes of the peak on log axes, {found['tokens'][0]} to {found['tokens'][-1]} tokens (1: it grows as they do), "
            f"and GiB above the weights for 8 billion parameters at {target} tokens in bfloat16, one prompt."
        )

    emit(found, as_json, human)
