"""What an error out of a job or a stage means: whose it is, how the row calls it, and whether trying again can help."""

from __future__ import annotations

import signal
import threading
import traceback
from pathlib import Path
from typing import Literal

from isoflop.core.errors import Infeasible, StopNow
from isoflop.core.text import MOST, safe_text

Status = Literal["failed", "infeasible"]

# Mistakes in somebody's code. Jobs are seeded, so a second attempt makes the same one; what is left (I/O, memory, a device, a
# library's own errors, values that were read) may go better elsewhere or later.
_MISTAKES = (
    TypeError, AttributeError, NameError, SyntaxError, LookupError, AssertionError, NotImplementedError, RecursionError,
    ZeroDivisionError,
)  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether another attempt, elsewhere or later, may end otherwise.

    Only Python's own types tell that it will not: a library's error may be derived from them for reasons of its own.
    """
    return not (isinstance(error, _MISTAKES) and type(error).__module__ == "builtins")


def is_interrupt(error: BaseException) -> bool:
    """Whether somebody wants this process to stop, as opposed to a job that raised KeyboardInterrupt by itself.

    While a sweep runs it takes the signals, and says so with an error of its own.
    """
    if isinstance(error, StopNow):
        return True
    taken = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    return isinstance(error, KeyboardInterrupt) and main and not taken


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or of an accelerator."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


def status_of(error: BaseException, fresh: bool, alone: bool) -> Status:
    """Too little memory is a property of the configuration, unless something else in this process may have taken it.

    Args:
        fresh: nothing else has run in this process before: earlier jobs may have leaked memory of the host.
        alone: no other model was warm, on the accelerator say.
    """
    if isinstance(error, MemoryError):
        return "infeasible" if fresh else "failed"
    if is_out_of_memory(error):
        return "infeasible" if alone else "failed"
    return "infeasible" if isinstance(error, Infeasible) else "failed"


def describe(error: BaseException) -> str:
    """The message, and the innermost frames of the traceback for whoever debugs a method."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in reversed(frames))
    try:
        message = safe_text(error, MOST - 500)
    except BaseException:  # an exception of somebody's own may fail at this, too
        message = "(no message)"
    return f"{message} [{safe_text(places, 490)}]"
