"""The run on every processor: nothing new is left out, no failure is lost, no setting of the caller leaks in."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "on_processors.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_processors", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["on_processors"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_folder_that_nobody_named_is_run(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("frontier", "models", "brand_new"):
        (tmp_path / "tests" / name).mkdir(parents=True)
        (tmp_path / "tests" / name / "test_it.py").touch()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.folders() == ["tests/brand_new", "tests/models"]


def test_folders_without_models_exist_and_train_nothing(script: ModuleType) -> None:
    for name in script.WITHOUT_MODELS:
        files = [path for path in (SCRIPT.parent / name).glob("*.py") if path != Path(__file__)]
        sources = [path.read_text(encoding="utf-8") for path in files]
        assert sources, name
        assert not any(".backward()" in text or "torch.optim" in text for text in sources), name


def test_settings_of_the_caller_do_not_reach_another_processor(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = script.Place("avx512", 2).environment()
    assert (found["ATEN_CPU_CAPABILITY"], found["OMP_NUM_THREADS"]) == ("avx512", "2")
    assert "ONEDNN_MAX_CPU_ISA" not in found


def test_failures_and_broken_runs_are_told_and_end_the_run_badly(tmp_path: Path) -> None:
    case = tmp_path / "test_case.py"
    case.write_text("def test_good():\n    pass\n\n\ndef test_bad():\n    assert 1 == 2\n")

    def run(threads: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), "--on", "default", "--threads", threads, str(case), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    bad = run("1,2")
    assert bad.returncode == 1
    (line,) = [line for line in bad.stdout.splitlines() if "test_bad" in line and line.rstrip().endswith("FAILED")]
    assert line.count("FAILED") == 2
    assert run("1", "-k", "good").returncode == 0
    broken = run("1", "-k", "nothing")
    assert broken.returncode == 1
    assert "broke off" in broken.stdout
