"""What MLflow shows of a sweep as a whole: the parent run's description with working links, the report, ready views."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from helpers import Lines, toy

import isoflop
from isoflop.dashboards.session import conclude, draw
from isoflop.sweep import api
from isoflop.sweep.api import RunOptions, SweepResults, run_resolved
from isoflop.sweep.note import Conclusion, closing, opening
from isoflop.sweep.resolve import resolve
from isoflop.sweep.results import Findings, LawFinding
from isoflop.sweep.spec import load_spec
from isoflop.track import Artifact
from isoflop.track.attach import attach
from isoflop.track.links import MOST, with_addresses

pytestmark = pytest.mark.usefixtures("toy_parts")
LAW = {"law": "product", "bootstrap": 40}
FRONTIER = {"law": "product", "cost": "2*N*(Q+V)"}


@pytest.fixture
def uri(tmp_path: Path, empty_mlflow: Path) -> str:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def run_to_its_end(
    tmp_path: Path, uri: str, conclude: Any, draw: Any = None, **changes: Any
) -> tuple[SweepResults, list[str]]:
    lines = Lines()
    options = RunOptions(
        executor="local", tracking_uri=uri, store=str(tmp_path / "store"), cache_dir=tmp_path / "cache"
    )
    opened = run_resolved(resolve(toy(laws=[LAW], frontiers=[FRONTIER], **changes)), options, lines, conclude, draw)
    return opened, lines.lines


def parent_of(uri: str) -> tuple[Any, Any, Any]:
    """(client, experiment, the sweep's run)."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("toy")
    return client, experiment, client.search_runs([experiment.experiment_id], "tags.`isoflop.parent` = 'true'")[0]


def links_of(note: str) -> dict[str, str]:
    return dict(re.findall(r"\[(?:\*\*)?([^\]*]+)(?:\*\*)?\]\(([^)]*)\)", note))


def test_the_report_is_written_at_the_end_and_linked_from_the_description(tmp_path: Path, uri: str) -> None:
    opened, _ = run_to_its_end(tmp_path, uri, conclude)
    page = Path(opened.conclusion.path).read_text()
    assert page.startswith("<!doctype html>")
    assert opened.conclusion.headline[0].split(":")[0] in page
    client, experiment, parent = parent_of(uri)
    note = parent.data.tags["mlflow.note.content"]
    links = links_of(note)
    inside = f"#/experiments/{experiment.experiment_id}/runs/{parent.info.run_id}/artifacts/"
    files = {f.path for f in client.list_artifacts(parent.info.run_id)}
    for text, name in (("report", "report.html"), ("laws", "laws.json"), ("YAML", "sweep.yaml")):
        assert links[text] == inside + name
        assert name in files
    logged = client.download_artifacts(parent.info.run_id, "report.html", str(tmp_path))
    assert Path(logged).read_text() == page
    for text in ("jobs", "best jobs"):
        view = links[text].rpartition("=")[2]
        assert json.loads(experiment.tags[f"mlflow.sharedViewState.{view}"])["searchFilter"]
    signpost = links_of(experiment.tags["mlflow.note.content"])
    assert f"#/experiments/{experiment.experiment_id}/runs/{parent.info.run_id}" in signpost.values()


def test_the_description_holds_the_law_and_the_frontier(tmp_path: Path, uri: str) -> None:
    opened, _ = run_to_its_end(tmp_path, uri, None)
    note = parent_of(uri)[2].data.tags["mlflow.note.content"]
    findings = opened.findings_of_run
    assert f"```\n{findings.laws[0].fits[0]}\n```" in note
    frontier = findings.frontiers[0].frontiers[0]
    rows = [line for line in note.splitlines() if line.startswith("| ")]
    assert sum(line.startswith("| budget |") for line in rows) == len(findings.frontiers[0].frontiers)
    assert rows[2].startswith(f"| {frontier.points[0].budget:.3g}".replace("e+0", "e"))
    assert "report" not in links_of(note)  # none was asked for


def test_figures_of_laws_and_frontiers_are_files_of_the_run(tmp_path: Path, uri: str) -> None:
    run_to_its_end(tmp_path, uri, None, draw)
    client, _, parent = parent_of(uri)
    files = {f.path for f in client.list_artifacts(parent.info.run_id)}
    tasks = ("toy-task", "toy-other")
    assert {f"{kind}-0-{task}.html" for kind in ("law", "frontier") for task in tasks} <= files


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no\nink"), "figures were left out (RuntimeError: no ink)"),
        (KeyboardInterrupt(), "figures were left out"),
    ],
)
def test_figures_that_fail_cost_a_line_and_nothing_else(
    error: BaseException, line: str, tmp_path: Path, uri: str
) -> None:
    def broken(findings: Findings) -> list[Artifact]:
        raise error

    opened, lines = run_to_its_end(tmp_path, uri, None, broken)
    assert lines.count(line) == 1
    assert opened.summary is not None
    assert opened.summary.ok == 12
    assert parent_of(uri)[2].info.status == "FINISHED"


def test_isoflop_run_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(given: Any, progress: Any = None, draw: Any = None, conclude: Any = None, **options: Any) -> Any:
        return given, draw, options

    monkeypatch.setattr(api, "run", run)
    assert isoflop.run("a.yaml", workers=2) == ("a.yaml", draw, {"workers": 2})


def test_a_report_that_fails_costs_a_line_and_nothing_else(tmp_path: Path, uri: str) -> None:
    def broken(opened: SweepResults) -> Conclusion:
        raise RuntimeError("no\nink")

    opened, lines = run_to_its_end(tmp_path, uri, broken)
    assert [line for line in lines if "ink" in line] == [
        "the report was not written (RuntimeError: no ink); isoflop report toy tries again"
    ]
    assert opened.summary is not None
    assert opened.summary.ok == 12
    assert parent_of(uri)[2].info.status == "FINISHED"


def test_ctrl_c_leaves_the_report_out_and_keeps_the_session(tmp_path: Path, uri: str) -> None:
    def interrupted(opened: SweepResults) -> Conclusion:
        raise KeyboardInterrupt

    opened, lines = run_to_its_end(tmp_path, uri, interrupted)
    assert any("left out" in line for line in lines)
    assert not opened.conclusion.path
    assert parent_of(uri)[2].info.status == "FINISHED"


def test_a_report_of_later_gets_its_link_once(tmp_path: Path, uri: str) -> None:
    run_to_its_end(tmp_path, uri, None)
    for _ in range(2):
        assert attach(uri, "toy", [Artifact("report.html", "<p>")])
    _, experiment, parent = parent_of(uri)
    note = parent.data.tags["mlflow.note.content"]
    where = f"#/experiments/{experiment.experiment_id}/runs/{parent.info.run_id}/artifacts/report.html"
    assert note.count(f"({where})") == 1
    assert "```\nproduct" in note  # the rest is as it was


def test_views_name_columns_that_runs_have(tmp_path: Path, uri: str) -> None:
    run_to_its_end(tmp_path, uri, None)
    client, experiment, _ = parent_of(uri)
    run = client.search_runs([experiment.experiment_id], "params.task != ''", max_results=1)[0]
    view = json.loads(experiment.tags["mlflow.sharedViewState.best"])
    known = {f"params.`{p}`" for p in run.data.params} | {f"metrics.`{m}`" for m in run.data.metrics}
    for column in ("params.`model`", "params.`method`", "params.`task`", "metrics.`error`", "metrics.`N`"):
        assert column in view["selectedColumns"]
        assert column in known
    assert view["orderByKey"] in known
    sections = {s["uuid"] for s in view["compareRunSections"]}
    assert {c["metricSectionId"] for c in view["compareRunCharts"]} == sections
    found = client.search_runs([experiment.experiment_id], view["searchFilter"])
    assert len(found) == 12  # all jobs, without the sweep's run


def spec_of(**changes: Any) -> Any:
    return load_spec(toy(**changes))[0]


def test_while_it_runs_the_description_links_rays_dashboard_where_one_is() -> None:
    assert links_of(opening(spec_of(), "http://10.0.0.1:8265"))["Ray dashboard"] == "http://10.0.0.1:8265"
    assert "Ray" not in opening(spec_of())


def test_names_are_shown_as_they_are_and_not_as_markup() -> None:
    nasty = Conclusion(("a_b_c at 2*N*V <b>|x|</b> [t](javascript:alert(1)) `c`",))
    note = closing(spec_of(description="<script>_x_</script>"), Findings(""), nasty)
    assert "<b>" not in note
    assert "<script>" not in note
    assert r"a\_b\_c at 2\*N\*V" in note
    assert "javascript" not in "".join(links_of(note.replace("\\[", "").replace("\\]", "")).values())


def test_a_description_is_never_longer_than_mlflow_keeps_and_says_what_is_missing() -> None:
    block = spec_of(laws=[LAW]).laws[0]
    findings = Findings("", [LawFinding(block, None, f"reason {i} " + "x" * 400) for i in range(100)])
    note = with_addresses(closing(spec_of(), findings, Conclusion()), "1" * 20, "f" * 32)
    assert len(note) < MOST
    shown = note.count("reason")
    assert f"{100 - shown} more laws and frontiers: [laws.json]" in note
    assert unquote(links_of(note)["laws.json"]).endswith("/artifacts/laws.json")
