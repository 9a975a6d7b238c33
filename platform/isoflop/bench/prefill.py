"""``isoflop bench prefill``: a real checkpoint reads long prompts under each eviction method, beside kvpress, in one run.

Each side is a process of its own that takes its turn; a peer may live in another environment (``--peer``). CPU seconds are
the least of several rounds; peaks are of resident memory above what the loaded model takes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from isoflop.cli.common import console, emit, grid, json_option
from isoflop.core.errors import UserError
from isoflop.models.checkpoints.source import locate

SIDES = Path(__file__).parent
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("streaming-llm", {"keep": 0.5, "sinks": 4, "rolling": False}),
    ("knorm", {"keep": 0.5}),
    ("snapkv", {"keep": 0.5, "window": 64, "kernel": 5}),
    ("tova", {"keep": 0.5, "rolling": False}),
    ("h2o", {"keep": 0.5, "rolling": False}),
    ("a2sf", {"keep": 0.5, "rolling": False}),
    ("pyramidkv", {"keep": 0.5, "window": 64, "kernel": 5, "beta": 20}),
    ("ada-kv", {"keep": 0.5, "window": 64, "kernel": 5, "pooling": "mean", "shares": "at-least", "floor": 0.2}),
    ("expected-attention", {"keep": 0.5, "sinks": 4, "future": 512}),
    ("kvzip", {"keep": 0.5, "sinks": 4, "chunk": 2000}),
]
SCORED = 64
"""Tokens behind each prompt."""
OWN = {
    "method": "method", "tokens": "tokens", "prefill_seconds": "read s", "prefill_over_stock": "/stock",
    "peak_mib": "peak MiB", "peak_over_stock": "/stock", "scoring_seconds": "score s", "nll": "nats",
}  # fmt: skip
BESIDE = {
    "method": "method", "tokens": "tokens", "prefill_over_kvpress": "read/its", "peak_over_kvpress": "peak/its",
    "scoring_over_kvpress": "score/its", "nll": "nats", "kvpress_nll": "its", "same_positions": "same kept",
}  # fmt: skip


def bench_prefill(
    model: str, peer: str, text: str, tokens: tuple[int, ...], rounds: int, threads: int
) -> dict[str, Any]:
    """Measure both sides alternately.

    Args:
        model: ``hf:FOLDER``, or a repository that has been downloaded or can be.
        peer: a Python that has kvpress; empty for our side alone.

    Raises:
        UserError: no such model or peer, a side fails, or the text is too short.
    """
    if not model.startswith("hf:"):
        raise UserError(f"model {model}: is no checkpoint; allowed: hf:<folder> or hf:<owner>/<repository>")
    if peer and shutil.which(peer) is None:
        raise UserError(f"--peer {peer}: no such program; allowed: a Python in whose environment kvpress is installed")
    if peer and (done := subprocess.run([peer, "-c", "import kvpress"], capture_output=True, text=True)).returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise UserError(f"--peer {peer}: {last}; allowed: a Python in whose environment kvpress is installed")
    folder = locate(model, "main", weights=True)
    ids = _ids(model, folder, text)
    if len(ids) < max(tokens) + SCORED:
        raise UserError(
            f"--text: has {len(ids)} tokens; allowed: at least {max(tokens) + SCORED}, the longest prompt and {SCORED} that are scored"
        )
    given = {
        "model": f"hf:{folder}",
        "folder": str(folder),
        "ids": ids,
        "tokens": list(tokens),
        "methods": METHODS,
        "scored": SCORED,
        "threads": threads,
    }
    sides = {"ours": [sys.executable, "-m", "isoflop.bench.prefill_ours"]}
    if peer:
        sides["kvpress"] = [peer, str(SIDES / "prefill_kvpress.py")]
    found: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, command in sides.items():
            found[side].append(_ask(side, command, {**given, "positions": number == 0}, threads))
    return {
        "model": model,
        "threads": threads,
        "rounds": rounds,
        "rows": _rows({s: _best(r) for s, r in found.items()}),
    }


def _ids(model: str, folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {model}: has no tokenizer that can be read ({str(error).strip().splitlines()[0][:200]})"
        ) from None
    ids: list[int] = tokenizer(Path(text).read_text(errors="replace"), verbose=False)["input_ids"]
    return ids


def _ask(side: str, command: list[str], given: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # memory of large tensors goes back at once, or peaks would not be of one call
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        question, reply = Path(folder, "given.json"), Path(folder, "rows.json")
        question.write_text(json.dumps(given))
        done = subprocess.run([*command, str(question), str(reply)], env=env, capture_output=True, text=True)
        if done.returncode or not reply.is_file():
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise UserError(f"side {side} failed: {last}")
        rows: list[dict[str, Any]] = json.loads(reply.read_text())
    return rows


def _best(rounds: list[list[dict[str, Any]]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Of every method and length the least seconds and the least peak; all else is the same in each round."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in (row for rows in rounds for row in rows):
        place = row["method"], row["tokens"]
        best = found.setdefault(place, row)
        for part in ("prefill", "scoring"):
            best[part] = {name: min(best[part][name], row[part][name]) for name in best[part]}
    return found


def _rows(sides: dict[str, dict[tuple[str, int], dict[str, Any]]]) -> list[dict[str, Any]]:
    ours, theirs = sides["ours"], sides.get("kvpress", {})
    rows = []
    for (method, tokens), own in ours.items():
        stock, other = theirs.get(("none", tokens), ours["none", tokens]), theirs.get((method, tokens))
        row = {
            "method": method,
            "tokens": tokens,
            "prefill_seconds": own["prefill"]["seconds"],
            "prefill_over_stock": own["prefill"]["seconds"] / stock["prefill"]["seconds"],
            "peak_mib": own["prefill"]["peak_bytes"] / 2**20,
            "peak_over_stock": own["prefill"]["peak_bytes"] / max(1.0, stock["prefill"]["peak_bytes"]),
            "scoring_seconds": own["scoring"]["seconds"],
            "nll": own["nll"],
        }
        if other is not None:
            row |= {
                "kvpress_prefill_seconds": other["prefill"]["seconds"],
                "kvpress_peak_mib": other["prefill"]["peak_bytes"] / 2**20,
                "kvpress_scoring_seconds": other["scoring"]["seconds"],
                "kvpress_nll": other["nll"],
                "prefill_over_kvpress": own["prefill"]["seconds"] / other["prefill"]["seconds"],
                "peak_over_kvpress": own["prefill"]["peak_bytes"] / max(1.0, other["prefill"]["peak_bytes"]),
                # kvpress scores behind a pyramid token by token
                "scoring_over_kvpress": None
                if method == "pyramidkv"
                else own["scoring"]["seconds"] / other["scoring"]["seconds"],
                "same_positions": _same(own["kept"], other["kept"]),
            }
        rows.append(row)
    return rows


def _same(ours: Any, theirs: Any) -> float | None:
    """Share of the kept positions on which both sides agree, over layers and heads."""
    if not ours or not theirs:
        return None
    shared, total = 0, 0
    for own_layer, other_layer in zip(ours, theirs, strict=True):
        for own, other in zip(own_layer, other_layer, strict=True):
            shared += len(set(own) & set(other))
            total += max(len(own), len(other))
    return shared / total


@click.command("prefill")
@click.argument("model")
@click.option(
    "--text", required=True, type=click.Path(exists=True, dir_okay=False), help="what the prompts are cut from"
)
@click.option(
    "--tokens",
    multiple=True,
    type=click.IntRange(128),
    default=(1024, 2048, 4096),
    show_default=True,
    help="Of a prompt; may be repeated.",
)
@click.option("--peer", default="", help="a Python in whose environment kvpress is installed")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@json_option
def prefill(
    model: str, text: str, tokens: tuple[int, ...], peer: str, rounds: int, threads: int, as_json: bool
) -> None:
    """Long prompts on a checkpoint (hf:FOLDER): seconds and peak memory of each eviction method, beside kvpress."""
    found = bench_prefill(model, peer, text, tokens, rounds, threads)

    def human() -> None:
        _print(found["rows"], OWN)
        if peer:
            _print([row for row in found["rows"] if "kvpress_nll" in row], BESIDE)
        console().print(
            f"CPU seconds of one pass, the least of {rounds}; threads: {threads}. /stock: over transformers' own pass; its: kvpress's."
        )

    emit(found, as_json, human)


def _print(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    cells = [[_shown(row.get(name)) for name in columns] for row in rows]
    console().print(grid(list(columns.values()), cells, right=list(columns.values())[1:]))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
