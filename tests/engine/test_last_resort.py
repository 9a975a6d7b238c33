"""Whatever a command raises ends in one line and an exit code; a traceback only where somebody asks for it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

import click
import pyarrow as pa
import pytest

from isoflop import cli
from isoflop.core.errors import UserError

RAISED: dict[str, tuple[Callable[[], BaseException], int, str]] = {
    "a user's error": (lambda: UserError("knob k = 3 is wrong"), 2, "knob k = 3 is wrong"),
    "wrong usage": (lambda: click.UsageError("no such option"), 2, "no such option"),
    "a name that the system refuses": (
        lambda: OSError(errno.ENAMETOOLONG, "File name too long", "x" * 3000),
        2,
        "file name too long",
    ),
    "a folder for a file": (lambda: IsADirectoryError(errno.EISDIR, "Is a directory", b"a\xff"), 2, "is a directory"),
    "a file that may not be read": (lambda: PermissionError(errno.EACCES, "Permission denied", "secret"), 2, "secret"),
    "a full disk": (lambda: OSError(errno.ENOSPC, "No space left on device", "x"), 70, "No space left"),
    "no connection": (lambda: ConnectionRefusedError(errno.ECONNREFUSED, "refused"), 70, "refused"),
    "Arrow": (lambda: pa.ArrowInvalid("Integer value 9007199254740993\nnot in range"), 70, "9007199254740993 not in"),
    "a value": (lambda: ValueError("expected non-negative integer"), 70, "unexpected ValueError: expected"),
    "a bug": (lambda: TypeError("multiple values for 'seed'"), 70, "unexpected TypeError"),
    "nothing said": (lambda: AssertionError(), 70, "unexpected AssertionError"),
    "too deep": (lambda: RecursionError("maximum recursion depth exceeded"), 70, "RecursionError"),
    "no memory": (lambda: MemoryError(), 70, "not enough memory"),
    "a long story": (lambda: ValueError("word " * 5000), 70, "…"),
    "text that is no text": (lambda: ValueError("\udcff \ud83d"), 70, "unexpected ValueError"),
    "an interrupt": (lambda: KeyboardInterrupt(), 130, "stopped"),
    "an abort": (lambda: click.Abort(), 130, "stopped"),
}


def ended(
    arguments: list[str], error: BaseException, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[object, str]:
    @click.command("ls")
    def broken() -> None:
        raise error

    monkeypatch.setattr(cli._LazyGroup, "get_command", lambda self, ctx, name: broken)
    monkeypatch.setattr(sys, "argv", ["isoflop", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err.lstrip("\n")  # click leaves the line that ^C stands in


@pytest.mark.parametrize("case", RAISED)
def test_whatever_a_command_raises_is_one_line(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ISOFLOP_TRACEBACK", raising=False)
    make, code, words = RAISED[case]
    found, err = ended(["ls"], make(), capsys, monkeypatch)
    assert found == code, err
    assert err.startswith("isoflop: ")
    assert err.count("\n") == 1
    assert words in err
    assert len(err) < 900
    assert ("report this line" in err) == (code == 70)
    assert ("isoflop --traceback ls" in err) == (code == 70)


@pytest.mark.parametrize("case", [c for c in RAISED if c not in ("wrong usage",)])
@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_traceback_comes_when_asked_for(
    how: str, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, code, words = RAISED[case]
    monkeypatch.setenv("ISOFLOP_TRACEBACK", "1" if how == "variable" else "")
    found, err = ended(["--traceback", "ls"] if how == "flag" else ["ls"], make(), capsys, monkeypatch)
    assert found == code
    assert "Traceback (most recent call last)" in err
    assert f"line {make.__code__.co_firstlineno}" in err or "broken" in err
    last = err.splitlines()[-1]
    assert last.startswith("isoflop: ")
    assert words in last


def test_the_line_says_where_in_isoflop(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoflop.cli.show.Store.open", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["isoflop", "ls"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 70
    assert "unexpected ZeroDivisionError: division by zero (cli/show.py:" in capsys.readouterr().err
