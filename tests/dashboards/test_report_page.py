"""The report as a file: self-contained, escaped, small, the same every time; and the command that writes it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

from click.testing import CliRunner
from mlflow import MlflowClient

from isoflop.cli import cli
from isoflop.dashboards.report import charts
from isoflop.dashboards.report.render import MOST_BYTES, render
from isoflop.track.attach import attach
from isoflop.track.projection import Projection
from isoflop.track.tracker import Artifact

if TYPE_CHECKING:
    import pytest
    from conftest import Reported


class Elements(HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_needs_nothing_from_outside(lawful: Reported) -> None:
    for tag, attributes in Elements(lawful.page).found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert set(re.findall(r"https?://[^\"' )]+", lawful.page)) <= {"http://www.w3.org/2000/svg"}
    assert len(lawful.page.encode()) < 2_000_000


def test_policy_allows_exactly_the_pages_own_script_and_style(lawful: Reported) -> None:
    policy = next(a["content"] for t, a in Elements(lawful.page).found if a.get("http-equiv"))
    assert policy is not None
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", lawful.page, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_what_users_write_is_text(lawful: Reported, compared: Reported, failed: Reported) -> None:
    for reported in (lawful, compared, failed):
        assert "<script>alert" not in reported.page
        assert "<img" not in reported.page
        assert reported.page.count("<script") == 2
    assert "&lt;script&gt;alert" in failed.page


def test_page_is_the_same_every_time(compared: Reported) -> None:
    assert render(compared.data) == compared.page


def test_data_is_json_and_texts_are_interned(compared: Reported) -> None:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', compared.page, re.S)
    data = json.loads(text)
    assert len(data["charts"]) == compared.page.count("<figure")
    assert len(data["texts"]) == len(set(data["texts"]))
    assert all(isinstance(p["text"], int) for c in data["charts"] for s in c.get("series", []) for p in s["points"])


def test_every_chart_has_a_table(lawful: Reported) -> None:
    assert lawful.page.count("the chart as a table") == lawful.page.count("<figure")


def test_huge_sweeps_are_thinned_and_say_so() -> None:
    points = [
        charts.point(1.0 + i, 1 / (1.0 + i), f"configuration number {i} of many, with a long name")
        for i in range(30_000)
    ]
    chart = charts.xy("t", charts.axis("x"), charts.axis("y"), [charts.series("s", 0, points)])
    groups = [charts.group("g", [charts.panel(str(k), chart) for k in range(6)])]
    report = {
        "name": "n", "description": "", "facts": [], "headline": ["h"], "left_out": [],
        "sections": [charts.section("frontier", "Frontier", groups)],
    }  # fmt: skip
    page = render(report)
    assert len(page.encode()) < MOST_BYTES
    assert "2000 of 30000 points are drawn" in page


def test_report_is_attached_to_the_parent_run_and_creates_nothing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    artifacts = [Artifact("report.html", "<p>one</p>")]
    assert attach(uri, "some", artifacts) is None
    assert not (tmp_path / "mlflow.db").exists()
    projection = Projection(uri, "some", f"file://{tmp_path / 'artifacts'}")
    assert attach(uri, "some", artifacts) is None  # an experiment without a parent run
    projection.begin("name: some", {})
    run_id = attach(uri, "some", artifacts)
    assert run_id is not None
    client = MlflowClient(tracking_uri=uri)
    assert "report.html" in [f.path for f in client.list_artifacts(run_id)]
    assert client.get_run(run_id).info.status == "RUNNING"


def test_command_writes_the_file_and_says_what_it_left_out(
    failed: Reported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = str(failed.sweep.store.local)
    done = CliRunner().invoke(cli, ["report", "failed", "--store", store, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (tmp_path / "failed-report.html").read_text(encoding="utf-8") == failed.page
    assert said["sections"] == ["failures", "provenance"]
    assert said["mlflow_run_id"] is None
    assert "no run of sweep" in said["mlflow_problem"]
    again = CliRunner().invoke(
        cli, ["report", "failed", "--store", store, "--tracking-uri", "none", "--out", str(tmp_path / "x.html")]
    )
    assert again.exit_code == 0
    assert "wrote" in again.stdout
    assert "not logged" not in again.output
