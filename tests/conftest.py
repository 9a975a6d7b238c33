"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# One thread: the machines that run these tests are small, and results must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("isoflop", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isoflop")

TESTS = Path(__file__).parent
ENGINE = TESTS / "engine"


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist ignore Ctrl-C, and so would everything that tests start in them or try on themselves."""
    if hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In pytest-xdist's workers: what cannot be divided and takes longest begins first."""
    if hasattr(config, "workerinput"):
        from sharing import unit_of

        items.sort(key=lambda item: unit_of(item.nodeid) != "one-at-a-time")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole units to whichever worker is free, in the order of collection; with ``--dist loadgroup`` only."""
    if config.getoption("dist") != "loadgroup":
        return None
    from sharing import Units

    config.option.loadscopereorder = False
    return Units(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip what fails because torch was told of a lesser processor than oneDNN sees, by the exact words of its error.

    With ``ATEN_CPU_CAPABILITY`` alone, bfloat16 attention asks for kernels that its lesser build does not hold. No machine
    that really is the lesser one comes there, nor does ``make test-cpus``, which tells oneDNN, too.
    """
    try:
        return (yield)
    except RuntimeError as error:
        pretended = os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2")
        if pretended and "pack_vnni2 is only supported when avx512 is supported" in str(error):
            pytest.skip("torch was told of another processor than oneDNN sees; `make test-cpus` tells both")
        raise


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's store or cache."""
    monkeypatch.setenv("ISOFLOP_STORE", str(tmp_path / "default-store"))
    monkeypatch.setenv("ISOFLOP_CACHE", os.environ.get("ISOFLOP_TEST_CACHE", str(tmp_path / "default-cache")))


@pytest.fixture(scope="module")
def toy_parts() -> Iterator[ModuleType]:
    """The toy world (tests/engine/toy_parts.py), registered for the tests of one module and then forgotten."""
    from isoflop.methods.base import METHODS
    from isoflop.models.family import FAMILIES
    from isoflop.tasks.base import TASKS

    for registry in (METHODS, FAMILIES, TASKS):
        registry.names()  # the built-in parts first
    sys.path.insert(0, str(ENGINE))
    module = importlib.import_module("toy_parts")
    yield module
    sys.path.remove(str(ENGINE))
    for registry in (METHODS, FAMILIES, TASKS):
        for name in registry.names():
            if (entry := registry.get(name)) and getattr(entry, "__module__", "") == "toy_parts":
                registry._entries.pop(name)
    sys.modules.pop("toy_parts", None)


def _children() -> set[int]:
    """Process ids of all descendants of this process."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found: set[int] = set()
    grown = {os.getpid()}
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown} - found
        found |= grown
    return found


@pytest.fixture(scope="session")
def children() -> object:
    """A function that gives the process ids of all descendants of the test process."""
    return _children
