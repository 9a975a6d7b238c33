"""The README in the folder of an exported checkpoint: what was measured, in how many bytes, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isoflop.core.version import __version__
from isoflop.jobs import Job


@dataclass(frozen=True)
class Note:
    """What the README is written from.

    Attributes:
        sweep: its name.
        row: of the ledger.
        job: that the row is of.
        form: format of the weights.
        size: bytes of the weights' files.
        difference, unchecked: as in ``Exported``.
    """

    sweep: str
    row: Mapping[str, Any]
    job: Job
    form: str
    size: int
    difference: float | None
    unchecked: str


def note(written: Note) -> str:
    """The README's text."""
    job = written.job
    lines = [f"# {job.model}, compressed with {job.method_label}", "", *_measured(written), "", *_bytes(written), ""]
    lines += [*_made(written), "", *_loading(written)]
    return "\n".join(lines) + "\n"


def _measured(written: Note) -> list[str]:
    row = written.row
    error = f"{row['error']:.6g}"
    error += f" ± {row['error_se']:.2g} (standard error over examples)" if row.get("error_se") else ""
    found = [f"- task `{written.job.task}`: error {error}, {row.get('n_examples') or '?'} examples"]
    found += [f"- {name}: {value:.6g}" for name, value in _pairs(row.get("metrics")) if value is not None]
    return ["## Measured", "", *found]


def _bytes(written: Note) -> list[str]:
    footprint = dict(_pairs(written.row.get("footprint")))
    found = []
    for name, what in (
        ("bits", "stored bits per weight of the compressed matrices"),
        ("ratio_weights", "dense over stored bytes of the compressed matrices"),
        ("model_bits", "stored bits per weight, all weights together"),
        ("weight_bytes", "bytes of all weights as the method stores them"),
        ("weight_bytes_dense", "bytes of all weights uncompressed"),
    ):
        if footprint.get(name) is not None:
            value = footprint[name]
            found.append(f"- {what}: {value:,.0f}" if "bytes of all" in what else f"- {what}: {value:.4g}")
    found.append(f"- bytes of this folder's safetensors: {written.size:,}")
    if written.form == "dense":
        found.append(
            "\nThe files hold every weight as it is served, in the type that it is computed in: as large as uncompressed. The bytes "
            "above are those of the method's own storage."
        )
    return ["## Bytes", "", *found]


def _made(written: Note) -> list[str]:
    job = written.job
    found = [f"- job `{job.id}` of sweep `{written.sweep}`, repeat {job.repeat}, seed {job.seed}"]
    options = ", ".join(f"{name}: {value}" for name, value in job.model_options)
    found.append(
        f"- model `{job.model}`" + (f" with {{{options}}}" if options else "") + f", version {job.version('model')}"
    )
    for method in job.methods:
        knobs = ", ".join(f"{name}: {value}" for name, value in method.knobs)
        found.append(f"- method `{method.name}` (version {job.version(f'method:{method.name}')}): {{{knobs}}}")
    if job.calibration:
        chosen = dict(job.calibration)
        rest = ", ".join(f"{k}: {v}" for k, v in chosen.items() if k not in ("data", "split"))
        found.append(f"- calibrated on `{Path(chosen['data']).name}` ({rest}; content {job.version('calibration')})")
    found.append(f"- written by isoflop {__version__}, format {written.form}; {_checked(written)}")
    return ["## How it was made", "", *found]


def _checked(written: Note) -> str:
    if written.unchecked:
        return f"not run beside what was measured: {written.unchecked}"
    return f"loaded again, its logits differed from those served by at most {written.difference:.2g} of the largest"


def _loading(written: Note) -> list[str]:
    served = dict(written.job.model_options).get("served")
    options = f": {{served: {served}}}" if served else ""
    return [
        "## Loading",
        "",
        "With transformers: `from_pretrained` of this folder"
        + ("" if written.form == "dense" else " (needs the package compressed-tensors)")
        + f'. In a sweep: `models: ["hf:PATH"{options}]`.',
    ]


def _pairs(value: Any) -> list[tuple[str, float]]:
    """A map column of a row."""
    return list(value.items()) if isinstance(value, Mapping) else list(value or ())
