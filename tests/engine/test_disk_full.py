"""A store on a real file system that is full: the driver stops in one line, and goes on when there is room again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run_local, scores
from test_crashes import YAML, Place

pytestmark = pytest.mark.usefixtures("toy_parts")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "isoflop-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use up the last byte."""
    path = folder / "ballast"
    with path.open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return path


@pytest.mark.parametrize("tracking", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_full_disk_stops_the_driver_in_one_line_and_costs_no_row(
    tmp_path: Path, small_disk: Path, empty_mlflow: Path, tracking: bool
) -> None:
    """The store (ledger, log and MLflow's database) is on the full disk; the stage cache is elsewhere."""
    place = Place(tmp_path / "x", empty_mlflow if tracking else None, YAML, store=small_disk / "store")
    process = place.start()
    place.wait_for(" ok on ", process, 4)
    ballast = fill(small_disk)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    _check_one_line(err)
    kept = scores(place.rows())
    assert 1 <= len(kept) < 20
    assert place.history_rows() == len(kept)

    for command in ("run", "resume"):  # still full: the same line at once, and nothing is harmed
        code, _, err = place.run(command=command)
        assert code == 2, err
        _check_one_line(err)
    assert scores(place.rows()) == kept

    ballast.unlink()
    code, out, err = place.run("--json", command="resume")
    assert code == 0, err
    assert json.loads(out)["summary"]["cached"] == len(kept)
    found = scores(place.rows())
    assert {job: found[job] for job in kept} == kept
    assert found == scores(run_local(place.yaml, tmp_path / "undisturbed").results())
    assert place.history_rows() == len(found) == 20
    if tracking:
        place.check_mlflow()


def _check_one_line(err: str) -> None:
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    said = [line for line in err.splitlines() if line.startswith("isoflop:")]
    assert len(said) == 1, err
    assert "No space left on device" in said[0]
