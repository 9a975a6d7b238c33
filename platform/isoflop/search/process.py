"""A sampler that learns, in a process of its own: the driver goes on while it thinks.

One ask of TPE costs milliseconds at a thousand trials and one of a Gaussian process seconds, all of it Python under one
interpreter lock; in the driver's process that time would be missing for handing out jobs. Here the driver sends outcomes
and requests and takes proposals as they come. The process keeps nothing that the driver does not have: when it dies, the
driver goes on with a proposer of its own, rebuilt from what was told so far.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections import deque
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING

from isoflop.search.proposer import Proposal, Proposer, Tell
from isoflop.search.space import Config
from isoflop.search.strategy import Problem

if TYPE_CHECKING:
    from isoflop.search.strategies import OptunaStrategy

log = logging.getLogger(__name__)
_START = "import sys; sys.path[:] = {path!r}; from isoflop.search.process import serve; serve({fd})"
_END_SECONDS = 2.0


class ProposerProcess(Proposer):
    """Like :class:`isoflop.search.study.OptunaProposer` without a pruner; ``ask`` returns what is there and requests the rest.

    The process starts with the first ask, so that a finished sweep is opened without one.

    Args:
        strategy: makes the proposer, there and here; both can be pickled.
        problem: without a pruner.
    """

    def __init__(self, strategy: OptunaStrategy, problem: Problem) -> None:
        # what a sampler of Optuna's reads, and nothing that might not be pickled
        self._arguments = (strategy, Problem(problem.space, problem.aims, problem.seed))
        self._size = problem.space.size()
        self._told: list[Tell | Proposal] = []  # a proposal: a trial of an earlier session that runs again
        self._sent = 0
        self._open: dict[int, Proposal] = {}
        self._ready: deque[Proposal] = deque()
        self._requested = 0
        self._pipe: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._fallback: Proposer | None = None

    @property
    def pending(self) -> bool:
        return self._requested > 0

    @property
    def pid(self) -> int | None:
        """Of the process, once there is one."""
        return self._process.pid if self._process is not None else None

    def ask(self, count: int) -> list[Proposal]:
        if self._fallback is None:
            try:
                return self._ask(count)
            except (OSError, EOFError) as error:
                self._give_up(error)
        assert self._fallback is not None
        waiting = self._take_ready(count)
        return waiting + self._fallback.ask(count - len(waiting))

    def _ask(self, count: int) -> list[Proposal]:
        self.start()
        assert self._pipe is not None
        self._send_told()
        dry = False
        while self._pipe.poll():
            proposal: Proposal | None = self._pipe.recv()
            self._requested -= 1
            if proposal is None:
                dry = True
                continue
            self._ready.append(proposal)
            self._open[proposal.number] = proposal
        missing = count - len(self._ready) - self._requested
        if missing > 0 and not dry:
            self._pipe.send(missing)
            self._requested += missing
        return self._take_ready(count)

    def _take_ready(self, count: int) -> list[Proposal]:
        return [self._ready.popleft() for _ in range(min(count, len(self._ready)))]

    def tell(self, result: Tell) -> None:
        if self._fallback is not None:
            self._fallback.tell(result)
            return
        self._open.pop(result.number, None)
        self._told.append(result)

    def reserve(self, number: int, config: Config) -> None:
        if self._fallback is not None:
            self._fallback.reserve(number, config)
            return
        self._told.append(Proposal(number, config))

    def size(self) -> int | None:
        return self._size

    def wait(self, seconds: float) -> None:
        if self._pipe is not None and self._requested and not self._ready:
            with contextlib.suppress(OSError):  # the next ask will find out
                self._pipe.poll(seconds)

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
            self._process.kill()
            self._process.wait()
            self._process = None

    def start(self) -> None:
        if self._pipe is not None or self._fallback is not None:
            return
        ours, theirs = Pipe()
        code = _START.format(path=sys.path, fd=theirs.fileno())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._pipe = ours
        ours.send(self._arguments)

    def _send_told(self) -> None:
        assert self._pipe is not None
        for message in self._told[self._sent :]:
            self._pipe.send(message)
            self._sent += 1

    def _give_up(self, error: Exception) -> None:
        """The process is gone: go on in this one, from what was told."""
        log.warning("the search process ended (%s); searching in the driver", error or type(error).__name__)
        self.close()
        strategy, problem = self._arguments
        self._fallback = strategy.here(problem)
        for message in [*self._told, *self._open.values()]:
            _take(self._fallback, message)
        self._requested = 0


def _take(proposer: Proposer, message: Tell | Proposal) -> None:
    if isinstance(message, Tell):
        proposer.tell(message)
    else:
        proposer.reserve(message.number, message.config)


def serve(descriptor: int) -> None:
    """The process: take what comes, and propose while proposals are wanted; None for each that there is not.

    Ends when the driver closes the pipe or dies. Signals of the terminal are the driver's affair.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with Connection(descriptor) as pipe, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        strategy, problem = pipe.recv()
        proposer: Proposer = strategy.here(problem)
        wanted = 0
        while True:
            while not wanted or pipe.poll():  # outcomes first: the next proposal knows of them
                message: int | Tell | Proposal = pipe.recv()
                if isinstance(message, int):
                    wanted += message
                else:
                    _take(proposer, message)
            found = proposer.ask(1)
            pipe.send(found[0] if found else None)
            wanted -= 1
