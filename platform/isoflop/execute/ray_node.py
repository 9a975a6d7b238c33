"""A Ray of this process alone, on loopback: started with patience, watched, and cleared away where a start fails.

Ray offers no way to say how long its node may take to come up (30 s stand in its source), nor to end what an attempt that
failed has started; both are done here from outside, while ``ray.init`` runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray._private import node as ray_node
from ray._private import ray_constants, services
from ray._private import worker as ray_driver
from ray._private.state import GlobalState

from isoflop.core.errors import Unavailable

log = logging.getLogger(__name__)
START_SECONDS = 300.0  # a busy machine needs a minute or two; one that is not up by then has another trouble
_ATTEMPTS = 3
_TELL_SECONDS = 30.0
_LOOK_SECONDS = 0.1
_REGISTER_SECONDS = 600  # Ray's own 60 are too few for a busy machine: what starts slowly is killed, to start again
_RECONNECT_SECONDS = 10**8  # a driver that has lost its GCS would be ended by Ray; here Ray is started again
_PORT_WAIT = "RAY_gcs_server_port_wait_time_s"
_VITAL = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)  # the others may die


IN_THIS_PROCESS = "run the jobs in this process with --executor local"


class _GivenUp(Exception):
    """The node is not up, and will not be in time."""


def start_private_ray(
    timeout: float = START_SECONDS, tell: Callable[[str], None] = log.warning, **options: Any
) -> None:
    """Start Ray on this host for this process alone.

    A bare ``ray.init()`` would join any cluster it finds, and listen on every interface: Ray replaces 127.0.0.1 by the
    host's own address unless it takes the host for one that cannot be part of a cluster.

    Args:
        timeout: seconds in which it must be up.
        tell: is told, in one line, when it takes long.
        options: those of ``ray.init``.

    Raises:
        Unavailable: it did not come up; nothing of it is left running.
    """
    until = time.monotonic() + timeout
    common = {
        "address": "local",
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "_system_config": {
            "worker_register_timeout_seconds": _REGISTER_SECONDS,
            "gcs_rpc_server_reconnect_timeout_s": _RECONNECT_SECONDS,
        },
    }
    with _alone(timeout):
        for attempt in range(1, _ATTEMPTS + 1):
            with _patience(until, tell, timeout) as nodes:
                try:
                    ray.init(**common, **options)
                    return
                except BaseException as error:
                    ended = ended_parts(nodes[-1]) if nodes else []
                    _clear(nodes)
                    if isinstance(error, KeyboardInterrupt) or not (ended or time.monotonic() > until):
                        raise
            reason = ", ".join(ended)
            if time.monotonic() > until:
                raise Unavailable(
                    f"Ray was not up within {timeout:g} s{f' ({reason})' if ended else ''}; on a busy machine give it longer "
                    f"with --ray-start-timeout SECONDS, or {IN_THIS_PROCESS}"
                )
            if attempt == _ATTEMPTS:
                raise Unavailable(f"Ray could not be started, {attempt} times: {reason}; {IN_THIS_PROCESS}")
            tell(f"Ray's start failed ({reason}); once more")


def ended_parts(node: Any = None) -> list[str]:
    """What has ended of the private Ray of this process and cannot be done without; with the way it ended.

    Args:
        node: of Ray; by default the one that this process has started.
    """
    node = ray_driver._global_node if node is None else node
    found = []
    for kind, processes in dict(getattr(node, "all_processes", None) or {}).items():
        codes = [code for info in processes if (code := info.process.poll()) is not None]
        if codes and kind in _VITAL:
            found.append(f"its {kind} {_way(codes[-1])}")
    return found


def _way(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ray prints what goes wrong in its processes, with pages of their logs, on standard output; here it goes to the log."""
    before = ray_driver.print_to_stdstream
    ray_driver.print_to_stdstream = lambda data, ignore_prefix: log.debug("%s", data)
    try:
        yield
    finally:
        ray_driver.print_to_stdstream = before


@contextlib.contextmanager
def _alone(timeout: float) -> Iterator[None]:
    """Ray takes this host for one that cannot be part of a cluster, and waits for its own GCS for as long as we do."""
    settings = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", _PORT_WAIT: str(max(1, int(timeout)))}
    before = {name: os.environ.get(name) for name in settings}
    enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ.update(settings)  # for the processes that it starts
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _patience(until: float, tell: Callable[[str], None], timeout: float) -> Iterator[list[Any]]:
    """While it lasts, ``ray.init`` waits for its node until then, or until a part of it has ended. Gives the nodes it makes."""
    made: list[Any] = []
    plain_node, plain_get = ray_node.Node, services.get_node
    began = time.monotonic()
    told = False

    class Noted(plain_node):  # type: ignore[misc, valid-type]
        """Known also where its making fails."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*arguments, **options)

    def get_node(address: str, node_id: str) -> Any:
        nonlocal told
        state = GlobalState()
        state._initialize_global_state(services._get_gcs_client_options(address))
        # the plain call would wait 30 s for the node, deaf to Ctrl-C
        while not any(node["NodeID"] == node_id for node in state.node_table()):
            if time.monotonic() > until or (made and ended_parts(made[-1])):
                raise _GivenUp
            if not told and time.monotonic() - began > _TELL_SECONDS:
                told = True
                tell(
                    f"Ray is not up after {_TELL_SECONDS:.0f} s; waiting for at most {timeout:g} s (--ray-start-timeout)"
                )
            time.sleep(_LOOK_SECONDS)
        return plain_get(address, node_id)

    ray_node.Node, services.get_node = Noted, get_node
    try:
        yield made
    finally:
        ray_node.Node, services.get_node = plain_node, plain_get


def _clear(nodes: list[Any]) -> None:
    """End the processes of nodes that did not come up: Ray knows nothing of them, and would leave them to the end."""
    for node in nodes:
        with contextlib.suppress(Exception):  # it may have broken off anywhere
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    ray.shutdown()
