"""The Ray that an executor works on, and whether it still lives: a private one on this host, or one that runs already.

A driver that asks a dead cluster waits: Ray's calls know no deadline, and after a minute its own library ends the process
without a word to Python. So every question to the cluster's head goes through :meth:`RayCluster.ask`, which gives up
before that, and the processes of a private Ray are looked at before each.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from isoflop.core.errors import Unavailable, UserError
from isoflop.execute.ray_node import IN_THIS_PROCESS, START_SECONDS, ended_parts, quiet, start_private_ray

log = logging.getLogger(__name__)
T = TypeVar("T")
_KNOCK_SECONDS = 10.0
_SILENCE_SECONDS = 30.0  # Ray ends the process after 60: the rows are to be written, and MLflow told, before
_LOOK_SECONDS = 0.2
_RESTARTS = 3  # of a private Ray with nothing finished in between; more are no accident


class RayDied(Exception):
    """The cluster cannot go on; the text says what of it died."""


class RayCluster:
    """Args:
    address: of a running cluster (``auto``, ``host:port``, ``ray://…``), or None for a private one on this host, bound
        to loopback.
    node_ip: address of the driver's own node, for hosts that have several.
    start_timeout: seconds in which a private Ray must be up.

    Attributes:
        dashboard: address of its page; empty where there is none.
        tell: is told, in a line, what people should know.
    """

    def __init__(self, address: str | None, node_ip: str | None = None, start_timeout: float = START_SECONDS) -> None:
        self.dashboard = ""
        self.tell: Callable[[str], None] = log.warning
        self.start_timeout = start_timeout
        self._address = address
        self._node_ip = node_ip
        self._connected = False
        self._quiet = contextlib.ExitStack()
        self._own_node = ""
        self._restarts = 0

    @property
    def private(self) -> bool:
        """Whether it is this process's own, which may start it again."""
        return self._connected and self._address is None

    def connect(self) -> None:
        """Start or join it; nothing where this process is connected to one.

        Raises:
            UserError: nobody answers at the address.
            Unavailable: a private one does not come up.
        """
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        common: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": logging.ERROR}
        self._quiet.enter_context(quiet())
        try:
            if self._address is None:
                start_private_ray(self.start_timeout, self.tell, **common)
            else:
                _knock(self._address)
                if self._node_ip:
                    common["_node_ip_address"] = self._node_ip
                context = ray.init(address=self._address, **common)
                self.dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        except UserError:
            raise
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            hint = ""
            if "auth" in str(error).lower():
                hint = " (the cluster wants a token: set RAY_AUTH_MODE=token and have its token file in your home)"
            raise UserError(
                f"Ray at {self._address or 'local'} cannot be reached: {' '.join(str(error).split())[:300]}{hint}"
            ) from None
        self._connected = True
        with contextlib.suppress(Exception):  # a client of another host has no node of its own
            self._own_node = ray.get_runtime_context().get_node_id()

    def close(self) -> None:
        """Leave it, or end it where it is private."""
        if self._connected:
            ray.shutdown()
            self._connected = False
        self._quiet.close()

    def check(self) -> None:
        """Raise RayDied when a process is gone that a private Ray cannot do without."""
        if ended := ended_parts():
            raise RayDied(", ".join(ended))

    def ask(self, question: Callable[[], T]) -> T:
        """The answer to a call that may need the head. Raises RayDied when it does not come, or cannot come any more."""
        self.check()
        answer: list[T] = []
        failure: list[BaseException] = []
        done = threading.Event()

        def call() -> None:
            try:
                answer.append(question())
            except BaseException as error:
                failure.append(error)
            finally:
                done.set()

        threading.Thread(target=call, name="asks Ray", daemon=True).start()
        until = time.monotonic() + _SILENCE_SECONDS
        while not done.wait(_LOOK_SECONDS):
            self.check()
            if time.monotonic() > until:
                raise RayDied(f"its head node has not answered for {_SILENCE_SECONDS:.0f} s")
        if failure and isinstance(failure[0], ConnectionError):
            raise RayDied(f"its head node does not answer ({' '.join(str(failure[0]).split())[:200]})")
        if failure:
            raise failure[0]
        return answer[0]

    def live_nodes(self) -> list[dict[str, Any]]:
        """Its nodes that live. Raises RayDied where this process's own is not among them."""
        nodes = self.ask(ray.nodes)
        if any(node["NodeID"] == self._own_node and not node["Alive"] for node in nodes):
            raise RayDied("the node of this host is dead")
        return [node for node in nodes if node["Alive"]]

    def progress(self) -> None:
        """Something was finished: what died before does not count any more."""
        self._restarts = 0

    def restart(self, death: RayDied) -> None:
        """Start a private Ray again after its death. Raises Unavailable for others, and when it dies again and again."""
        if not self.private:
            raise Unavailable(
                f"Ray{f' at {self._address}' if self._address else ''} has died: {death}; finished jobs are kept, run the sweep "
                "again to go on"
            ) from None
        self._restarts += 1
        if self._restarts > _RESTARTS:
            raise Unavailable(
                f"Ray has died {self._restarts} times with no job finished in between, the last time: {death}; finished jobs are "
                f"kept, run the sweep again to go on, or {IN_THIS_PROCESS}"
            ) from None
        self.tell(f"Ray has died: {death}; starting it again")
        self.close()
        self.connect()


def _knock(address: str) -> None:
    """Raise ConnectionError when nothing listens at ``host:port``; Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers there ({error.strerror or error})") from None
