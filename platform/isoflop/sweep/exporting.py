"""A finished job's compressed model as a checkpoint that others load.

The job's methods are applied as they were when it was measured, and the parameters that the model then has are written in
``save_pretrained`` form. What was written is loaded again, and has to be what was served: the same parameters bit for bit and
the same outputs, so that a method which does more while running than its weights say is refused rather than written wrongly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import UserError
from isoflop.core.public import look_beside
from isoflop.jobs import Job, ResolvedJob
from isoflop.jobs.devices import devices_here
from isoflop.jobs.runner import VersionMismatch, resolve_here
from isoflop.methods.base import METHODS
from isoflop.methods.weights import compressed_tensors
from isoflop.methods.weights.artefact import Serving
from isoflop.methods.weights.base import WeightMethod
from isoflop.methods.weights.grids import IntegerGridPayload
from isoflop.methods.weights.payloads import AbsentPayload
from isoflop.methods.weights.views import replaceable
from isoflop.models.base import Model
from isoflop.models.checkpoints.source import FAMILY, locate
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.lm import LmModel
from isoflop.models.quiet import no_progress_bars
from isoflop.stages import StageCache
from isoflop.sweep.api import SweepResults
from isoflop.sweep.export_note import Note, note
from isoflop.sweep.spec import import_modules, load_spec
from isoflop.sweep.stored import stored_source

DENSE = "dense"
FORMATS = (DENSE, compressed_tensors.NAME)
BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
)
"""What a checkpoint's folder holds beside config and weights, and what the copy takes over."""
CLOSE = 1e-5
"""Largest difference of logits, relative to the largest, at which two models are the same."""
_LISTED = 8


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder, format: of the checkpoint.
        job_id, model, method: what it is of.
        bytes: of its weights' files.
        difference: largest difference of its logits from those that were served, relative to the largest; None where it was not
            loaded again.
        unchecked: why not, or "".
    """

    folder: str
    format: str
    job_id: str
    model: str
    method: str
    bytes: int
    difference: float | None
    unchecked: str = ""


def export(
    results: SweepResults, job: str, folder: Path, form: str = DENSE, cache_dir: str | Path | None = None
) -> Exported:
    """Write the compressed model of a finished job.

    Args:
        job: its id, or enough of its beginning.
        folder: new, or empty.
        form: one of ``FORMATS``.
        cache_dir: of stages: those of the job are computed anew where this host has them no more.

    Raises:
        UserError: no such job, one that did not finish or compresses no weights, a folder that holds something, a form that
            cannot hold what the job stores, a method that does more than its weights say.
    """
    _check_folder(folder)
    source = stored_source(results.store, results.name)
    look_beside(source.folder)
    import_modules(load_spec(source)[0], source)
    row = _row(results, job)
    resolved = _resolved(row)
    cache = StageCache(cache_dir, devices_here())
    model = resolved.family.load(resolved.info, resolved.weights, cache)
    module = model.module
    if not hasattr(module, "save_pretrained"):
        raise UserError(
            f"model {resolved.info.ref} is a {type(module).__name__}, which no format of transformers holds"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _served(resolved, model, cache):
            _save(model, part)
            _beside(resolved, model, part)
            if form == compressed_tensors.NAME:
                _pack(model, part)
            difference, unchecked = _check(model, part, form, resolved)
        size = sum(path.stat().st_size for path in part.glob("*.safetensors"))
        written = Note(results.name, row, resolved.job, form, size, difference, unchecked)
        (part / "README.md").write_text(note(written), encoding="utf-8")
        part.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    label = resolved.job.method_label
    return Exported(str(folder), form, row["job_id"], resolved.job.model, label, size, difference, unchecked)


def _check_folder(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is no folder; allowed: a new folder, or an empty one")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: holds {next(iter(sorted(folder.iterdir()))).name} already; allowed: a new folder, or an empty one"
        )


def _row(results: SweepResults, job: str) -> dict[str, Any]:
    """The row of a job by the beginning of its id, if it finished and compressed weights."""
    rows = results.results(everything=True).to_pylist()
    found = [row for row in rows if job and row["job_id"].startswith(job)]
    if not found:
        some = [row["job_id"] for row in rows if row["status"] == "ok" and _on_weights(row)]
        listed = ", ".join(some[:_LISTED]) + (f" and {len(some) - _LISTED} more" if len(some) > _LISTED else "")
        raise UserError(f"no job of sweep {results.name} begins with {job!r}; on weights there are: {listed or 'none'}")
    if len(found) > 1:
        listed = ", ".join(row["job_id"] for row in found[:_LISTED])
        raise UserError(
            f"{len(found)} jobs of sweep {results.name} begin with {job!r} ({listed} …); give more of the id"
        )
    (row,) = found
    named = f"job {row['job_id']} of sweep {results.name}"
    if row["status"] != "ok":
        said = f" ({' '.join(str(row['error_text']).split())[:120]})" if row.get("error_text") else ""
        raise UserError(f"{named} did not finish: it is {row['status']}{said}; allowed: jobs with the status ok")
    if not _on_weights(row):
        raise UserError(
            f"{named} compresses no weights: its method is {row['method']}; allowed: jobs of {', '.join(_weight_methods())}"
        )
    others = [m for m in _methods(row) if m not in _weight_methods()]
    if others:
        raise UserError(
            f"{named} also runs {', '.join(others)}, which no checkpoint holds; allowed: jobs whose methods act on weights alone"
        )
    return row


def _methods(row: Mapping[str, Any]) -> list[str]:
    return [method["name"] for method in json.loads(row["spec"] or "{}").get("methods", [])]


def _on_weights(row: Mapping[str, Any]) -> bool:
    return any(method in _weight_methods() for method in _methods(row))


def _weight_methods() -> list[str]:
    return [name for name in METHODS.names() if issubclass(METHODS.get(name), WeightMethod)]


def _resolved(row: Mapping[str, Any]) -> ResolvedJob:
    try:
        return resolve_here(Job.from_dict(json.loads(row["spec"])))
    except VersionMismatch as error:
        raise UserError(f"job {row['job_id']} cannot be made again here: {error}") from None


@contextmanager
def _served(resolved: ResolvedJob, model: Model, cache: StageCache) -> Iterator[None]:
    """The model as it was measured; parts that are left out have no bias either."""
    with ExitStack() as stack:
        for method, stage in resolved.in_order:
            stack.enter_context(method.apply(model, cache.get(stage) if stage is not None else None))
        silent = _biases_of_absent(model)
        for parameter in stack.enter_context(replaceable(model, silent)).values():
            parameter.data.zero_()
        yield


def _biases_of_absent(model: Model) -> list[str]:
    """A part that is left out adds nothing; with zeros for its matrices alone it would add its biases."""
    serving = model.occupant(MATRICES)
    if not isinstance(serving, Serving):
        return []
    absent = {view.name for view in serving.views if isinstance(serving.payload(view), AbsentPayload)}
    named = dict(model.module.named_parameters())
    return [f"{name}.bias" for name in sorted(absent) if f"{name}.bias" in named]


def _save(model: Model, folder: Path) -> None:
    module: Any = model.module
    with no_progress_bars():
        module.save_pretrained(folder)


def _beside(resolved: ResolvedJob, model: Model, folder: Path) -> None:
    """Tokenizer, processor and chat template: the checkpoint's own files, or what the model's tokenizer saves."""
    options = dict(resolved.job.model_options)
    if resolved.info.family == FAMILY and not options.get("gguf"):
        source = locate(resolved.info.ref, str(options.get("revision", "main")), weights=False)
        for pattern in BESIDE:
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    elif getattr(resolved.info, "tokenizer", None) is not None and hasattr(model, "tokenizer"):
        model.tokenizer.save_pretrained(folder)


def _pack(model: Model, folder: Path) -> None:
    """Codes, scales and zero points in the place of the matrices that were written."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    serving = model.occupant(MATRICES)
    if not isinstance(serving, Serving):
        raise UserError(
            f"--format {compressed_tensors.NAME}: the job's method stores no grids; allowed: --format {DENSE}"
        )
    payloads: dict[str, IntegerGridPayload] = {}
    for view in serving.views:
        payload = serving.payload(view)
        compressed_tensors.check(view, payload)
        assert isinstance(payload, IntegerGridPayload)
        payloads[view.name] = payload
    dtype = next(view.holder.dtype for view in serving.views)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        path.unlink()
    for path in folder.glob("*.safetensors.index.json"):
        path.unlink()
    for name, payload in payloads.items():
        if tensors.pop(f"{name}.weight", None) is None:
            raise UserError(
                f"--format {compressed_tensors.NAME}: the checkpoint has no tensor {name}.weight; allowed: --format {DENSE}"
            )
        tensors |= {f"{name}.{part}": t for part, t in compressed_tensors.tensors_of(payload, dtype).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = compressed_tensors.config_of(serving.views, list(payloads.values()), model.module)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _check(model: Model, folder: Path, form: str, resolved: ResolvedJob) -> tuple[float | None, str]:
    """Load what was written; the largest difference of logits from those that are served, or why they were not compared."""
    if form == compressed_tensors.NAME and not _readable():
        return None, f"{compressed_tensors.NAME} from {compressed_tensors.READER} on is not installed"
    served: Any = model.module
    with no_progress_bars():
        loaded: nn.Module = type(served).from_pretrained(folder, dtype=served.dtype, local_files_only=True)
    loaded = loaded.to(model.devices[0]).eval()
    if form == DENSE:
        found = loaded.state_dict()
        differing = [name for name, t in served.state_dict().items() if not torch.equal(found[name].to(t.device), t)]
        if differing:
            raise UserError(f"{differing[0]} does not come back from safetensors as it is served; report this, please")
    if not isinstance(model, LmModel) or len(model.devices) > 1:
        return None, "only language models on one device are run beside what was measured"
    vocabulary = int(served.get_input_embeddings().weight.shape[0])
    ids_BT = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(model.devices[0])
    with torch.no_grad():
        wanted, got = served(input_ids=ids_BT).logits.float(), loaded(input_ids=ids_BT).logits.float()
    difference = float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1e-30))
    limit = CLOSE if served.dtype == torch.float32 or form == DENSE else 0.05  # scales in the model's own type
    if not difference <= limit:
        raise UserError(
            f"job {resolved.job.id[:12]}: {resolved.job.method_label} does more while running than its weights say (logits of the "
            f"checkpoint differ by {difference:.2g} of the largest), which {form} files do not hold"
        )
    return difference, ""


def _readable() -> bool:
    try:
        found = version(compressed_tensors.NAME)
    except PackageNotFoundError:
        return False
    return [int(part) for part in found.split(".")[:2]] >= [int(part) for part in compressed_tensors.READER.split(".")]
