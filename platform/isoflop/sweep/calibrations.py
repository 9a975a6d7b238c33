"""The texts that a sweep's methods calibrate on: one for all, or several that are compared.

A text is a choice of the search space where there are several, so that grids, samplers, ``exclude`` and ``zip`` know it as the
parameter ``calibration``, by the texts' names. A job has the text itself, never the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isoflop.core.documents import documents
from isoflop.core.errors import UserError
from isoflop.core.knobs import placed_path
from isoflop.core.yaml_source import Source
from isoflop.jobs import Job, MethodSpec
from isoflop.methods.base import METHODS, method_knobs
from isoflop.models.family import family_of
from isoflop.models.lm import calibrated_on
from isoflop.search import Branch, Param
from isoflop.sweep.blocks import OWN_TEXT, CalibrationBlock
from isoflop.sweep.spec import SweepSpec

PARAMETER = "calibration"
"""Of the search space, where a sweep names several texts."""
EXAMPLES = "n_calib"
"""The knob that ``samples`` sets."""


@dataclass(frozen=True)
class Calibration:
    """One text.

    Attributes:
        name: tells it from the sweep's others.
        choice: as jobs have it; empty for what a model is calibrated on where nothing is said.
        content: names the text's content; empty like ``choice``.
        samples: windows that every method calibrates on; None leaves it to the methods.
    """

    name: str
    choice: tuple[tuple[str, Any], ...] = ()
    content: str = ""
    samples: int | None = None

    def given(self, method: str) -> dict[str, int]:
        """Knobs that it sets in a method."""
        return {EXAMPLES: self.samples} if self.samples is not None and _counts(method) else {}

    def suits(self, job: Job) -> bool:
        """Whether a job has this text, wherever the text lay when it ran, and as many windows of it."""
        same = job.version("calibration") == self.content and _what(job.calibration) == _what(self.choice)
        return same and all(_has(method, self.given(method.name)) for method in job.methods)


WITHOUT = Calibration("")
"""Of jobs that calibrate nothing, and of sweeps that name no text."""


def calibrations(spec: SweepSpec, source: Source) -> tuple[Calibration, ...]:
    """The texts of a sweep, their places made absolute; every model can read each, and some method calibrates.

    Raises:
        UserError: a text that cannot be read or holds too little, two of one name, no method that calibrates, or one that says
            itself how many windows it takes.
    """
    if spec.calibration is None:
        return ()
    several = len(spec.calibration) > 1
    calibrating = [name for name in METHODS.names() if METHODS.get(name).calibrates]
    named = {method.name for composition in spec.methods for method in composition}
    if not named & set(calibrating):
        where = source.where((PARAMETER,))
        raise UserError(f"{where}: no method of the sweep calibrates; those that do: {', '.join(calibrating)}")
    found: dict[str, Calibration] = {}
    for index, block in enumerate(spec.calibration):
        where = source.where((PARAMETER, index) if several else (PARAMETER,))
        one = _calibration(block, spec, source, where)
        if one.name in found:
            raise UserError(f"{where}: a text of the name {one.name!r} stands there already; give one of them a name")
        twin = next((other for other in found.values() if _same(one, other)), None)
        if twin is not None:
            raise UserError(f"{where}: {one.name} is the same text as {twin.name}, cut the same way; keep one")
        found[one.name] = one
    return tuple(found.values())


def _calibration(block: CalibrationBlock, spec: SweepSpec, source: Source, where: str) -> Calibration:
    if block.samples is not None:
        _check_samples(spec, where)
    if block.data == OWN_TEXT:
        extra = [name for name in ("split", "length") if getattr(block, name)]
        if extra:
            raise UserError(f"{where}: {extra[0]} is of a text that is named; data: {OWN_TEXT} takes name and samples")
        return Calibration(block.name or OWN_TEXT, samples=block.samples)
    chosen = block.model_dump(exclude_none=True, exclude={"name"})
    chosen["data"] = placed_path(chosen["data"], source.folder)
    for entry in spec.models:
        try:
            calibrated_on(family_of(entry.ref).info(entry.ref, entry.options), chosen)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('calibration: ')}") from None
    samples = chosen.pop("samples", None)
    content = documents(chosen["data"], chosen["split"]).content
    return Calibration(block.name or Path(block.data).name, tuple(sorted(chosen.items())), content, samples)


def _check_samples(spec: SweepSpec, where: str) -> None:
    """``samples`` is the knob of the methods that count windows; it is said once."""
    methods = [method for composition in spec.methods for method in composition]
    if not any(_counts(method.name) for method in methods):
        counting = [name for name in METHODS.names() if _counts(name)]
        raise UserError(
            f"{where}: samples is the knob {EXAMPLES} of methods; those that have it: {', '.join(counting)}"
        )
    twice = next((m.name for m in methods if EXAMPLES in m.knobs), None)
    zipped = any(path.endswith(f".{EXAMPLES}") for block in spec.zip for path in block)
    if twice or zipped:
        raise UserError(f"{where}: samples sets {EXAMPLES}, which {twice or 'zip'} says itself; keep one of the two")


def compared(
    branches: Sequence[Branch], methods: dict[str, tuple[str, ...]], texts: Sequence[Calibration]
) -> list[Branch]:
    """The branches, those that calibrate with the choice of a text where there are several."""
    if len(texts) < 2:
        return list(branches)
    param = Param(PARAMETER, tuple(text.name for text in texts))
    return [Branch(b.label, (*b.params, param)) if calibrate(methods[b.label]) else b for b in branches]


def calibrate(methods: Sequence[str]) -> bool:
    """Whether one of the methods calibrates: what others compute depends on no text."""
    return any(METHODS.get(name).calibrates for name in methods)


def _counts(method: str) -> bool:
    return method in METHODS and METHODS.get(method).calibrates and EXAMPLES in method_knobs(method)


def _has(method: MethodSpec, knobs: dict[str, int]) -> bool:
    return all(dict(method.knobs).get(name) == value for name, value in knobs.items())


def _what(choice: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in choice if name not in ("data", "split")}


def _same(one: Calibration, other: Calibration) -> bool:
    return (one.content, _what(one.choice), one.samples) == (other.content, _what(other.choice), other.samples)
