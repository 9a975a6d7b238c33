"""Programs that a model wrote: right ones pass; wrong, hanging, forking, greedy ones fail and leave nothing behind."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from isoflop.core.errors import UserError
from isoflop.tasks.data.human_eval import HumanEval, program
from isoflop.tasks.data.programs import passes
from isoflop.tasks.data.rows import read
from isoflop.testing.task_probes import own, reader_of_text

MARK = "isoflop_left_behind"


def running(mark: str) -> list[str]:
    """Command lines of processes that name a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [line] if mark in line else []
    return found


def test_right_solutions_pass_and_cut_ones_do_not() -> None:
    for row in read(own("programs.jsonl")).rows:
        begun = row["prompt"], row["test"], row["entry_point"]
        solution = "\n" + row["canonical_solution"]
        assert passes(program(begun[0], f"{solution}\ndef next():\n    broken(", *begun[1:]), 5)
        assert not passes(program(begun[0], "\n    return None\n", *begun[1:]), 5)
        assert not passes(program(begun[0], "\n    this is no Python", *begun[1:]), 5)


@pytest.mark.parametrize(
    "text",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "x = bytearray(4 * 2**30)",
        "open('large', 'wb').write(bytes(2**22))",
        "raise SystemExit",
        "print('x' * 10**6); 1 / 0",
    ],
)
def test_what_hangs_leaves_early_or_takes_too_much_fails_in_time(text: str) -> None:
    started = time.monotonic()
    assert not passes(text, 1)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("detached", ["", "os.setsid();"])
def test_what_it_starts_and_writes_ends_with_it(detached: str) -> None:
    before = set(Path(tempfile.gettempdir()).glob("isoflop-program-*"))
    code = f"import time; {MARK}{os.getpid()} = 1; time.sleep(120)"
    text = f"""
import os, sys
open("written", "w").write("x")
for _ in range(3):
    if os.fork() == 0:
        {detached or "pass"}
        os.execv({sys.executable!r}, ["python", "-c", {code!r}])
while True:
    pass
"""
    assert not passes(text, 1)
    deadline = time.monotonic() + 20
    while (left := running(f"{MARK}{os.getpid()}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    if detached and left:
        pytest.skip("the kernel gives no namespaces: a process that detaches itself is not found")
    assert not left
    assert set(Path(tempfile.gettempdir()).glob("isoflop-program-*")) == before


def test_it_has_no_network_where_the_kernel_allows_that() -> None:
    text = "import os\nassert open('/proc/net/dev').read().count(':') <= 1, 'more than the loopback'"
    if not passes("import os; assert os.getpid() == 1", 5):
        pytest.skip("the kernel gives no namespaces")
    assert passes(text, 5)


def test_nothing_runs_unless_the_sweep_says_so() -> None:
    lm, _ = reader_of_text()
    task = HumanEval(data=own("programs.jsonl"))
    with pytest.raises(UserError, match=r"task human-eval: execute = false; .* execute: true"):
        task.check(lm.info)
    HumanEval(data=own("programs.jsonl"), execute=True).check(lm.info)


def test_untrained_models_pass_nothing() -> None:
    lm, ctx = reader_of_text()
    task = HumanEval(data=own("programs.jsonl"), execute=True, max_tokens=4)
    scores = [shard.errors for shard in task.evaluate(lm, ctx, 0)]
    assert [float(error) for part in scores for error in part] == [1.0] * 4
