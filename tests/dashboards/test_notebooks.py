"""The notebooks run from top to bottom, on stores that hold what they expect."""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from isoflop.jobs import Outcome, ResolvedJob
from isoflop.ledger import Ledger, Store
from isoflop.sweep.resolve import resolve
from isoflop.sweep.rows import make_row
from isoflop.sweep.stored import save_spec

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "dashboards" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def quickstart_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's rows as they would be if errors followed a law exactly but for noise; nothing is trained."""
    folder = tmp_path_factory.mktemp("store")
    sweep = resolve(ROOT / "sweeps" / "quickstart.yaml")
    store = Store.open(str(folder))
    ledger = Ledger(store, sweep.spec.name).lock()
    rng = np.random.default_rng(0)
    rows = []
    for number, config in enumerate(sweep.space.grid()):
        for job in sweep.jobs_of(config):
            size, tokens = ResolvedJob.of(job).info.n_params, float(config["avgpool.tokens"])
            alpha, beta = (0.25, 0.05) if job.task == "visual-reasoning" else (0.05, 0.8)
            error = 0.6 * (size / 14_000) ** -alpha * tokens**-beta * np.exp(rng.normal(0, 0.03))
            scores = (np.arange(500) < round(500 * error)).astype(float).tolist()
            cost = 2.0 * size * (tokens + 2)
            outcome = Outcome(
                "ok",
                errors=scores,
                shard_sizes=[250, 250],
                axes={"N": size, "V": tokens, "Q": 2.0, "ratio": 36 / tokens},
                footprint={"flops": cost},
                started=time.time(),
            )
            rows.append(make_row(sweep.spec.name, number, job, outcome, 1))
    ledger.append(rows)
    save_spec(store, sweep, ledger)
    ledger.unlock()
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, quickstart_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISOFLOP_STORE", str(quickstart_store))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "notebooks are committed without outputs"
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("text/html" in output.get("data", {}) for output in shown), "nothing displays itself"
