"""Everything but what an extra is for works without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import sys
for name in {packages!r}:
    sys.modules[name] = None  # an import of it fails
import isoflop
from isoflop.methods.base import METHODS
from isoflop.models.family import FAMILIES
from isoflop.tasks.base import TASKS
import isoflop.cli, isoflop.testing
print(len(METHODS.names()), len(TASKS.names()), len(FAMILIES.names()))
"""


@pytest.mark.parametrize(
    "packages", [("lm_eval", "datasets", "evaluate"), ("nbclient", "ipykernel"), ("accelerate", "gguf")]
)
def test_registries_and_commands_load_without_the_packages_of_extras(packages: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(packages=packages)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(int(count) > 3 for count in done.stdout.split())
