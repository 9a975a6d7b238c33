"""How a session ends: what is written of it for people, and MLflow brought up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from isoflop.core.text import safe_line
from isoflop.sweep.note import Conclusion
from isoflop.sweep.progress import LogFile
from isoflop.track import Artifact, Tracker

if TYPE_CHECKING:
    from isoflop.sweep.api import SweepResults
    from isoflop.sweep.results import Findings

Conclude = Callable[["SweepResults"], Conclusion]
Draw = Callable[["Findings"], Sequence[Artifact]]
_WAIT_SECONDS, _TELL_SECONDS = 1.0, 10.0  # between looks at MLflow's backlog, and between lines about it
_QUIET = 10  # times the patience for an MLflow that has not said no
_LAST_SECONDS = 10.0  # for MLflow, when a session ends in an error


def conclusion_of(conclude: Conclude, opened: SweepResults, log: LogFile) -> Conclusion:
    """What there is to read, or one line that says why there is nothing."""
    log.line("writing the report")
    try:
        return conclude(opened)
    except KeyboardInterrupt:
        log.line(f"the report was left out; isoflop report {opened.name} writes it")
    except Exception as error:  # whatever is wrong with it, the sweep's results are safe and shown
        reason = safe_line(f"{type(error).__name__}: {error}", 300)
        log.line(f"the report was not written ({reason}); isoflop report {opened.name} tries again")
    return Conclusion()


def drawn(draw: Draw | None, findings: Findings, log: LogFile) -> Sequence[Artifact]:
    """Figures of what the sweep found, or one line that says why there are none."""
    try:
        return draw(findings) if draw is not None else ()
    except KeyboardInterrupt:
        log.line("figures were left out")
    except Exception as error:  # as above: a figure must not cost the results
        log.line(f"figures were left out ({safe_line(f'{type(error).__name__}: {error}', 300)})")
    return ()


def end_tracking(tracker: Tracker, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> bool:
    """Leave no parent run RUNNING when the session ends in an error; ``resume`` sets it running again."""
    if error is not None:
        tracker.finish([], {}, safe_line(f"stopped by {type(error).__name__}: {error}"), "FAILED")
    tracker.close(_LAST_SECONDS if error is not None else 0.0)
    return False


def await_tracker(tracker: Tracker, patience: float, log: LogFile) -> str:
    """Wait until MLflow shows everything, for as long as it gets nearer to that. Ctrl-C goes on without.

    Args:
        patience: seconds without a sign of progress from an MLflow that does not answer; one that has not said no (it makes
            its tables, or reads what it has) gets ten times as long.

    Returns:
        What MLflow lacks, why, and what helps, in a sentence; empty when it shows everything.
    """
    reason = _watched(tracker, patience, log)
    left = tracker.close(0.0)
    rows = f"{left} rows" if left else "laws and plots"
    if tracker.stuck:
        lacking = f"MLflow does not show everything ({rows}): {tracker.problem}"
    elif left or tracker.problem or reason:
        lacking = f"MLflow does not show everything yet ({rows}; {tracker.problem or reason}); `isoflop resume` will bring the rest"
    else:
        lacking = ""
    lacking = "; ".join(part for part in (lacking, tracker.refused) if part)
    if lacking:
        log.line(lacking)
    return lacking


def _watched(tracker: Tracker, patience: float, log: LogFile) -> str:
    """Wait, telling of it now and then. Returns why it ended before everything was shown; empty when all is done."""
    since = told = time.monotonic()
    steps = tracker.steps
    if left := tracker.backlog():
        log.line(f"waiting for MLflow: {left} rows to go (Ctrl-C: do not wait)")
    try:
        while not tracker.wait(min(_WAIT_SECONDS, patience)):
            now, allowed = time.monotonic(), patience if tracker.problem else _QUIET * patience
            if tracker.steps != steps:
                steps, since = tracker.steps, now
            if now - since >= allowed:
                return f"nothing has moved for {now - since:.0f} s"
            if now - told >= _TELL_SECONDS:
                told = now
                reason = f"; {tracker.problem}; at most {allowed - (now - since):.0f} s more" if tracker.problem else ""
                log.line(f"waiting for MLflow: {tracker.backlog()} rows to go{reason} (Ctrl-C: do not wait)")
    except KeyboardInterrupt:
        log.line("not waiting for MLflow any longer")
        return "not waited for"
    return ""
