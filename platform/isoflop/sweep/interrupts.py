"""Ctrl-C and SIGTERM while a sweep runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """First Ctrl-C (or SIGTERM, which schedulers send before they kill): drain. Second: stop now.

    Attributes:
        draining: nothing new is begun.
    """

    def __init__(self) -> None:
        self.draining = False
        self._notice = ""

    @contextmanager
    def watched(self, running: Callable[[], int]) -> Iterator[None]:
        """Take the signals inside the ``with`` block; the second raises KeyboardInterrupt.

        Args:
            running: number of jobs that are waited for.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: Any) -> None:
            if self.draining:
                raise KeyboardInterrupt
            self.draining = True
            # No output from here: the signal may have interrupted a write to the same file.
            self._notice = f"{signal.Signals(number).name}: waiting for {running()} running jobs; once more to stop now"

        old = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def notice(self) -> str:
        """What is to be told of the first signal, once; empty when there is nothing."""
        told, self._notice = self._notice, ""
        return told
