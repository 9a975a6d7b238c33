"""Ctrl-C and SIGTERM while a sweep runs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from isoflop.core.errors import StopNow

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """First Ctrl-C (or SIGTERM, which schedulers send before they kill): drain. Second: stop now.

    Attributes:
        draining: nothing new is begun.
    """

    def __init__(self) -> None:
        self.draining = False
        self._at_once = False
        self._handler: Callable[[int, Any], None] | None = None

    @contextmanager
    def watched(self, running: Callable[[], str], tell: Callable[[str], None]) -> Iterator[None]:
        """Take the signals inside the ``with`` block; the second raises StopNow.

        Args:
            running: what is waited for, in words; empty when it is nothing.
            tell: is told of the first signal, at once: by a thread, whatever this one is busy with. (A handler may have
                interrupted a write to the same file, and waits itself for the end of a long call.)
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: Any) -> None:
            if self.draining or self._at_once:
                self.draining = True
                raise StopNow
            self.draining = True

        def announce() -> None:
            while data := os.read(ours, 1):
                if data[0] in _SIGNALS:
                    name, waiting = signal.Signals(data[0]).name, "" if self._at_once else running()
                    what = f"waiting for {waiting}; once more to stop now" if waiting else "ending the sweep"
                    tell(f"{name}: {what}")
                    return

        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        fd = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        old = {s: signal.signal(s, interrupt) for s in _SIGNALS}
        self._handler = interrupt
        thread = threading.Thread(target=announce, name="announces signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._handler = None
            for number, handler in old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd)
            os.close(theirs)
            thread.join()
            os.close(ours)

    def keep(self) -> None:
        """Take the signals back: a library that came up since (Ray's own, which prints a stack of C++) may have taken them."""
        if self._handler is not None:
            for number in _SIGNALS:
                signal.signal(number, self._handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where nothing runs yet, the first signal stops already."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
