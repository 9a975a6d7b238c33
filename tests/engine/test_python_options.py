"""Options of ``isoflop.run`` from Python: each as on the command line, and a wrong one is a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import toy

import isoflop
from isoflop.core.errors import UserError

pytestmark = pytest.mark.usefixtures("toy_parts")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reports": True}, "unknown option of run 'reports' (did you mean 'report'?)"),
        ({"execcutor": "local"}, "did you mean 'executor'"),
        ({"executor": "slurm"}, "unknown executor 'slurm'"),
        ({"workers": 0}, "workers = 0"),
        ({"workers": "two"}, "workers = 'two'"),
        ({"track_wait": -1}, "track_wait = -1"),
        ({"track_wait": float("nan")}, "track_wait = nan"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        isoflop.run(toy(), **{"store": str(tmp_path / "s"), "executor": "local", "tracking_uri": "none", **options})
    assert words in str(error.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("report", [True, False])
def test_a_report_is_written_when_asked_for(report: bool, tmp_path: Path) -> None:
    opened = isoflop.run(toy(), report=report, store=str(tmp_path), executor="local", tracking_uri="none")
    written = tmp_path / "sweeps" / opened.name / "report.html"
    assert written.is_file() == report
    assert opened.conclusion.path == (str(written) if report else "")
