"""Several real hosts on one machine: network namespaces of our own, joined by a bridge, each with a real Ray node.

The bridge lives in a namespace too, so that the machine's own interfaces are never touched. The addresses exist nowhere
else. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PORT = 6379
RAY = str(Path(sys.executable).with_name("ray"))


def why_not() -> str | None:
    """Why such a cluster cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "needs the `ip` command (Debian: iproute2)"
    probe = subprocess.run(["ip", "netns", "add", f"isoprobe{os.getpid()}"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", f"isoprobe{os.getpid()}"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "this kernel or container forbids network namespaces"


def _ip(*arguments: str, namespace: str | None = None) -> None:
    prefix = ["ip", "netns", "exec", namespace] if namespace else []
    subprocess.run([*prefix, "ip", *arguments], check=True, capture_output=True)


@dataclass
class Host:
    """One namespace: a host with its own address."""

    index: int
    prefix: str
    home: Path

    @property
    def namespace(self) -> str:
        return f"{self.prefix}{self.index}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.index + 1}"

    @property
    def port_name(self) -> str:
        """The bridge's side of this host's cable."""
        return f"{self.prefix}p{self.index}"

    def run(
        self, *command: str, timeout: float = 300, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host."""
        return subprocess.run(
            self._command(command),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=self.environment(env),
        )

    def popen(self, *command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command on this host."""
        return subprocess.Popen(
            self._command(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(env),
        )

    def _command(self, command: tuple[str, ...]) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        """Ray keeps its token in the home folder; every host of a cluster has the same one."""
        return {
            **os.environ,
            "HOME": str(self.home),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            **(extra or {}),
        }


@dataclass
class Network:
    """Hosts and the bridge between them."""

    hosts: list[Host]
    bridge: str
    folder: Path
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def cable(self, host: Host, up: bool) -> None:
        """Plug a host in or out."""
        _ip("link", "set", host.port_name, "up" if up else "down", namespace=self.bridge)

    def start_ray(
        self, host: Host, cpus: int, gpus: int, health: dict[str, str] | None = None, dashboard: bool = False
    ) -> None:
        """Start a Ray node in the foreground of a process of our own, so that ending it ends all of the node.

        With ``dashboard`` the head serves Ray's Jobs API to the other hosts, on port 8265. Returns when the node is up: two nodes that start at once in one file system may choose the same socket.
        """
        where = (
            [
                "--head",
                f"--port={PORT}",
                *(["--dashboard-host=0.0.0.0"] if dashboard else ["--include-dashboard=false"]),
            ]
            if host.index == 0
            else [f"--address={self.hosts[0].address}:{PORT}"]
        )
        command = [
            RAY,
            "start",
            *where,
            f"--node-ip-address={host.address}",
            f"--num-cpus={cpus}",
            f"--num-gpus={gpus}",
            "--disable-usage-stats",
            "--block",
        ]
        command += [f"--temp-dir={self.folder / 'ray'}"] if host.index == 0 else []
        path = self.folder / f"ray{host.index}.log"
        log = path.open("wb")
        self.nodes[host.index] = subprocess.Popen(
            host._command(tuple(command)), stdout=log, stderr=log, env=host.environment(health), start_new_session=True
        )
        log.close()
        deadline = time.monotonic() + 90
        while b"Ray runtime started" not in path.read_bytes():
            if self.nodes[host.index].poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"node {host.index} did not start: {path.read_text()[-1500:]}")
            time.sleep(0.1)

    def wait_for(self, count: int, timeout: float = 120) -> None:
        """Wait until the head sees ``count`` live nodes."""
        code = (
            "import ray, sys; ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False, logging_level=40);"
            "print('alive', sum(n['Alive'] for n in ray.nodes()))"
        )
        head = self.hosts[0]
        deadline = time.monotonic() + timeout
        seen = ""
        while time.monotonic() < deadline:
            done = head.run(sys.executable, "-c", code, f"{head.address}:{PORT}", head.address, timeout=60)
            seen = done.stdout + done.stderr[-500:]
            if f"alive {count}" in done.stdout:
                return
            time.sleep(1)
        raise TimeoutError(
            f"{count} nodes did not come up: {seen}\n"
            + "\n".join((self.folder / f"ray{i}.log").read_text()[-800:] for i in self.nodes)
        )

    def kill_node(self, host: Host) -> None:
        """Power off: every process of the host dies at once."""
        listed = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if host.index in self.nodes:
            self.nodes.pop(host.index).wait(timeout=30)


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """``count`` hosts, joined; removed with everything that runs in them."""
    prefix = f"iso{os.getpid() % 100000}"
    bridge = f"{prefix}br"
    # Ray's sockets lie below its temp dir, and their paths must stay short
    folder = Path(tempfile.mkdtemp(prefix="isonet", dir="/tmp"))
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    hosts = [Host(i, prefix, home) for i in range(count)]
    net = Network(hosts, bridge, folder)
    try:
        _ip("netns", "add", bridge)
        _ip("link", "add", "br0", "type", "bridge", namespace=bridge)
        _ip("link", "set", "br0", "up", namespace=bridge)
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("link", "set", "lo", "up", namespace=host.namespace)
            _ip(
                "link",
                "add",
                host.port_name,
                "netns",
                bridge,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                host.namespace,
            )
            _ip("link", "set", host.port_name, "master", "br0", namespace=bridge)
            _ip("link", "set", host.port_name, "up", namespace=bridge)
            _ip("addr", "add", f"{host.address}/24", "dev", "eth0", namespace=host.namespace)
            _ip("link", "set", "eth0", "up", namespace=host.namespace)
        yield net
    finally:
        for host in reversed(hosts):
            with contextlib.suppress(Exception):
                net.kill_node(host)
        for name in [*(h.namespace for h in hosts), bridge]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)
