"""The walk's page: which architectures the family ``hf`` takes, and why not the others.

python -m isoflop.testing.architectures                  # print the page
python -m isoflop.testing.architectures --write          # write it anew
python -m isoflop.testing.architectures llama phi3       # of some
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isoflop.core.errors import unknown
from isoflop.models import checkpoints
from isoflop.testing.architectures.classes import WALKS, section, walked
from isoflop.testing.architectures.llava import LLAVA_CHECKS, examine_llava
from isoflop.testing.architectures.small import (
    FULL,
    Architecture,
    NotSmall,
    architectures,
    full_attention,
    small_config,
    some_windows,
)
from isoflop.testing.architectures.vision_language import VISION_LANGUAGE_CHECKS, examine_vision_language
from isoflop.testing.architectures.walk import CHECKS, EXACT, Findings, examine
from isoflop.testing.small_vision_language import SMALL

PAGE = Path(checkpoints.__file__).parent / "architectures.md"
Examine = Callable[..., Findings]


@dataclass(frozen=True)
class Row:
    """One config of an architecture and what became of it.

    Attributes:
        changed: fields of its config that differ from the usual ones; empty for the config as it comes.
    """

    architecture: Architecture
    changed: tuple[tuple[str, Any], ...]
    findings: Findings

    @property
    def name(self) -> str:
        """``mistral (sliding_window = None)``."""
        how = ", ".join(_said(name, value) for name, value in self.changed)
        return f"{self.architecture.model_type} ({how})" if how else self.architecture.model_type

    @property
    def taken(self) -> bool:
        """Whether something of it is exact."""
        return any(finding.verdict == EXACT for finding in self.findings.values())

    @property
    def fine(self) -> bool:
        """Whether everything is exact, refused, or beyond the walk."""
        return all(finding.fine for finding in self.findings.values())


def rows(examine_one: Examine = examine, names: Iterable[str] | None = None) -> list[Row]:
    """Walk: every architecture as its config comes, with windows in some layers where it can have some, and without windows and caps.

    Args:
        examine_one: ``examine`` or ``examine_llava``.
        names: types of configs; None for all.
    """
    chosen = None if names is None else set(names)
    found = []
    for architecture in architectures():
        if chosen is not None and architecture.model_type not in chosen:
            continue
        for changes in _configs(architecture):
            with tempfile.TemporaryDirectory(prefix="isoflop-architecture-") as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                findings = examine_one(architecture, Path(folder), **changes)
            found.append(Row(architecture, tuple(changes.items()), findings))
    return found


def page(lms: Sequence[Row], llavas: Sequence[Row], classes: Mapping[str, Findings], more: Sequence[str] = ()) -> str:
    """All walks as Markdown.

    Args:
        classes: what became of each class of vision-language models; see ``vision_language_rows``.
        more: lines of those over other classes; see ``classes``.
    """
    import transformers

    alone = {row.name for row in lms if row.taken}
    return "\n".join(
        [
            "# Architectures",
            "",
            f"What the family `hf` makes of each of the {len({row.architecture.model_type for row in lms})} types of causal language models that transformers "
            f"{transformers.__version__} knows. Every one is",
            "built small from its config, saved, read back as a checkpoint, and compared with transformers' own module, which sees each text",
            "alone: **one pass** gives the same logits, with padding and with the attention occupied; **step by step** gives them token by",
            "token, also in the loop that serves; the **tap** reads the attention that eager attention gives (`fastv` goes by it); behind a",
            "**learned prompt** of a text's first embeddings the rest of it gives the text's logits. What is not exact is refused in one line, most",
            "of it when a sweep is planned. Generated; `python -m isoflop.testing.architectures --write` writes it anew.",
            "",
            *_taken("As language models", list(CHECKS), lms),
            *_others("Not taken:", lms),
            *_taken("Inside LLaVA", list(LLAVA_CHECKS), llavas),
            *_others("Not taken there, though as a language model:", [row for row in llavas if row.name in alone]),
            *_classes(classes),
            *more,
        ]
    )


def vision_language_rows() -> dict[str, Findings]:
    """Walk: every class of vision-language models, by its name."""
    found = {}
    for name in SMALL:
        with tempfile.TemporaryDirectory(prefix="isoflop-architecture-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = examine_vision_language(name, Path(folder))
    return found


def class_line(name: str, findings: Findings) -> str:
    """A class's line on the page."""
    cells = [_cell(_REASON.sub(r"\1", str(findings[check]))) for check in VISION_LANGUAGE_CHECKS]
    return f"| {name.removesuffix('ForConditionalGeneration')} | {' | '.join(cells)} |"


_REASON = re.compile(r"model \S+ does not offer \w+(?:: )?(.*?) \(it offers: [^)]*\)$")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 when something is neither exact nor refused."""
    import transformers

    parser = argparse.ArgumentParser(
        prog="python -m isoflop.testing.architectures", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", help="types of configs, as in config.json's model_type; all by default")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args(arguments)
    known = [architecture.model_type for architecture in architectures()]
    for name in given.names:
        if name not in known:
            parser.error(str(unknown("architecture", name, known)))
    transformers.logging.set_verbosity_error()
    lms, llavas = (rows(one, given.names or None) for one in (examine, examine_llava))
    classes = {} if given.names else vision_language_rows()
    others = [] if given.names else [(walk, walked(walk)) for walk in WALKS]
    text = page(lms, llavas, classes, [line for walk, found in others for line in section(walk, found)])
    if given.write and not given.names:
        PAGE.write_text(text)
    else:
        print(text)
    wrong = [row.name for row in (*lms, *llavas) if not row.fine]
    wrong += [name for name, found in classes.items() if not all(finding.fine for finding in found.values())]
    wrong += [
        name for _, found in others for name, findings in found.items() if not all(f.fine for f in findings.values())
    ]
    if wrong:
        print(f"neither exact nor refused: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _classes(found: Mapping[str, Findings]) -> list[str]:
    if not found:
        return []
    return [
        "## Classes of vision-language models",
        "",
        "Each built small with a processor and a tokenizer, saved, read back, and compared with transformers' own module on what its own",
        "processor makes of two pictures, which sees each prompt alone: as it comes, and with every place for methods taken by",
        "something that changes nothing. A place is **exact** where logits are the same in one pass and token by token.",
        "",
        f"| class | {' | '.join(VISION_LANGUAGE_CHECKS)} |",
        f"|---{'|---' * len(VISION_LANGUAGE_CHECKS)}|",
        *(class_line(name, findings) for name, findings in found.items()),
        "",
    ]


def _configs(architecture: Architecture) -> list[dict[str, Any]]:
    try:
        config = small_config(architecture.model_type)
    except NotSmall:
        return [{}]
    return [{}, *(changes for changes in (some_windows(config), full_attention(config)) if changes)]


def _taken(title: str, checks: list[str], found: Sequence[Row]) -> list[str]:
    lines = [f"## {title}", "", f"| architecture | {' | '.join(checks)} |", f"|---{'|---' * len(checks)}|"]
    for row in found:
        if row.taken:
            lines.append(f"| {row.name} | {' | '.join(_cell(str(row.findings[check])) for check in checks)} |")
    return [*lines, ""]


def _others(title: str, found: Sequence[Row]) -> list[str]:
    lines = [title, "", "| architecture | why |", "|---|---|"]
    for row in found:
        if not row.taken:
            lines.append(f"| {row.name} | {'; '.join(dict.fromkeys(_cell(str(f)) for f in row.findings.values()))} |")
    return [*lines, ""]


def _said(name: str, value: Any) -> str:
    if name != "layer_types":
        return f"{name} = {value}"
    return "full attention" if value == FULL else "windows in every other layer"


def _cell(text: str) -> str:
    short = re.sub(r"the attention that tokens get cannot be read off (\w+), which ", r"\1 ", text)
    return short.replace("|", "\\|")
