"""The sweep in MLflow: experiment, parent run, nested runs. Everything here may be repeated without doubling anything.

Nested runs go through :mod:`isoflop.track.bulk` where that is possible, and through MLflow's public client otherwise.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from isoflop.core.text import safe_text
from isoflop.track.bulk import BulkWriter, run_id_of
from isoflop.track.database import Unusable, prepare
from isoflop.track.links import with_addresses
from isoflop.track.run_data import ERROR_TAGS, STAMP_TAG, RunData, TaskData, stamp_in, stamp_of
from isoflop.track.views import views

log = logging.getLogger(__name__)
PARENT_TAG = "isoflop.parent"
NOTE_TAG = "mlflow.note.content"  # a description
_SIGNPOST = "[the sweep's run](run:) · [jobs, newest first](runs:jobs) · [jobs, least error first](runs:best)"
_BATCH = 900  # of 1,000 metrics per request
_PAGE = 1000  # runs per request


class Projection:
    """The sweep's experiment, parent run and nested runs.

    Args:
        uri: tracking URI.
        experiment: name.
        artifact_root: for a new experiment; None leaves it to the server.
        bulk: write many runs per transaction where the database allows it.
        alive: called after each step of getting ready, which takes minutes where there are many runs.

    Raises:
        Unusable: the database can never be written as it is.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_root: str | None,
        bulk: bool = True,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        # It logs tracebacks of errors that it raises as well; whoever calls us tells of them in one line.
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        prepare(uri)
        alive()
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment_id = self._find_experiment(experiment, artifact_root)
        alive()
        self._name = experiment
        self._parent_id = ""
        location = self._client.get_experiment(self._experiment_id).artifact_location
        self._bulk = BulkWriter.open(uri, self._experiment_id, location) if bulk else None
        self._runs: dict[str, tuple[str, int]] = {}  # job id -> (run id, stamp of the row shown; 0 while half written)
        self._requested: set[str] = set()  # jobs whose run the public client was asked to create
        for page in self._bulk.shown() if self._bulk is not None else self._runs_shown():
            self._take_over(page)
            alive()

    def begin(self, spec_text: str, params: Mapping[str, str], note: str = "") -> None:
        """Create the parent run, or set it running again; ``note`` describes it until :meth:`end`."""
        found = self._client.search_runs([self._experiment_id], f"tags.`{PARENT_TAG}` = 'true'", max_results=1)
        if found:
            self._parent_id = found[0].info.run_id
            self._client.update_run(self._parent_id, status="RUNNING")
        else:
            run = self._client.create_run(
                self._experiment_id, run_name=f"sweep {self._name}", tags={PARENT_TAG: "true", **_source_tags()}
            )
            self._parent_id = run.info.run_id
        refuse_links(self._client.get_run(self._parent_id).info.artifact_uri)
        for key, value in params.items():
            self._client.set_tag(self._parent_id, f"isoflop.{key}", safe_text(value))
        self._client.log_text(self._parent_id, spec_text, "sweep.yaml")
        for key, value in {
            **views(),
            NOTE_TAG: with_addresses(_SIGNPOST, self._experiment_id, self._parent_id),
        }.items():
            self._client.set_experiment_tag(self._experiment_id, key, value)
        if note:
            self.describe(note)

    def describe(self, note: str) -> None:
        """Set the parent run's description: Markdown, in which :mod:`isoflop.track.links` fills in addresses."""
        text = with_addresses(safe_text(note, None), self._experiment_id, self._parent_id)
        self._client.set_tag(self._parent_id, NOTE_TAG, text)

    def show(self, batch: Sequence[RunData]) -> None:
        """Make MLflow show these rows; those that it shows already cost nothing."""
        newest = {data.job_id: data for data in batch}
        todo = [data for data in newest.values() if self._runs.get(data.job_id, ("", 0))[1] != data.stamp]
        if self._bulk is None:
            for data in todo:
                self._show_one(data)
            return
        common = {"mlflow.parentRunId": self._parent_id, **_source_tags()}
        ids = {
            data.job_id: self._runs.get(data.job_id, ("", 0))[0] or run_id_of(self._name, data.job_id) for data in todo
        }
        self._bulk.write((ids[data.job_id], data, {**common, STAMP_TAG: str(data.stamp)}) for data in todo)
        self._runs.update({data.job_id: (ids[data.job_id], data.stamp) for data in todo})

    def _show_one(self, data: RunData) -> None:
        """One row through the public client."""
        run_id, _ = self._runs.get(data.job_id, ("", 0))
        if run_id:
            self._forget_error(run_id, data)
        else:
            run_id = self._create(data)
            self._runs[data.job_id] = (run_id, 0)
        metrics = [Metric(k, v, data.end_ms, 0) for k, v in data.metrics.items()]
        metrics += [Metric(k, v, data.end_ms, step) for k, step, v in data.steps]
        params = [Param(k, v) for k, v in data.params.items()]
        tags = [RunTag(k, v) for k, v in data.tags.items()]
        self._client.log_batch(run_id, metrics=metrics[:_BATCH], params=params[:100], tags=tags)
        for begin in range(_BATCH, len(metrics), _BATCH):
            self._client.log_batch(run_id, metrics=metrics[begin : begin + _BATCH])
        if data.dataset is not None:
            self._client.log_inputs(run_id, datasets=[_input(data.dataset)])
        self._client.set_terminated(run_id, data.status, data.end_ms)
        # last: a run without it is half written and will be completed
        self._client.set_tag(run_id, STAMP_TAG, str(data.stamp))
        self._runs[data.job_id] = (run_id, data.stamp)

    def _create(self, data: RunData) -> str:
        """A new run; the one that an earlier request created when its answer was lost on the way."""
        if data.job_id in self._requested:
            found = self._client.search_runs(
                [self._experiment_id], f"tags.`isoflop.job_id` = '{data.job_id}'", ViewType.ACTIVE_ONLY, 1
            )
            if found:
                return str(found[0].info.run_id)
        self._requested.add(data.job_id)
        tags = {"mlflow.parentRunId": self._parent_id, **_source_tags(), **data.tags}
        run = self._client.create_run(self._experiment_id, start_time=data.start_ms, run_name=data.name, tags=tags)
        return str(run.info.run_id)

    def _forget_error(self, run_id: str, data: RunData) -> None:
        """A job that failed and was run again must not keep the error of its first life."""
        for tag in ERROR_TAGS:
            if tag not in data.tags:
                with contextlib.suppress(MlflowException):  # it had none
                    self._client.delete_tag(run_id, tag)

    def missing(self, table: pa.Table) -> list[int]:
        """The rows of a ledger that MLflow does not show yet, by their place in the table."""
        shown = {job_id: stamp for job_id, (_, stamp) in self._runs.items()}
        named = zip(*(table[c].to_pylist() for c in ("job_id", "sequence", "finished")), strict=True)
        return [index for index, (job_id, *row) in enumerate(named) if shown.get(job_id) != stamp_of(*row)]

    def end(self, artifacts: Sequence[Any], metrics: Mapping[str, float], note: str, status: str) -> None:
        """Attach laws, frontiers and plots to the parent run, describe it and end it."""
        refuse_links(self._client.get_run(self._parent_id).info.artifact_uri)
        with tempfile.TemporaryDirectory() as folder:
            for artifact in artifacts:
                path = Path(folder) / artifact.path
                path.parent.mkdir(parents=True, exist_ok=True)
                content = artifact.content
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            if artifacts:
                self._client.log_artifacts(self._parent_id, folder)
        if metrics:
            self._client.log_batch(self._parent_id, metrics=[Metric(k, v, 0, 0) for k, v in metrics.items()])
        if note:
            self.describe(note)
        self._client.set_terminated(self._parent_id, status)

    def _find_experiment(self, name: str, artifact_root: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        try:
            # the kind opens MLflow's model-training view, with its runs table and charts, instead of the one for agents
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(self._client.create_experiment(name, artifact_location=artifact_root, tags=tags))
        except MlflowException:
            again = self._client.get_experiment_by_name(name)  # another driver was faster
            if again is None:
                raise
            return str(again.experiment_id)

    def _take_over(self, shown: Iterable[tuple[str, str, int]]) -> None:
        """Which rows MLflow shows already: run id, job id, stamp; a double of an interrupted session is deleted."""
        for run_id, job_id, stamp in shown:
            kept = self._runs.get(job_id)
            if kept is None:
                self._runs[job_id] = (run_id, stamp)
                continue
            loser, winner = (run_id, kept) if kept[1] >= stamp else (kept[0], (run_id, stamp))
            self._client.delete_run(loser)
            self._runs[job_id] = winner

    def _runs_shown(self) -> Iterator[list[tuple[str, str, int]]]:
        """Pages of what :meth:`_take_over` takes, through the public client."""
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id], "tags.`isoflop.job_id` != ''", ViewType.ACTIVE_ONLY, _PAGE, page_token=token
            )
            tags = [(run.info.run_id, run.data.tags) for run in page]
            yield [(run_id, t["isoflop.job_id"], stamp_in(t.get(STAMP_TAG))) for run_id, t in tags]
            token = page.token
            if not token:
                return


def refuse_links(artifact_uri: str) -> None:
    """MLflow follows symbolic links where it keeps files; whoever made the store may have laid them."""
    if not artifact_uri.startswith(("file:", "/")):
        return
    folder = Path(unquote(urlparse(artifact_uri).path))
    for path in (folder.parent, folder, *folder.rglob("*")):
        if path.is_symlink():
            raise Unusable(
                f"{path} is a symbolic link inside a store, through which nothing is written; remove it and resume"
            )


def _input(data: TaskData) -> DatasetInput:
    dataset = Dataset(data.name, data.digest, data.SOURCE_TYPE, data.source, profile=data.profile)
    return DatasetInput(dataset, [InputTag(*data.CONTEXT)])


def _source_tags() -> dict[str, str]:
    return {"mlflow.user": getpass.getuser(), "mlflow.source.name": "isoflop", "mlflow.source.type": "LOCAL"}
