"""One small decoder for all tests of repairs."""

from __future__ import annotations

import pytest
from repair_cases import Bench

from isoflop.methods.repair.probe import RepairProbe


@pytest.fixture(scope="session")
def bench() -> Bench:
    """An untrained decoder with grouped queries and room for learned prompts; tests leave it as it was."""
    probe = RepairProbe({})
    return Bench(probe.model, probe.ctx)
