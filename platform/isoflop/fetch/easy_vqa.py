"""easy-VQA: some thousand drawn shapes with questions about them, made by Victor Zhou.

``train.jsonl`` and ``test.jsonl`` have an image, a question and an answer, as the task ``vqa`` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isoflop.fetch.base import Say, Source
from isoflop.fetch.wheels import Wheel, taken

WHEEL = Wheel("easy-vqa==1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")
SPLITS = ("train", "test")


def make(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
    """Take images and questions out of the wheel."""
    counts = {}
    with WHEEL.opened(downloads, say) as archive:
        for split in SPLITS:
            (folder / split).mkdir()
            root = f"easy_vqa/data/{split}"
            for member in archive.namelist():
                if member.startswith(f"{root}/images/") and member.endswith(".png"):
                    taken(archive, member, folder / split / Path(member).name)
            rows = [
                {"image": f"{split}/{image}.png", "question": question, "answers": answer}
                for question, answer, image in json.loads(archive.read(f"{root}/questions.json"))
            ]
            (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
            counts[split] = len(rows)
    return {"from": WHEEL.requirement, "questions": counts}


SOURCE = Source("easy-vqa", "easy-VQA: drawn shapes with questions about them (MIT)", "1", {"wheel": make})
