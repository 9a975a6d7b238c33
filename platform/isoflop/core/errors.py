"""The errors a user can cause, and the one line each of them prints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import takewhile


class IsoflopError(Exception):
    """Base of every error that isoflop raises on purpose."""


class UserError(IsoflopError):
    """Bad input: the CLI prints the message as one line and exits with code 2, without a traceback."""

    exit_code = 2


class StopNow(KeyboardInterrupt):
    """Somebody wants the sweep to stop at once: no job's own doing, and nothing that a job may catch as an ``Exception``."""


class Unavailable(UserError):
    """What runs the jobs did not come up or gave way: Ray, a cluster, its head. The input may be right, so the exit code is
    another one; like all errors for users it is one line, and what was finished is kept."""

    exit_code = 3


class Infeasible(UserError):
    """A configuration that cannot exist: a knob the model's geometry rules out, a missing hook, too little memory.

    At plan time it is a user's error; inside a search it becomes a ledger row with status ``infeasible``.
    """


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most like ``name``, of equals one that begins like it; else the first that begins with it, or None."""
    known = [str(o) for o in options]
    found = difflib.get_close_matches(str(name), known, n=8, cutoff=0.6)
    likeness = {o: difflib.SequenceMatcher(None, o, str(name)).ratio() for o in found}
    begins = {
        o: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(o, str(name), strict=False))) for o in found
    }
    found.sort(key=lambda o: (-likeness[o], -begins[o]))
    begun = [o for o in known if len(name) > 1 and o.lower().startswith(name.lower())]
    return next(iter([*found, *begun]), None)


def unknown(kind: str, name: object, options: Iterable[str], where: str = "", within: str = "") -> UserError:
    """The error for a name that does not exist: says what is allowed and which name is nearest.

    Args:
        kind: what the name should have been ("method", "knob of quecc").
        name: what the user wrote.
        options: every allowed name.
        where: file, line and key, when known.
        within: where names of this kind are, e.g. " in store X"; stands behind the name.
    """
    allowed = sorted(str(o) for o in options)
    shown = ", ".join(allowed[:20]) + (", …" if len(allowed) > 20 else "")
    hint = nearest(str(name), allowed)
    prefix = f"{where}: " if where else ""
    guess = f" (did you mean {hint!r}?)" if hint else ""
    return UserError(f"{prefix}unknown {kind} {name!r}{within}{guess}; allowed: {shown or 'none'}")
