"""What `isoflop submit` sends and what it says, without a cluster; tests/cluster/test_submit.py has a real one."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import isoflop
from isoflop.cli import main
from isoflop.cli.submit import _relative_paths
from isoflop.core.errors import UserError
from isoflop.execute.bundle import copy_package, copy_sweep, data_beside, modules_beside
from isoflop.sweep.spec import load_spec

SWEEP = "name: tiny\nimport: [mine]\nmodels: [toy/s]\nmethods: [toy-full]\ntasks: [toy-task]\n"


def test_the_copied_package_is_complete_and_runs_alone(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    assert not [p for p in package.rglob("*") if p.is_symlink() or p.name == "__pycache__"]
    code = (
        "import isoflop, isoflop.methods.base as m, importlib.resources as r; from isoflop.methods.base import METHODS;"
        "print(isoflop.__file__); print(m.__file__); print('quecc' in METHODS, (r.files('isoflop.sweeps') / 'quickstart.yaml').is_file())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(package / "__init__.py"),
        str(package / "methods" / "base.py"),
        "True True",
    ]


def test_the_copied_package_does_not_depend_on_where_it_is_copied_to(tmp_path: Path) -> None:
    """Ray names what it is sent by its content, and sends it once."""
    one, two = copy_package(tmp_path / "a"), copy_package(tmp_path / "b")
    contents = [{str(p.relative_to(c)): p.read_bytes() for p in c.rglob("*") if p.is_file()} for c in (one, two)]
    assert contents[0] == contents[1]
    assert sum(map(len, contents[0].values())) < 5 * 2**20
    assert not {"sweeps/sweep.schema.json", "dashboards/outcomes/outcomes.json"} & contents[0].keys(), (
        "no worker reads them"
    )
    assert {"sweeps/quickstart.yaml", "methods/kv_cache/snapkv.py"} <= contents[0].keys()


def test_modules_beside_the_yaml_travel_with_what_they_import(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import numpy, helper\nfrom pack.inner import x\n")
    (tmp_path / "helper.py").write_text("def f():\n    import late\n")
    (tmp_path / "late.py").write_text("import mine, random\n")
    (tmp_path / "random.py").write_text("raise RuntimeError('would hide the standard library')\n")
    (tmp_path / "unused.py").write_text("secret = 1\n")
    for name, text in {
        "__init__.py": "",
        "inner.py": "from . import twin\nx = 1\n",
        "twin.py": "import deep\n",
    }.items():
        (tmp_path / "pack").mkdir(exist_ok=True)
        (tmp_path / "pack" / name).write_text(text)
    (tmp_path / "pack" / "data.txt").write_text("data")
    (tmp_path / "pack" / ".hidden").write_text("no")
    (tmp_path / "deep.py").write_text("broken syntax here\n")
    (tmp_path / "s.yaml").write_text("name: s\n")
    elsewhere = copy_sweep(tmp_path / "s.yaml", ("mine", "some_package.part"), tmp_path / "out")
    assert elsewhere == ["some_package.part"]
    sent = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert sent == {
        "s.yaml", "mine.py", "helper.py", "late.py", "deep.py",
        "pack/__init__.py", "pack/inner.py", "pack/twin.py", "pack/data.txt",
    }  # fmt: skip


def test_a_sweep_without_imports_sends_its_yaml_only(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("")
    assert modules_beside(tmp_path, ()) == ([], [])


def test_data_that_tasks_name_travel_and_keep_their_places(tmp_path: Path) -> None:
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "pictures" / "a.png").write_bytes(b"a")
    (tmp_path / "data" / "pictures" / "unused.png").write_bytes(b"b")
    (tmp_path / "outside.png").write_bytes(b"c")
    (tmp_path / "data" / "asked.jsonl").write_text('{"image": "pictures/a.png", "question": "../outside.png"}\n')
    (tmp_path / "texts" / "deep" / "one.txt").write_text("one")
    (tmp_path / "s.yaml").write_text(
        "name: s\nmodels: [tiny-lm/text-d32]\nmethods: [none]\ntasks:\n  - vqa: {data: data/asked.jsonl}\n"
        "  - text: {data: texts}\n  - needle: {haystack: /elsewhere.txt}\n  - choice: {data: hub:some/set}\n"
        "  - ones-own: {places: texts/deep/one.txt, note: nothing.txt}\n"
    )
    spec, _ = load_spec(tmp_path / "s.yaml")
    paths = _relative_paths(tmp_path, spec)
    assert paths == ["data/asked.jsonl", "texts", "texts/deep/one.txt"]
    copy_sweep(tmp_path / "s.yaml", (), tmp_path / "out", paths)
    sent = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert sent == {"s.yaml", "data/asked.jsonl", "data/pictures/a.png", "texts/deep/one.txt", "outside.png"}


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz", "parquet"])
def test_pictures_travel_whatever_their_names_and_the_tables_form(tmp_path: Path, ending: str) -> None:
    names = ["plain.png", "café.png", "my photo.png", "noext", "deep/b.png"]
    (tmp_path / "deep").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    rows = [{"image": name, "question": "what?"} for name in names]
    table = tmp_path / f"asked.{ending}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match ending:
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), table)
        case "csv":
            table.write_text("image,question\n" + "".join(f"{name},what?\n" for name in names))
        case "json":
            table.write_text(json.dumps(rows))
        case _:
            table.write_bytes(gzip.compress(lines.encode()) if ending.endswith("gz") else lines.encode())
    assert {str(p.relative_to(tmp_path)) for p in data_beside(tmp_path, [table.name])} == {table.name, *names}


def test_data_that_a_cluster_cannot_be_sent_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "up.txt").write_text("up")
    (folder / "big.txt").write_text("big")
    with pytest.raises(UserError, match=r"\.\./up\.txt lies outside of the sweep's folder"):
        data_beside(folder, ["../up.txt"])
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        data_beside(folder, ["none.txt"])
    monkeypatch.setattr("isoflop.execute.bundle.MOST_BYTES", 2)
    with pytest.raises(UserError, match="the data beside the sweep are 0 MiB"):
        data_beside(folder, ["big.txt"])


# what the command says


def submit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as Ray reads its settings once."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | environment
    return subprocess.run(
        [sys.executable, "-m", "isoflop", "submit", *arguments], capture_output=True, text=True, timeout=120, env=env
    )


def submit_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, where it ends before it looks at Ray's settings."""
    command, out, err = ["isoflop", "submit", *arguments], io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        patch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(command, int(ended.value.code or 0), out.getvalue(), err.getvalue())


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    return tmp_path / "tiny.yaml"


@pytest.fixture
def server() -> Iterator[Callable[[int, str], str]]:
    """Something that answers every request the same way: ``server(status, body)`` gives its address."""
    running = []

    def start(status: int, body: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_address[1]}"

    yield start
    for each in running:
        each.shutdown()
        each.server_close()


@pytest.mark.parametrize(
    "address, what",
    [
        ("http://127.0.0.1:9", "no Ray dashboard answers at http://127.0.0.1:9: connection refused"),
        ("ray://head:10001", "'ray://head:10001': give the dashboard of the head node, as http://HEAD:8265"),
        ("http://", "give the dashboard of the head node"),
        ("http://head:many", "--address 'http://head:many'"),
        ("no-such-host.invalid", "no Ray dashboard answers at http://no-such-host.invalid:8265: "),
    ],
)
def test_addresses_that_cannot_be(sweep: Path, address: str, what: str) -> None:
    assert what in one_line(submit(str(sweep), "--address", address))


def test_an_address_that_is_no_dashboard(sweep: Path, server: Callable[[int, str], str]) -> None:
    assert "Version check returned 404" in one_line(submit(str(sweep), "--address", server(404, "who?")))
    assert "Ray" in one_line(submit(str(sweep), "--address", server(200, "<html>a router</html>")))


def test_a_missing_and_a_wrong_token(sweep: Path, server: Callable[[int, str], str]) -> None:
    said = one_line(submit(str(sweep), "--address", server(401, "no token")))
    assert "wants a token: set RAY_AUTH_MODE=token" in said
    refused = submit(str(sweep), "--address", server(403, "bad token"), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert "refuses this token" in one_line(refused)
    assert "0" * 64 not in refused.stderr


def test_the_given_address_wins_over_the_environment(sweep: Path) -> None:
    said = one_line(submit(str(sweep), "--address", "http://127.0.0.1:9", RAY_ADDRESS="http://127.0.0.1:10"))
    assert "127.0.0.1:9:" in said


def test_mistakes_are_found_before_anybody_is_called(sweep: Path) -> None:
    address = ("--address", "http://127.0.0.1:9")
    assert "relative" in one_line(submit_here(str(sweep), *address, "--store", "results"))
    assert "needs one of SWEEP.yaml" in one_line(submit_here(*address))
    assert "needs one of SWEEP.yaml" in one_line(submit_here(str(sweep), *address, "--stop", "x"))
    sweep.write_text(SWEEP.replace("tasks", "taks"))
    assert "did you mean 'tasks'" in one_line(submit_here(str(sweep), *address))
    assert "no such file" in one_line(submit_here(str(sweep.parent / "none.yaml"), *address))
    assert "--address" in one_line(submit_here(str(sweep)))


def test_the_command_on_the_head_is_quoted() -> None:
    from isoflop.cli.submit import _entrypoint

    given = {"python": "python", "store": "s3://b/a b", "tracking_uri": "none", "workers": 3, "retry_failed": True}
    assert _entrypoint("my sweep.yaml", given) == (
        "python -m isoflop run 'my sweep.yaml' --ray-address auto --store 's3://b/a b' --tracking-uri none "
        "--workers 3 --retry-failed"
    )


# following


class FakeClient:
    """A job whose log comes in pieces, over connections that break."""

    def __init__(self, connections: list[list[str]], final: str) -> None:
        self.connections, self.final = connections, final

    async def tail_job_logs(self, _: str) -> Any:
        for piece in self.connections.pop(0):
            if piece == "BREAK":
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield piece

    def get_job_logs(self, _: str) -> str:
        return self.final


def test_a_log_over_broken_connections_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from isoflop.execute import submit as module

    monkeypatch.setattr(module, "_RECONNECT_SECONDS", 0.0)
    jobs = module.ClusterJobs.__new__(module.ClusterJobs)
    jobs.address = "http://head:8265"
    client = FakeClient([["one\n", "two\n", "BREAK"], ["one\ntwo\n", "thr", "BREAK"], ["one\ntwo\nthree\n"]], "one\ntwo\nthree\nend\n")  # fmt: skip
    jobs._client = client
    monkeypatch.setattr(
        module.ClusterJobs,
        "state",
        lambda self, i: module.JobState(i, "RUNNING" if client.connections else "SUCCEEDED", "", "", 0),
    )
    out: list[str] = []
    assert jobs.follow("id", out.append).status == "SUCCEEDED"
    assert "".join(out) == "one\ntwo\nthree\nend\n"


def test_the_help_is_light_and_says_what_is_sent() -> None:
    done = submit("--help")
    assert done.returncode == 0
    assert "--ray-address auto" in " ".join(done.stdout.split())
    code = "import sys, isoflop.cli.submit; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# cluster files that ship with isoflop


@pytest.fixture(scope="module")
def clusters() -> dict[str, list[dict[str, Any]]]:
    import yaml

    folder = Path(isoflop.__file__).parent / "sweeps" / "clusters"
    return {p.name: list(yaml.safe_load_all(p.read_text())) for p in folder.glob("*.yaml")}


def test_kuberay_files_are_custom_resources(clusters: dict[str, list[dict[str, Any]]]) -> None:
    kinds = {d["kind"]: d for d in clusters["kuberay.yaml"]}
    assert set(kinds) == {"PersistentVolumeClaim", "RayCluster", "RayJob"}
    for kind in ("RayCluster", "RayJob"):
        assert kinds[kind]["apiVersion"] == "ray.io/v1"
    cluster = kinds["RayCluster"]["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    claims = kinds["PersistentVolumeClaim"]
    assert claims["spec"]["accessModes"] == ["ReadWriteMany"]
    images = set()
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        env = {e["name"]: e.get("value") for e in container["env"]}
        mount = container["volumeMounts"][0]
        assert env["ISOFLOP_CACHE"].startswith("/")
        assert env["ISOFLOP_STORE"].startswith(mount["mountPath"])
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claims["metadata"]["name"]
    assert len(images) == 1
    job = kinds["RayJob"]["spec"]
    assert job["entrypoint"].startswith("python -m isoflop run ")
    assert "--ray-address auto" in job["entrypoint"]
    assert job["clusterSelector"] == {"ray.io/cluster": kinds["RayCluster"]["metadata"]["name"]}


def test_the_launcher_file_has_rays_keys(clusters: dict[str, list[dict[str, Any]]]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = clusters["ray-cluster.yaml"]
    assert {"cluster_name", "provider", "auth", "head_start_ray_commands", "worker_start_ray_commands"} <= set(config)
    assert config["provider"]["type"] == "local"
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
    validate_config(prepare_config(json.loads(json.dumps(config))))


def test_cluster_files_name_no_real_place(clusters: dict[str, list[dict[str, Any]]]) -> None:
    import ipaddress
    import re

    folder = Path(isoflop.__file__).parent / "sweeps" / "clusters"
    reserved = [ipaddress.ip_network(n) for n in ("192.0.2.0/24", "127.0.0.0/8", "0.0.0.0/32")]
    for path in folder.glob("*.yaml"):
        text = path.read_text()
        for found in re.findall(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", text):
            assert any(ipaddress.ip_address(found) in net for net in reserved), (path.name, found)
        assert not re.search(r"\b[0-9a-f]{32,}\b", text), "looks like a token"
        assert not re.search(r"AKIA|BEGIN [A-Z ]*PRIVATE KEY|password", text)
        for host in re.findall(r"\b[\w.-]+\.(?:com|org|net|io|dev|internal|local)\b", text):
            assert host in ("ray.io", "prometheus.io", "nvidia.com", "registry.example.org"), (path.name, host)
