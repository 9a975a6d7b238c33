"""Two thousand sweeps that something went wrong with: each is planned, or refused in one line that names the file, soon."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from deadlines import deadline

from isoflop.cli import main
from isoflop.core.errors import UserError
from isoflop.sweep.plan import make_plan
from isoflop.sweep.resolve import resolve

pytestmark = pytest.mark.usefixtures("toy_parts")

SPECS = 2_000
PATIENCE = 20  # seconds per spec
TOY: dict[str, Any] = {"name": "s", "import": ["toy_parts"], "models": ["toy/s", "toy/m"], "tasks": ["toy-task"]}
GOOD: list[dict[str, Any]] = [
    {
        **TOY,
        "methods": [{"toy-tokens": {"tokens": [1, 4], "scale": {"low": 0.5, "high": 1.5, "step": 0.1}}}, "toy-full"],
        "exclude": [{"toy-tokens.tokens": 4, "model": "toy/s"}],
        "repeats": 2,
        "seed": 3,
    },
    {
        **TOY,
        "methods": [{"toy-tokens": {"tokens": {"low": 1, "high": 12}, "scale": {}, "mode": {}, "late": {"values": [0, 3], "when": {"mode": "scaled"}}}}],
        "search": {"sampler": "tpe", "options": {"n_startup_trials": 4}, "pruner": "median"},
        "budget": {"trials": 20, "hours": 1.5},
        "limits": {"timeout": "10m", "retries": 1},
        "resources": {"cpus": 1, "gpus": 0, "memory": "1GiB"},
    },
    {
        **TOY,
        "methods": ["toy-tokens", {"toy-required": {"strength": [0.1, 0.2]}}],
        "tasks": [{"toy-task": {"examples": 8}}, "toy-other"],
        "zip": [{"model": ["toy/s", "toy/m"], "toy-tokens.tokens": [2, 8]}],
        "objectives": [{"metric": "error"}, {"metric": "flops", "direction": "minimize", "task": "toy-task"}],
        "search": {"sampler": "nsga2"},
        "budget": {"jobs": 9, "flops": 1.0e9},
        "laws": [{"law": "product", "y": "error", "x": {"N": "N", "V": "V"}, "by": ["task"], "fixed": {"E": 0}, "bootstrap": 10}],
        "frontiers": [{"law": "product", "cost": "2*N*(Q+V)", "q": 4, "budgets": [1.0e6, 1.0e7]}],
    },
    {
        **TOY,
        "models": ["toy/s", "toy/m", "toy/l"],
        "methods": [{"toy-tokens": {"tokens": {"low": 1, "high": 64}}}],
        "search": {"sampler": "law", "target": {"kind": "allocation", "budget": 1.0e6, "width": 0.1}, "laws": ["product", "semilog"]},
    },
    {
        "name": "real",
        "models": ["tiny-llava/d24", {"tiny-llava/d48": {"tower": "cls"}}],
        "methods": ["none", {"quecc": {"k": [2, 3], "lr": {"low": 3.0e-4, "high": 3.0e-3, "log": True}}}, [{"mqt": {"m": [4, 16]}}, {"bitstack": {"bits": [5.0]}}]],
        "tasks": ["reading", {"visual-reasoning": {"examples": 50}}],
        "search": {"sampler": "random"},
        "budget": {"trials": 4},
    },
]  # fmt: skip
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 63, 64, 65, 10**6, 10**19, -(10**30), 0.0, -0.0, 0.1 + 0.2, 1e-300, 1e300, 1e308, float("nan"), float("inf"),
    -float("inf"), "", " ", "x", "toy/s", "toy-task", "toy-full", "toy-tokens", "error", "N", "2*N*(Q+V)", "1/0", "((", "__import__('os')", "a" * 3000,
    "\u00e9\u4e2d", "\x00", "line\nbreak", "10m", "4GiB", "-1h", "nan", "{}", "[[", "null", "~", "hf:/nowhere", "tiny-lm/text-d64?act=", "toy/s?seconds=x",
    [], [None], [[]], [[[1]]], [1, 1], [1, 2.5, "x"], [True, 1], ["toy/s", "toy/s"], list(range(300)), {}, {"x": 1}, {"low": 1}, {"low": 2, "high": 1},
    {"low": 0, "high": 1, "step": 1e-9}, {"low": 0, "high": 1e300, "step": 1}, {"low": 1, "high": 4, "log": True}, {"low": -1, "high": 4, "log": True},
    {"low": 1, "high": 10**20}, {"values": []}, {"value": [1]}, {"when": {}}, {"values": [1], "when": {"tokens": 1}}, {"step": 0}, {"step": -1},
    {"name": "x"}, {"ref": "toy/s"}, {1: 2}, {None: 1}, {"a": {"b": {"c": {}}}},
]  # fmt: skip
KEYS = [
    "name", "seed", "store", "import", "models", "methods", "tasks", "repeats", "zip", "exclude", "search", "objectives", "budget", "resources", "limits",
    "laws", "frontiers", "sampler", "options", "target", "axes", "by", "share", "cost", "pruner", "pruner_options", "low", "high", "step", "log", "when",
    "values", "value", "tokens", "mode", "kind", "metric", "task", "y", "x", "where", "weights", "objective", "delta", "q", "nonsense", "",
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree."""
    yield path
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in pairs:
        yield from places(child, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def mutated(tree: Any, rng: random.Random) -> Any:
    """The tree with one thing changed."""
    path = rng.choice([p for p in places(tree) if p] or [()])
    if not path:
        return copy.deepcopy(rng.choice(NASTY))
    parent, key = at(tree, path[:-1]), path[-1]
    kind = rng.randrange(6)
    if kind <= 2:
        parent[key] = copy.deepcopy(rng.choice(NASTY))
    elif kind == 3:
        parent[key] = copy.deepcopy(at(tree, rng.choice(list(places(tree)))))  # something from elsewhere
    elif kind == 4:
        del parent[key]
    elif isinstance(parent, dict):
        value = parent.pop(key)
        name = rng.choice([rng.choice(KEYS), str(key)[:-1], f"{key}x"])
        parent[name] = value
        if rng.random() < 0.3:
            parent[key] = copy.deepcopy(value)
    else:
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice(NASTY)))
    return tree


def scrambled(text: str, rng: random.Random) -> str:
    """The text with a few characters lost, doubled or put in."""
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(text) + 1)
        what = rng.choice(
            [
                "",
                " ",
                "  ",
                ":",
                "-",
                "[",
                "]",
                "{",
                "}",
                "&a ",
                "*a ",
                "!!python/none ",
                "#",
                "'",
                '"',
                "\t",
                "\n",
                "|",
                ">",
                "1e",
                ".",
                "\u2028",
            ]
        )
        text = text[:place] + what + text[place + rng.randrange(3) :]
    return text


def fuzzed(seed: int) -> str:
    """A sweep's text, wrong or not."""
    rng = random.Random(seed)
    tree: Any = copy.deepcopy(rng.choice(GOOD))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if isinstance(tree, (dict, list)):
            tree = mutated(tree, rng)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return scrambled(text, rng) if rng.random() < 0.25 else text


def outcome(path: Path, folder: Path) -> str:
    """``planned``, ``refused``, or what is wrong with how it ended."""
    try:
        with deadline(PATIENCE):
            make_plan(resolve(path), str(folder / "store"), folder / "cache")
    except UserError as error:
        text = str(error)
        wrong = [
            "several lines" * ("\n" in text or "\r" in text),
            "no file" * (path.name not in text),
            "too long" * (len(text) > 6000),
        ]
        return "refused" if not any(wrong) else f"refused with {', '.join(w for w in wrong if w)}: {text[:300]}"
    except BaseException as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "?"
        return f"{type(error).__name__}: {str(error)[:200]} at {where}"
    return "planned"


def exit_code(path: Path, folder: Path) -> tuple[int, int]:
    """Of the command line on the same file, and how many lines it says on standard error."""
    said = io.StringIO()
    arguments = ["isoflop", "plan", str(path), "--store", str(folder / "store"), "--cache-dir", str(folder / "cache")]
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said), redirect_stdout(io.StringIO()):
        patch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), said.getvalue().count("\n")


def check(seeds: range, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    path, seen, broken = folder / "fuzzed.yaml", {"planned": 0, "refused": 0}, {}
    for seed in seeds:
        path.write_text(fuzzed(seed), encoding="utf-8", errors="surrogatepass")
        ended = outcome(path, folder)
        if ended in seen:
            seen[ended] += 1
        else:
            broken[seed] = ended
        if seed % 25 == 0 and exit_code(path, folder) != {"planned": (0, 0), "refused": (2, 1)}.get(ended):
            broken[seed] = f"{ended}, and the command line ends with (exit code, lines) {exit_code(path, folder)}"
    assert not broken, "\n".join(f"seed {seed}: {ended}" for seed, ended in broken.items())
    assert min(seen.values()) > len(seeds) / 20, seen  # both kinds were tried
    assert not (folder / "store").exists()  # planning writes nothing


def test_some_fuzzed_specs(tmp_path: Path, toy_parts: ModuleType) -> None:
    check(range(60), tmp_path / "f")


@pytest.mark.slow
def test_two_thousand_fuzzed_specs(tmp_path: Path, toy_parts: ModuleType) -> None:
    check(range(SPECS), tmp_path / "f")
