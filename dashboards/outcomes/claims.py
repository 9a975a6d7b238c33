"""What papers lead one to expect, and the test of it on rows.

``claims/<family>.yaml`` says, method by method, what to expect and which rows of which sweep would show it: ``a`` should have
less error than ``b`` (expect: better), more (worse, for controls that must lose), or at most ``margin`` more (equal). With
``y`` the same is said of another number of the rows: a metric, a cost.

A file is a list of claims, or a mapping of ``title``, ``about`` and ``claims`` whose claims have a section of their own on the page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from isoflop.core.errors import UserError, unknown
from isoflop.frontier.paired import ERROR, Paired, paired

CLAIMS = Path(__file__).parent / "claims"
EXPECTATIONS = ("better", "worse", "equal")


@dataclass(frozen=True)
class Section:
    """What stands together on the page, whatever the method.

    Attributes:
        name: the file's, as ``--only`` takes it.
        title, about: the heading, and what a reader must know of all its claims.
    """

    name: str
    title: str
    about: str = ""


@dataclass(frozen=True)
class Claim:
    """One expectation.

    Attributes:
        method, paper: what is judged.
        sweep: name of the sweep whose rows are compared (``sweeps/<sweep>.yaml``).
        claim: the expectation in one sentence: a has less error than b.
        a, b: SQL conditions on the rows; ``knobs->>'name'`` reads a knob.
        match: columns that must agree besides the model, with the share by which numbers may differ; ``model: .inf``
            compares different models.
        expect: ``better``; ``worse`` for a control that must lose; ``equal`` where a must not lose more than ``margin``.
        margin: for ``equal``.
        y: what is compared: ``error``, or a column, metric or cost of the rows, of which better is less.
        why: the likely reason where it does not show, for people.
        section: where it stands on the page; None: with the others of its method.
    """

    method: str
    paper: str
    sweep: str
    claim: str
    a: str
    b: str
    match: dict[str, float] = field(default_factory=dict)
    expect: str = "better"
    margin: float = 0.0
    y: str = ERROR
    why: str = ""
    section: Section | None = None

    @property
    def heading(self) -> str:
        """The section's name, or the method's."""
        return self.section.name if self.section else self.method

    @property
    def test(self) -> str:
        """A hash of what is compared, and how: wording and reasons may change without judging anew."""
        compared = [self.sweep, self.a, self.b, sorted(self.match.items()), self.expect, self.margin]
        compared += [] if self.y == ERROR else [self.y]
        return hashlib.sha256(json.dumps(compared).encode()).hexdigest()[:16]

    def shows(self, result: Paired) -> str:
        """``shows``, ``not separated`` or ``reversed``."""
        if self.expect == "equal":
            return (
                "shows" if result.high <= self.margin else "reversed" if result.low > self.margin else "not separated"
            )
        if result.verdict == self.expect:
            return "shows"
        return "not separated" if result.verdict == "not separated" else "reversed"


_ALLOWED = tuple(f.name for f in fields(Claim) if f.name != "section")
_OF_SECTION = ("title", "about", "claims")


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims of a file, or of all files of a folder. Raises UserError naming the file and the entry that is wrong."""
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    return [claim for file in files for claim in _claims_of(file)]


def _claims_of(file: Path) -> Iterator[Claim]:
    try:
        entries = yaml.safe_load(file.read_text()) or []
    except yaml.YAMLError as error:
        raise UserError(f"{file}: no YAML: {' '.join(str(error).split())}") from None
    section = None
    if isinstance(entries, dict) and "claims" in entries:
        section, entries = _section_of(file, entries), entries["claims"]
    if not isinstance(entries, list):
        raise UserError(f"{file}: a {type(entries).__name__}; wanted is a list of claims")
    for number, entry in enumerate(entries, 1):
        where = f"{file}: entry {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {entry!r}; wanted is a mapping of {', '.join(_ALLOWED)}")
        for key in entry:
            if key not in _ALLOWED:
                raise unknown("key", key, _ALLOWED, f"{where} ({entry.get('claim', '?')})")
        try:
            claim = Claim(**entry, section=section)
        except TypeError as error:
            raise UserError(f"{where} ({entry.get('claim', '?')}): {error}") from None
        _check(claim, where)
        yield claim


def _section_of(file: Path, entries: dict[str, Any]) -> Section:
    for key in entries:
        if key not in _OF_SECTION:
            raise unknown("key", key, _OF_SECTION, str(file))
    for key in ("title", "about"):
        if not isinstance(entries.get(key, ""), str):
            raise UserError(f"{file}: {key} = {entries[key]!r}; allowed: text")
    if not entries.get("title"):
        raise UserError(f"{file}: claims of a section need its title")
    return Section(file.stem, entries["title"], entries.get("about", "").strip())


def _check(claim: Claim, where: str) -> None:
    """Raise UserError where a value is none that a claim can have."""
    if claim.expect not in EXPECTATIONS:
        raise unknown("expect", claim.expect, EXPECTATIONS, where)
    for name in ("method", "paper", "sweep", "claim", "a", "b", "why", "y"):
        if not isinstance(getattr(claim, name), str):
            raise UserError(f"{where}: {name} = {getattr(claim, name)!r}; allowed: text")
    if not isinstance(claim.match, dict) or not all(_is_share(value) for value in claim.match.values()):
        raise UserError(
            f"{where}: match = {claim.match!r}; allowed: columns with the share by which numbers may differ"
        )
    if not _is_share(claim.margin) or (claim.margin and claim.expect != "equal"):
        raise UserError(f"{where}: margin = {claim.margin!r}; allowed: 0 or more, with expect: equal")


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def judge(claims: Sequence[Claim], rows_of: Callable[[str], pa.Table]) -> dict[str, Paired]:
    """The numbers of every claim, by ``Claim.test``.

    Args:
        rows_of: the finished rows of a sweep by its name.
    """
    return {
        claim.test: paired(rows_of(claim.sweep), claim.a, claim.b, {"model": 0.0, **claim.match}, y=claim.y)
        for claim in claims
    }
