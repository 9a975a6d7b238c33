"""Everything but what an extra is for works without it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from isoflop.methods.base import METHODS
from isoflop.tasks.base import TASKS

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
    "packages",
    [
        ("lm_eval", "lmms_eval", "loguru", "datasets", "evaluate"),
        ("nbclient", "ipykernel"),
        ("accelerate", "gguf"),
        ("compressed_tensors",),
    ],
)
def test_registries_and_commands_load_without_the_packages_of_extras(packages: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(packages=packages)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(int(count) > 3 for count in done.stdout.split())


def test_what_others_register_is_none_of_ones_own() -> None:
    importlib.import_module("isoflop.bench.parts")
    assert {"bench-noop", "bench-knobs"} <= {*TASKS.names(), *METHODS.names()}
    assert not [name for name in (*TASKS.own(), *METHODS.own()) if name.startswith("bench-")]
    assert "quecc" in METHODS.own()
    assert "choice" in TASKS.own()
