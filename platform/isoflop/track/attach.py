"""Files for the parent run of a sweep that is not running: a report written later, a picture, a note."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from isoflop.track.database import prepare, sqlite_path
from isoflop.track.tracker import Artifact


def attach(uri: str, experiment: str, artifacts: Iterable[Artifact]) -> str | None:
    """Log files to a sweep's parent run; its state stays as it is, and its description gains links to pages among them.

    Args:
        uri: MLflow tracking URI.
        experiment: the sweep's name.
        artifacts: files; those of the same path are replaced.

    Returns:
        The parent run's id; None when MLflow has no run of this sweep (nothing is created then).

    Raises:
        MlflowException, OSError, Unusable: MLflow cannot be reached or refuses.
    """
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        return None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    prepare(uri)
    from mlflow import MlflowClient

    from isoflop.track.links import MOST, run_artifact
    from isoflop.track.projection import NOTE_TAG, PARENT_TAG, refuse_links

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    runs = client.search_runs([found.experiment_id], f"tags.`{PARENT_TAG}` = 'true'", max_results=1)
    if not runs:
        return None
    run_id = str(runs[0].info.run_id)
    files = list(artifacts)
    refuse_links(runs[0].info.artifact_uri)
    with tempfile.TemporaryDirectory() as folder:
        for artifact in files:
            target = Path(folder) / artifact.path
            target.parent.mkdir(parents=True, exist_ok=True)
            content = artifact.content
            target.write_bytes(content.encode() if isinstance(content, str) else content)
        client.log_artifacts(run_id, folder)
    note = runs[0].data.tags.get(NOTE_TAG, "")
    pages = [run_artifact(found.experiment_id, run_id, a.path) for a in files if a.path.endswith(".html")]
    missing = [f"[{page.rpartition('/')[2]}]({page})" for page in pages if page not in note]
    if missing:
        client.set_tag(run_id, NOTE_TAG, "\n\n".join([*missing, note])[:MOST])
    return run_id


def experiment_id(uri: str, experiment: str) -> str | None:
    """The id under which MLflow's pages show a sweep; None when it has nothing of that name."""
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=uri).get_experiment_by_name(experiment)
    return None if found is None else str(found.experiment_id)
