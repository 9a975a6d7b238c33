"""Sweeps as jobs of a cluster: a thin layer over Ray's Jobs API, which the dashboard of the head node serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from isoflop.core.errors import UserError, unknown

_CONNECT_SECONDS = 10.0
_RECONNECT_SECONDS = 1.0
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_AGENT_SECONDS = 60.0
_TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class JobState:
    """How a submitted sweep stands.

    Attributes:
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: of ``isoflop run`` on the head, once it has ended by itself.
    """

    id: str
    status: str
    message: str
    entrypoint: str
    exit_code: int | None

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ENDED


class ClusterJobs:
    """The jobs of the cluster whose dashboard answers at ``address`` (``http://head:8265``).

    Raises UserError, in one line, for an address that cannot be, nobody who answers, and a missing or wrong token.
    """

    def __init__(self, address: str) -> None:
        self.address = _normalise(address)
        _probe(self.address)
        from ray.job_submission import JobSubmissionClient  # takes seconds; a wrong address is told before

        for name in _TALKATIVE:  # what matters comes as an error, in one line
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._errors(), _without(_ADDRESS_VARIABLES):  # they would override the address that was given
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        entrypoint: str,
        working_dir: Path,
        code: Path | None,
        submission_id: str,
        metadata: dict[str, str] | None = None,
    ) -> str:
        """Run ``entrypoint`` on the head node.

        Args:
            entrypoint: shell command; its current folder is a copy of ``working_dir``.
            working_dir: sent to every node that runs a part of the job, and on its Python path.
            code: package folder that is put on the Python path of all nodes, or None.

        Returns:
            The submission id.

        Raises:
            UserError: the id is taken, the files are too large, the head node takes no jobs.
        """
        environment: dict[str, Any] = {"working_dir": str(working_dir)}
        if code is not None:
            environment["py_modules"] = [str(code)]
        deadline = time.monotonic() + _AGENT_SECONDS
        with self._errors():
            while True:
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint, runtime_env=environment, submission_id=submission_id, metadata=metadata
                    )
                    return submission_id
                except RuntimeError as error:  # a head node's dashboard answers before the node takes jobs
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise

    def state(self, submission_id: str) -> JobState:
        """How a job stands. UserError with the nearest id when there is none of this id."""
        with self._errors():
            known = {j.submission_id for j in self._client.list_jobs() if j.submission_id}
            if submission_id not in known:
                raise unknown(f"submission (cluster {self.address})", submission_id, known)
            info = self._client.get_job_info(submission_id)
        return JobState(
            submission_id, str(info.status.value), info.message or "", info.entrypoint, info.driver_exit_code
        )

    def stop(self, submission_id: str) -> JobState:
        """Stop a job: SIGTERM, and SIGKILL after Ray's grace of three seconds. Finished rows stay."""
        if not self.state(submission_id).ended:
            with self._errors():
                self._client.stop_job(submission_id)
        return self.state(submission_id)

    def follow(self, submission_id: str, write: Callable[[str], None]) -> JobState:
        """Pass on what a job prints until it ends; connections that break are made again.

        Every connection tells the log from its beginning, so what was written already is skipped.
        """
        import aiohttp

        log = _Log(write)
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, RuntimeError):
                asyncio.run(self._tail(submission_id, log))
            state = self.state(submission_id)
            if state.ended:
                with self._errors():
                    log.begin()
                    log.add(str(self._client.get_job_logs(submission_id)))
                return state
            time.sleep(_RECONNECT_SECONDS)

    async def _tail(self, submission_id: str, log: _Log) -> None:
        log.begin()
        async for text in self._client.tail_job_logs(submission_id):
            log.add(text)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import requests
        from ray.exceptions import RayError

        try:
            yield
        except RayError as error:
            if "uthentication" not in str(error):
                raise UserError(f"Ray at {self.address}: {_one_line(error)}") from None
            wrong = "failed" in str(error).split(":")[0]
            raise UserError(
                f"Ray at {self.address} {'refuses this token' if wrong else 'wants a token'}: set RAY_AUTH_MODE=token "
                "and have the cluster's token in ~/.ray/auth_token, or name it in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from None
        except (requests.RequestException, ConnectionError) as error:
            raise UserError(f"no Ray dashboard answers at {self.address}: {_one_line(error)}") from None
        except (RuntimeError, ValueError) as error:
            raise UserError(f"Ray at {self.address}: {_one_line(error)}") from None


class _Log:
    """A text that is told several times from its beginning, and written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0
        self._position = 0

    def begin(self) -> None:
        """It is told from the beginning now."""
        self._position = 0

    def add(self, text: str) -> None:
        """The next piece."""
        new = text[max(0, self._written - self._position) :]
        self._position += len(text)
        self._written = max(self._written, self._position)
        if new:
            self._write(new)


def _normalise(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlparse(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"--address {address!r}: {error}; give the dashboard, as http://HEAD:8265") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address {address!r}: give the dashboard of the head node, as http://HEAD:8265")
    default = 443 if parts.scheme == "https" else 8265
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port or default}{parts.path.rstrip('/')}"


def _probe(address: str) -> None:
    """Whether anybody listens: Ray's client would wait for a silent host as long as TCP does, and then tell a story."""
    parts = urlparse(address)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), _CONNECT_SECONDS).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
        raise UserError(
            f"no Ray dashboard answers at {address}: {reason}; the head node serves it with `ray start --head "
            "--dashboard-host=…`, on port 8265 unless told otherwise"
        ) from None


@contextlib.contextmanager
def _without(variables: tuple[str, ...]) -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _one_line(error: BaseException) -> str:
    text = re.sub(r"Traceback \(most recent call last\):.*\n(?=\S)", "", str(error), flags=re.DOTALL)
    return " ".join(text.split())[:400]
