"""Run the tests that touch a model as other processors would, and say which of them failed where.

Every instruction set that this processor has, each with one thread and with two: numbers are added up in another order on
each, so that trained weights differ, and with them whatever stands near a tie. `make test-cpus` calls this; arguments are
those of pytest, beside `--on` and `--threads`:

    python tests/on_processors.py --on default,avx2 --threads 1 tests/sparsity -k cett
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT_MODELS = frozenset({"cluster", "dashboards", "engine", "frontier", "laws", "packaging", "search_law", "spec"})
"""Folders of tests that compute with NumPy or with nothing. Every other folder is run, also one that is new."""

AS_IF: Mapping[str, Mapping[str, str]] = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
}
"""From the least on. Torch's own kernels, the matrix products and the convolutions each choose for themselves: with the first
variable alone, matrix products stay those of the processor, and bfloat16 attention asks torch for kernels that it has not
compiled (`pack_vnni2`)."""


@dataclass(frozen=True)
class Place:
    """An instruction set and a number of threads."""

    capability: str
    threads: int

    def __str__(self) -> str:
        return f"{self.capability} x {self.threads}"

    def environment(self) -> dict[str, str]:
        """For a process that runs there."""
        names = {name for variables in AS_IF.values() for name in variables}
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        as_if = AS_IF.get(self.capability, {"ATEN_CPU_CAPABILITY": self.capability})
        threads = str(self.threads)
        waiting = {
            "OMP_WAIT_POLICY": "PASSIVE"
        }  # spinning costs two threads four times their work where others compute, too
        return {**inherited, **as_if, **waiting, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


@dataclass(frozen=True)
class Outcome:
    """What became of the tests in one place.

    Attributes:
        failed: names of tests that failed or could not be set up, in the order of the run.
        passed: how many did not.
        broke: the run itself came to no end, so that ``failed`` says nothing.
    """

    failed: tuple[str, ...]
    passed: int
    seconds: float
    broke: bool = False


def capabilities() -> list[str]:
    """What this processor can be taken for, from the least on."""
    variables = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    own = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    name = own.stdout.strip().lower()
    ladder = list(AS_IF)
    return ladder[: ladder.index(name) + 1] if name in ladder else ["default", name]


def folders() -> list[str]:
    """Those whose tests may touch a model."""
    found = {path.parent for path in (ROOT / "tests").glob("*/test_*.py")}
    return [str(path.relative_to(ROOT)) for path in sorted(found) if path.name not in WITHOUT_MODELS]


def run(place: Place, arguments: Sequence[str]) -> Outcome:
    """All tests in one place, with a cache of trained weights of its own."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="processors-") as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        cache = {"ISOFLOP_TEST_CACHE": str(Path(folder) / "cache")}
        done = subprocess.run([*command, *arguments], cwd=ROOT, env={**place.environment(), **cache})
        failed, passed = read(report) if report.exists() else ([], 0)
    broke = done.returncode not in (0, 1) or bool(done.returncode) != bool(failed)
    return Outcome(tuple(failed), passed, time.monotonic() - started, broke)


def read(report: Path) -> tuple[list[str], int]:
    """Failed tests of a report in JUnit's form, and how many of the others ran."""
    failed, passed = [], 0
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is None:
            passed += 1
    return list(dict.fromkeys(failed)), passed


def table(outcomes: Mapping[Place, Outcome]) -> str:
    """A line per test that failed anywhere, a column per place."""
    names = list(dict.fromkeys(name for outcome in outcomes.values() for name in outcome.failed))
    rows = [["", *map(str, outcomes)]]
    rows += [[name, *("FAILED" if name in outcome.failed else "" for outcome in outcomes.values())] for name in names]
    rows.append(["passed", *("broke off" if o.broke else str(o.passed) for o in outcomes.values())])
    rows.append(["seconds", *(f"{o.seconds:.0f}" for o in outcomes.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    """Run, print the table, and tell by the exit status whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", help="instruction sets, by default all that this processor has")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default: %(default)s)")
    given, arguments = parser.parse_known_args()
    own = capabilities()
    wanted = given.on.split(",") if given.on else own
    if unknown := [name for name in wanted if name not in own]:
        parser.error(f"this processor has no {unknown[0]}; allowed: {', '.join(own)}")
    if not any((ROOT / argument.partition("::")[0]).exists() for argument in arguments):
        arguments = [*arguments, *folders()]
    outcomes: dict[Place, Outcome] = {}
    for place in [Place(name, int(n)) for n in given.threads.split(",") for name in wanted]:
        print(f"\n=== {place.capability}, {place.threads} threads", flush=True)
        outcomes[place] = run(place, arguments)
    print(f"\n{table(outcomes)}")
    return int(any(outcome.failed or outcome.broke for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
