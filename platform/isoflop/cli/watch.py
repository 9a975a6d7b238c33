"""``isoflop watch``: the progress of a sweep that runs in another process or on another host."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from isoflop.cli.common import clean, console, duration, emit, json_option, store_option
from isoflop.cli.live import LiveProgress, PlainProgress, counts, times
from isoflop.core.errors import UserError, unknown
from isoflop.ledger import Store
from isoflop.sweep.state import State, read_state


@click.command("watch")
@click.argument("name")
@click.option("--once", is_flag=True, help="Print the state as it is now, and end.")
@click.option("--every", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between looks.")
@store_option
@json_option
def watch_command(name: str, once: bool, every: float, store: str | None, as_json: bool) -> None:
    """Watch a sweep that is running somewhere else, until it ends.

    Ctrl-C ends the watching, not the sweep.
    """
    opened = Store.open(store)
    if name not in opened.sweeps():
        raise unknown("sweep", name, opened.sweeps(), within=f" in store {opened.shown}")
    state = read_state(opened, name)
    if state is None:
        raise UserError(f"sweep {name} has not told what it does (run by an older version?); isoflop show {name}")
    if not (once or as_json) and state.alive:
        state = _follow(opened, name, state, every)

    def human() -> None:
        console().print(_line(name, state), markup=False)

    emit(_plain(state), as_json, human)


def _follow(store: Store, name: str, state: State, every: float) -> State:
    """Redraw until the session is over or somebody has seen enough; returns the last state."""
    out = console()
    with LiveProgress(out, name) if out.is_terminal else PlainProgress() as progress:
        told = ""
        try:
            while state.alive:
                if state.line != told:
                    told = state.line
                    progress.line(told)
                progress.update(state.snapshot)
                time.sleep(every)
                state = read_state(store, name) or state
        except KeyboardInterrupt:
            pass
    return state


def _line(name: str, state: State) -> str:
    """One line: what is done, and whether it goes on."""
    if state.alive:
        now = f"running on {state.host}"
    elif state.ended:
        now = f"ended {duration(time.time() - state.at)} ago"
    else:
        now = f"stopped without a word, last seen {duration(time.time() - state.at)} ago on {state.host}: isoflop resume {name}"
    return f"{name}: {counts(state.snapshot)}; {times(state.snapshot)}; {now}"


def _plain(state: State) -> dict[str, Any]:
    found: dict[str, Any] = clean(asdict(state) | {"alive": state.alive})
    return found
