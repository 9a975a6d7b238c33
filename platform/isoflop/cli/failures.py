"""How a command ends when something raises: one line on standard error, and a traceback where somebody asked for it."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path

import click

from isoflop.core.errors import UserError
from isoflop.core.text import safe_line, safe_text

UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h: no wrong input (2), no failed job (1)
VARIABLE = "ISOFLOP_TRACEBACK"
_LONGEST = 400  # characters of a message that nobody wrote for a terminal
_NAMED = {  # what the system says of a file that was named wrongly
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS,
    errno.EEXIST, errno.EINVAL,
}  # fmt: skip


class Shown:
    """Whether tracebacks are shown; the group's option sets it while the command line is read."""

    def __init__(self) -> None:
        self.traceback = False


def _ask(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and isinstance(ctx.obj, Shown):
        ctx.obj.traceback = True


traceback_option = click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    envvar=VARIABLE,
    callback=_ask,
    help=f"Show where an error comes from (or set {VARIABLE}=1).",
)


def end_with(error: BaseException, shown: Shown) -> int:
    """Say what ended a command, and return its exit code.

    Errors that isoflop raises on purpose, and click's, are their own line. A file that the system refuses is named. Anything
    else is nobody's input: the line says so, and how to report it.
    """
    if shown.traceback:
        click.echo(safe_text("".join(traceback.format_exception(error)).rstrip(), None), err=True)
    if isinstance(error, UserError):
        return _say(str(error), error.exit_code)
    if isinstance(error, click.ClickException):
        return _say(error.format_message(), error.exit_code)
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return _say("stopped", 130)
    if isinstance(error, BrokenPipeError):  # `isoflop show | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.filename is not None and error.errno in _NAMED:
        return _say(f"{_short(os.fsdecode(error.filename))}: {(error.strerror or str(error)).lower()}", 2)
    what = "not enough memory" if isinstance(error, MemoryError) else f"unexpected {type(error).__name__}"
    said = f": {_short(str(error))}" if str(error).strip() else ""
    return _say(
        f"{what}{said}{_place(error)}; nothing that was stored is lost. Please report this line with what "
        f"`isoflop --traceback {_command()}` prints above it",
        UNEXPECTED,
    )


def _say(text: str, code: int) -> int:
    click.echo(f"isoflop: {safe_line(text, None)}", err=True)
    return code


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 4 :]}"


def _place(error: BaseException) -> str:
    """The innermost line of isoflop's own that the error passed."""
    root = Path(__file__).parents[1]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(root):
            return f" ({path.relative_to(root)}:{frame.lineno})"
    return ""


def _command() -> str:
    """The command's name, and no argument: these may hold what is nobody's business."""
    return next((a for a in sys.argv[1:] if not a.startswith("-")), "…") + " …"
