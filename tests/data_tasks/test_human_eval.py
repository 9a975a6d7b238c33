"""Programs that a model wrote: right ones pass; wrong, hanging, forking, greedy ones fail and leave nothing behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from isoflop.core.errors import UserError
from isoflop.core.rows import read
from isoflop.tasks.data import programs
from isoflop.tasks.data.human_eval import HumanEval, program
from isoflop.tasks.data.programs import passes
from isoflop.testing.task_probes import own, reader_of_text

MARK = "isoflop_left_behind"


def running(mark: str) -> list[int]:
    """Processes whose command lines name a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [int(path.parent.name)] if mark in line else []
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


@pytest.fixture(params=[True, False], ids=["namespaces", "none"])
def namespaces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With namespaces where the kernel gives them, and as on a machine that has none."""
    monkeypatch.setattr(programs, "NAMESPACES", request.param)
    return bool(request.param)


def none_left(mark: str) -> bool:
    """Whether no process with a mark is left, in a while."""
    time.sleep(0.2)  # a process that is becoming another has no command line for a moment
    deadline = time.monotonic() + 10
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = running(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


ESCAPES = {
    "stays": "become()",
    "detached": "os.setsid() if os.getsid(0) != os.getpid() else None; libc.prctl(1, 0); become()",
    "children": "[libc.fork() or become() for _ in range(3)]; time.sleep(60)",
    "sessions": "[libc.fork() or (os.setsid(), become()) for _ in range(3)]; time.sleep(60)",
    "daemon": "libc.fork() and os._exit(0); os.setsid(); libc.fork() and os._exit(0); libc.prctl(1, 0); become()",
    "daemon of a program that ends": "libc.fork() or (os.setsid(), libc.fork() and os._exit(0), become())",
    "keeper killed": "os.getppid() and os.kill(os.getppid(), 9); become()",
}


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.usefixtures("namespaces")
def test_what_it_starts_and_writes_ends_with_it(escape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # others have folders in the common one
    mark = f"{MARK}{os.getpid()}"
    text = f"""
import ctypes, os, time
libc = ctypes.CDLL(None)
def become():
    os.chdir("/")  # a folder that has gone would end it
    os.execv({sys.executable!r}, ["python", "-c", "{mark} = 1; import time; time.sleep(300)"])
open("written", "w").write("x")
{ESCAPES[escape]}
"""
    passed = passes(text, 1)
    assert none_left(mark)
    assert not passed or escape == "daemon of a program that ends"  # it may end before its daemon is seen
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("namespaces")
def test_programs_start_no_processes() -> None:
    assert passes("import resource; assert resource.getrlimit(resource.RLIMIT_NPROC) == (0, 0)", 5)
    started = time.monotonic()
    assert not passes("import os, time\n[os.fork() for _ in range(3)]\ntime.sleep(100)", 60)
    assert time.monotonic() - started < 60  # as soon as it is seen, not when its time is over


@pytest.mark.usefixtures("namespaces")
def test_they_end_with_the_process_that_asked() -> None:
    mark = f"{MARK}{os.getpid()}"
    text = f"import os; os.execv({sys.executable!r}, ['python', '-c', '{mark} = 1; import time; time.sleep(300)'])"
    asked = f"from isoflop.tasks.data import programs; programs.NAMESPACES = {programs.NAMESPACES}; programs.passes({text!r}, 100)"
    with subprocess.Popen([sys.executable, "-c", asked]) as process:
        deadline = time.monotonic() + 300  # a loaded machine takes long to import what is asked
        while not [pid for pid in running(mark) if pid != process.pid] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [pid for pid in running(mark) if pid != process.pid]
        process.kill()
    assert none_left(mark)


FORGERIES = {
    "early": "",
    "names": "candidates = [v for m in list(sys.modules.values()) for v in list(vars(m).values())]",
    "arguments": "candidates = open('/proc/self/cmdline', 'rb').read().split(bytes(1)) + sys.orig_argv",
    "environment": "candidates = list(os.environb.values())",
    "input": "candidates = [os.read(0, 100)]",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_success_cannot_be_said_by_what_names_lead_to(forgery: str) -> None:
    text = f"""
import os, re, sys
candidates = []
{FORGERIES[forgery]}
words = [word.encode(errors="replace") if isinstance(word, str) else word for word in candidates]
texts = set(word for word in words if isinstance(word, bytes))
for word in texts:
    if re.fullmatch(rb"[0-9a-f]{{32}}", word) or len(word) == 16 and max(word) > 127:  # looks drawn by chance
        for place in range(1, 64):
            try:
                os.write(place, word)
            except OSError:
                pass
os._exit(0)
"""
    assert not passes(text, 5)


def test_calls_that_a_program_replaces_say_nothing() -> None:
    assert not passes("import os\nos.write = lambda *_: os._exit(0)\nraise ValueError", 5)
    assert passes("import os\nos.write = os._exit = print", 5)


def test_what_it_writes_is_not_kept() -> None:
    text = """
import os
block = bytes(2**20)
for place in range(64):
    try:
        os.set_blocking(place, False)
    except OSError:
        pass
while True:
    for place in range(64):
        try:
            os.write(place, block)
        except OSError:
            pass
"""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not passes(text, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


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
