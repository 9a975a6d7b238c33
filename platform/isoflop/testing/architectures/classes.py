"""Walks over classes of transformers that are no language models, and their part of the page."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from isoflop.testing.architectures.encoders import ENCODER_CHECKS, encoder_classes, examine_encoder
from isoflop.testing.architectures.vision import VISION_CHECKS, classes, examine_vision
from isoflop.testing.architectures.walk import EXACT, Check, Findings


@dataclass(frozen=True)
class ClassWalk:
    """One kind of models.

    Attributes:
        title, text: of its part of the page.
        checks: what is tried on every class.
        names: of the classes.
        examine: builds one small in an empty folder and tries every check on it.
    """

    title: str
    text: str
    checks: Mapping[str, Check]
    names: Callable[[], list[str]]
    examine: Callable[[str, Path], Findings]


WALKS = (
    ClassWalk(
        "Image classifiers",
        "Classes with a head, and those that compare images with texts naming the classes. **one pass** gives the stock logits;\n"
        "**vision_blocks** gives them through a reduction that removes nothing, and merging tokens that are equal (`tome`) changes nothing,\n"
        "whatever the head pools; **pixels** gives them behind a codec that loses nothing; **matrices** at 16 bits, and at 3 bits what the\n"
        "stock module gives with those weights; **16 bits** computes in bfloat16 and float16, on a processor, as near as these allow.",
        VISION_CHECKS,
        classes,
        examine_vision,
    ),
    ClassWalk(
        "Text encoders",
        "**one pass** gives stock embeddings, logits of masked tokens, of options or of pairs, texts of unequal length in one batch; **matrices**\n"
        "as above; **calibration** sees block by block what whole passes show, and `gptq`, `wanda` and `sparsegpt` run on it; **16 bits** as\n"
        "above. There is no cache, and methods on one are refused.",
        ENCODER_CHECKS,
        encoder_classes,
        examine_encoder,
    ),
)


def walked(walk: ClassWalk) -> dict[str, Findings]:
    """What became of every class."""
    found = {}
    for name in walk.names():
        with tempfile.TemporaryDirectory(prefix="isoflop-architecture-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = walk.examine(name, Path(folder))
    return found


def section(walk: ClassWalk, found: Mapping[str, Findings]) -> list[str]:
    """A kind's part of the page."""
    checks = list(walk.checks)
    lines = [f"## {walk.title}", "", *walk.text.split("\n"), ""]
    lines += [f"| class | {' | '.join(checks)} |", f"|---{'|---' * len(checks)}|"]
    taken = {name: findings for name, findings in found.items() if any(f.verdict == EXACT for f in findings.values())}
    lines += [
        f"| {name} | {' | '.join(str(findings[check]) for check in checks)} |" for name, findings in taken.items()
    ]
    lines += ["", "Not taken:", "", "| class | why |", "|---|---|"]
    for name, findings in found.items():
        if name not in taken:
            said = dict.fromkeys(re.sub(rf"{name} is not taken: ", "", str(f)) for f in findings.values())
            lines.append(f"| {name} | {'; '.join(said)} |")
    return [*lines, ""]
