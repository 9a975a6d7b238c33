"""Thousands of command lines on tables that people and programs really write, and on tables that nobody should: an answer, or one line
with exit code 2. No traceback, no warning from a library, no number that JSON cannot hold, nothing that hangs.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from deadlines import Hung, deadline

from isoflop.cli import main
from isoflop.laws.base import LAWS
from isoflop.laws.objective import OBJECTIVES

LINES, CHUNKS = 2000, 20
LONGEST = 20  # seconds
Rng = np.random.Generator


def pick(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


# tables


def sizes(rng: Rng, n: int) -> list:
    return list(10.0 ** rng.uniform(-1, 11, n)) if rng.random() < 0.5 else [pick(rng, ([1e8, 3e8, 1e9], [1, 4, 16])) for _ in range(n)]  # fmt: skip


def holes(rng: Rng, n: int) -> list:
    return [
        pick(rng, (float("nan"), float("inf"), -float("inf"), None, 0.0, -1.5, 1e308, 5e-324, 0.4)) for _ in range(n)
    ]


COLUMNS: dict[str, Callable[[Rng, int], Any]] = {
    "sizes": sizes,
    "errors": lambda rng, n: list(rng.uniform(0.05, 0.9, n)),
    "whole": lambda rng, n: [int(v) for v in rng.integers(1, 600, n)],
    "huge": lambda rng, n: pa.array([int(v) for v in rng.integers(2**53, 2**63 - 1, n)], pa.int64()),
    "unsigned": lambda rng, n: pa.array([2**64 - 1 - int(v) for v in rng.integers(0, 99, n)], pa.uint64()),
    "decimal": lambda rng, n: pa.array([10**30 + int(v) for v in rng.integers(0, 99, n)], pa.decimal256(40)),
    "holes": holes,
    "text": lambda rng, n: [
        pick(rng, ("a", "b", "1,5", "n/a", "", None, "größe", "x" * 300, "\x00\x07")) for _ in range(n)
    ],
    "numerals": lambda rng, n: [str(v) for v in rng.uniform(0, 9, n)],
    "dates": lambda rng, n: list(pd.date_range("2026-01-01", periods=n)),
    "lists": lambda rng, n: [[float(v)] for v in rng.uniform(0, 1, n)],
    "structs": lambda rng, n: [{"a": int(v)} for v in rng.integers(0, 3, n)],
    "truths": lambda rng, n: [bool(v) for v in rng.integers(0, 2, n)],
    "constant": lambda rng, n: [0.5] * n,
    "zeros": lambda rng, n: [0.0] * n,
    "negative": lambda rng, n: list(-rng.uniform(1, 9, n)),
    "nothing": lambda rng, n: pa.nulls(n),
    "bytes": lambda rng, n: [bytes([int(v), 255]) for v in rng.integers(0, 255, n)],
    "words": lambda rng, n: pa.array([pick(rng, ("s", "m", None)) for _ in range(n)]).dictionary_encode(),
}
NAMES = (
    "N",
    "V",
    "D",
    "Q",
    "error",
    "loss",
    "run",
    " N ",
    "a b",
    "größe",
    "x;y",
    "",
    "1",
    "N-V",
    "metrics",
    "🙂",
    "select",
    "n" * 300,
)
PLAIN = ("sizes", "sizes", "errors")


def good_table(rng: Rng) -> dict[str, Any]:
    """A table as it should be, with at most one column as it should not."""
    n, v = (
        a.ravel()
        for a in np.meshgrid(
            [1e8, 3e8, 1e9, 3e9][: int(rng.integers(2, 5))], [1.0, 4, 16, 64][: int(rng.integers(2, 5))]
        )
    )
    rows = len(n)
    table: dict[str, Any] = {
        "N": list(n), "V": list(v), "D": sizes(rng, rows), "run": COLUMNS[pick(rng, list(COLUMNS))](rng, rows),
        "error": list(0.1 + 0.6 * (n / 1e8) ** -0.2 * v**-0.1 + 0.01 * rng.standard_normal(rows)),
    }  # fmt: skip
    table["loss"] = table["error"]
    if rng.random() < 0.5:
        table[pick(rng, list(table))] = COLUMNS[pick(rng, list(COLUMNS))](rng, rows)
    if rng.random() < 0.2:
        table = {k: list(x) * 3 if isinstance(x, list) else pa.concat_arrays([x.combine_chunks() if isinstance(x, pa.ChunkedArray) else x] * 3) for k, x in table.items()}  # fmt: skip
    return table


def wild_table(rng: Rng) -> dict[str, Any]:
    rows = pick(rng, (0, 1, 2, 3, 5, 12, 40))
    names = list(dict.fromkeys(pick(rng, NAMES) for _ in range(int(rng.integers(1, 8)))))
    return {name: COLUMNS[pick(rng, PLAIN if rng.random() < 0.6 else list(COLUMNS))](rng, rows) for name in names}


def rows_table(rng: Rng) -> dict[str, Any]:
    """A table of methods that can be asked without a law, with at most one column as it should not be."""
    settings = [("none", 1.0), *((m, k) for m in ("a", "b")[: int(rng.integers(0, 3))] for k in (0.5, 0.25))]
    examples = int(rng.integers(1, 6))
    rows = [(m, k, e) for m, k in settings for e in range(examples)]
    n = len(rows)
    table: dict[str, Any] = {
        "method": [m for m, _, _ in rows], "knob.keep": [k for _, k, _ in rows], "example": [e for _, _, e in rows],
        "error": [float(v) for v in (rng.random(n) < 0.4)] if rng.random() < 0.5 else list(rng.random(n)),
        "kv_bytes": [1e3 * k for _, k, _ in rows], "flops": [1e9 * k for _, k, _ in rows], "seconds": list(rng.random(n)),
        "task": [pick(rng, ("t", "u")) if rng.random() < 0.1 else "t" for _ in rows],
    }  # fmt: skip
    for name in ("knob.keep", "example", "task", "seconds", "kv_bytes"):
        if rng.random() < 0.15:
            del table[name]
    if rng.random() < 0.4:
        table[pick(rng, list(table))] = COLUMNS[pick(rng, list(COLUMNS))](rng, n)
    return table


RAW = (
    b"", b"\n", b"\xef\xbb\xbfN,V,error\n1,2,.5\n", "N,V,größe\n1,1,2\n".encode("latin-1"), "N,V,error\n1,1,2\n".encode("utf-16"),
    b"N;V;error\n1;1;.5\n2;2;.4\n", b"N,V,error\n1,1\n", b"N,V,error\n" + b"1,1,.5\n" * 50, b"N,N,error\n1,1,.5\n", b"\x00\x01\xff" * 100,
    b"N,V,error\n" + b"9" * 400 + b",1,.5\n", b'N,V,"error\n1,2,3', b"N|V|error\n1|2|.4\n", b" N , V ,error\n1,2,.5\n1,3,.4\n",
    b"N,V,error\n1e400,1,.5\nnan,inf,-inf\n", b"N,V,error\r1,1,.5\r", b"PAR1", b"{}", b'{"N": 1}\n{"N": [2]}', b"[1, 2]", b"ARROW1\0\0",
)  # fmt: skip


def write(rng: Rng, folder: Path, good: Callable[[Rng], dict[str, Any]] = good_table) -> Path:
    """A file with a table, or with something else."""
    suffix = pick(rng, (".csv", ".csv", ".parquet", ".parquet", ".parquet", ".jsonl", ".arrow", ".tsv", ""))
    path = folder / f"t{suffix}"
    if rng.random() < 0.08:
        path.write_bytes(pick(rng, RAW))
        return path
    try:
        table = pa.table(good(rng) if rng.random() < 0.7 else wild_table(rng))
        if suffix == ".parquet":
            pa.parquet.write_table(table, path)
        elif suffix == ".arrow":
            pa.feather.write_feather(table, path)
        elif suffix == ".jsonl":
            table.to_pandas().to_json(path, orient="records", lines=True, date_format="iso")
        else:
            table.to_pandas().to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    except (pa.ArrowException, ValueError, OverflowError, UnicodeError):
        path.write_bytes(pick(rng, RAW))  # not every format holds every column
    return path


# command lines

COLS = ("N", "V", "D", "Q", "error", "loss", "run", "size", "a b", "", "metrics.x")
NUMBERS = (
    "0",
    "1",
    "-1",
    "0.5",
    "1e9",
    "1e12",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "x",
    "",
    "0x10",
    "9" * 400,
    "1e-300",
    "5,6",
)
EXPRESSIONS = (
    "N",
    "V*2",
    "1-error",
    "log(N)",
    "N**",
    "N/0",
    "exp(N)",
    "1/V",
    "sqrt(-N)",
    "__import__('os')",
    "max(N, V)",
    "N" * 50,
    "",
)
OPTIONS: dict[str, tuple[str, ...]] = {
    "--y": ("error", "loss", *EXPRESSIONS, *COLS),
    "--map": ("N=N,V=V", "N=N*1e9,V=V", "N=N", "V=V", "N=V,V=N", "N=,V=V", "N", "N=N,N=V", "D=D,N=N", "X=run", "N=log(N),V=V", "\udcff=N"),
    "--objective": (*OBJECTIVES, "l1"),
    "--delta": ("0.01", "1e-4", *NUMBERS),
    "--weights": ("N", "1/V", "error", "-N", "0*N", *COLS),
    "--where": ("V > 1", "error is not null", "N < 0", "run = 'a'", "1=1; drop table results", "((", "\udcff", "V > (select 1)", "true", "null", "'a'", "N is nan"),
    "--seed": ("0", "1", "-1", "x", "4294967296", "9" * 40),
    "--separator": (",", ",", ";", "", ";;", "\t", "ä", "'"),
    "--law": (*sorted(LAWS), "E + A*N**-alpha", "a*N", "a*log(N)+b", "prodct", "N*V", "a/(N-N)", "exp(a*N)", "a**b**N", "((((", "a+b+c*N+d*V+e*N*V"),
    "--by": ("run", "run", "N", "V", "run,N", "nope", "", ",", "error"),
    "--cluster": ("run", "run", "N", "V", "error", "nope", ""),
    "--bootstrap": ("0", "1", "2", "5", "40", "-1", "x"),
    "--scheme": ("cases", "cluster", "wild", "parametric", "no"),
    "--bounds": ("alpha=0:1", "E=0:", "A=:", "alpha=1:0", "E=nan:1", "zeta=0:1", "E=0", "alpha=0:0", "E=-inf:inf", "A=1e308:1e309"),
    "--fix": ("E=0", "alpha=0.2", "alpha=nan", "alpha=inf", "E=x", "A=-1", "zeta=1", "E=0,A=1,alpha=1,beta=1"),
    "--level": ("0.5", "0.9", *NUMBERS),
    "--cost": ("2*N*(Q+V)", "N*V", "N", "1/N", "Q", "N-V", "0*N", "2*M", "N**0", "-N", "exp(N)", "N*(Q"),
    "--q": ("0", "50", *NUMBERS),
    "--budget": ("1e12", "1e13", "1e10,1e11", "0", "-1", "nan", "inf", "", "x", "1e400", "1e-9"),
    "--sizes": ("1e8,1e9", "1,2,3", "0", "-1", "", "nan", "inf", "x"),
    "--tokens": ("1,4", "16", "0", "", "nan", "inf"),
    "--limits": ("V=1:64", "N=1:2e9", "V=64:1", "N=1:2", "V=nan:1", "V=0:inf", "W=0:1", "V=-5:-1", "V=0:0"),
    "--hold": ("V=4", "N=1e9", "V=0", "V=-1", "V=nan", "N=1e9", "N=1e9,V=4", "W=1", "V=inf"),
    "--forms": ("product,semilog", "product,a*N**b*V**c", "product,product", "", "nope", "a*N+b", "chinchilla,power", "N*V"),
    "--along": ("N", "V", "D", "nope", ""),
    "--share": ("0.5", "0.25,0.5", *NUMBERS),
    "--within": ("0.1", "0.01", *NUMBERS),
    "--versus": ("a", "none", "b", "nope", ""),
    "--baseline": ("none", "a", "nope", ""),
    "--speed-up": (),
    "--measured": (),
    "--price": ("kv_bytes", "flops", "seconds", "bytes", "weight_bytes", "gpu", "flops+1", "kv_bytes*0", "-flops", "error", ""),
    "--save": ("x.csv", "x.json", "x.tex", "x.png", "x.svg", "x.html", "x.parquet", "x.docx", "x", "no/x.csv"),
    "--names": ("knob.keep=keep", "method=method", "method=example", "repeat=example", "error=error", "knob.x=task", "bytes=kv_bytes*2", "x=y"),
    "--store": (".", ".", "/nonexistent/x", "a://b", "http://x", "\udcff"),
}  # fmt: skip
FLAGS = (*["--json"] * 12, "--help", "--nope")
SHARED = ("--y", "--map", "--objective", "--delta", "--weights", "--where", "--seed", "--separator", "--store")
FITTED = ("--law", "--by", "--cluster", "--bootstrap", "--scheme", "--bounds", "--fix", "--level")
ASKED = (
    "--share",
    "--within",
    "--speed-up",
    "--measured",
    "--versus",
    "--baseline",
    "--budget",
    "--price",
    "--save",
    "--names",
)
SPELLED = {"--price": "--cost", "--names": "--map"}  # options whose values are others where rows answer
TAKES = {
    "fit": SHARED + FITTED,
    "compare": (*SHARED, "--forms", "--along", "--bootstrap", "--by"),
    "answers": (
        *ASKED,
        *ASKED,
        "--y",
        "--where",
        "--seed",
        "--level",
        "--separator",
        "--law",
    ),  # of frontier, without a law
    "frontier": (*SHARED, *FITTED, "--cost", "--q", "--budget", "--sizes", "--tokens", "--limits", "--hold"),
}


def line(rng: Rng, folder: Path) -> list[str]:
    command = pick(rng, list(TAKES))
    path = (
        str(write(rng, folder, rows_table if command == "answers" else good_table))
        if rng.random() < 0.97
        else pick(rng, ("nope.csv", str(folder), "n" * 300, "sweep", "\udcff.csv", ""))
    )
    asking = command == "answers"
    arguments = ["frontier" if asking else command, path]
    if asking and rng.random() < 0.9:
        arguments += ["--measured", "--cost", pick(rng, ("kv_bytes", "flops"))]
    if not asking and rng.random() < 0.7:
        arguments += ["--map", "N=N,V=V"]
    if command == "frontier" and rng.random() < 0.7:
        arguments += ["--q", "50"]
    if command != "compare" and not asking:
        arguments += ["--bootstrap", pick(rng, ("0", "40"))]
    tame = rng.random() < 0.5  # the first values of each option are good ones: these lines get further
    for option in map(str, rng.permutation(TAKES[command])[: int(rng.integers(0, 5))]):
        arguments.append(SPELLED.get(option, option))
        if OPTIONS[option]:
            value = pick(rng, OPTIONS[option][:2] if tame else OPTIONS[option])
            arguments.append(str(folder / value) if option == "--save" else value)
    if rng.random() < 0.5:
        arguments.append(pick(rng, FLAGS))
    return arguments


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[object, str, str]:
    """Exit code, standard output and standard error, as a terminal would get them."""
    out, err = io.BytesIO(), io.BytesIO()
    terminal = (
        io.TextIOWrapper(out, "utf-8", write_through=True),
        io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True),
    )
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr(
            warnings, "showwarning", lambda m, c, f, n, *_: print(f"{f}:{n}: {c.__name__}: {m}", file=sys.stderr)
        )
        patch.setattr(sys, "argv", ["isoflop", *arguments])
        patch.setattr(sys, "stdout", terminal[0])
        patch.setattr(sys, "stderr", terminal[1])
        try:
            with deadline(LONGEST):
                main()
            code: object = "no exit"
        except SystemExit as ended:
            code = ended.code
        except Hung:
            code = "hung"
    return code, out.getvalue().decode(), err.getvalue().decode()


def refuse(text: str) -> Any:
    raise ValueError(text)


def faults(arguments: list[str], code: object, out: str, err: str) -> list[str]:
    """What is wrong with how a command ended."""
    if code == 2:
        wrong = [] if out == "" else ["output beside an error"]
        wrong += [] if err.startswith("isoflop: ") and err.count("\n") == 1 else ["not one line"]
        return wrong + ([] if len(err) < 2500 else ["a long line"])
    if code != 0:
        return [f"exit code {code}"]
    wrong = [] if err == "" else ["words on standard error beside an answer"]
    if "--json" in arguments and "--help" not in arguments:
        try:
            json.loads(out, parse_constant=refuse)
        except ValueError as error:
            wrong.append(f"no JSON: {error}")
    return wrong


def tried(first: int, count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("ISOFLOP_STORE", str(folder / "store"))
    monkeypatch.delenv("ISOFLOP_TRACEBACK", raising=False)
    found = []
    for number in range(first, first + count):
        mine = folder / str(number)
        mine.mkdir()
        arguments = line(np.random.default_rng([16, number]), mine)
        begun = time.monotonic()
        code, out, err = run(arguments, monkeypatch)
        if wrong := faults(arguments, code, out, err):
            told = " ".join(shlex.quote(a if len(a) < 200 else a[:200]) for a in arguments)
            found.append(
                f"{number} ({time.monotonic() - begun:.1f} s): {'; '.join(wrong)}\n  {told!r}\n  {err[-600:]!r}"
            )
    return found


def test_some_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(LINES, 40, tmp_path, monkeypatch) == []


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_many_command_lines(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = LINES // CHUNKS
    assert tried(chunk * size, size, tmp_path, monkeypatch) == []


def test_every_option_is_tried() -> None:
    from isoflop.cli import cli

    context = click.Context(cli)
    for name in ("fit", "compare", "frontier"):
        command = cli.get_command(context, name)
        assert command is not None
        known = {o for p in command.params if isinstance(p, click.Option) for o in p.opts} - {"--json", "--help"}
        takers = [name, "answers"] if name == "frontier" else [name]
        tried = {SPELLED.get(o, o) for taker in takers for o in TAKES[taker]} | {"--save"}
        assert known <= tried, f"{name}: {sorted(known - tried)}"


def test_the_fuzzer_notices() -> None:
    assert faults(["fit"], 2, "", "isoflop: no\n") == []
    assert faults(["fit"], 0, "{}", "") == []
    for bad in ((70, "", "isoflop: unexpected\n"), (1, "", "Traceback"), ("hung", "", ""), (2, "x", "isoflop: no\n"), (2, "", "isoflop: a\nb\n"), (0, "", "RuntimeWarning")):  # fmt: skip
        assert faults(["fit"], *bad)
    assert faults(["fit", "--json"], 0, '{"a": NaN}', "")
