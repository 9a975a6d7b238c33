"""Golden numbers: a few figures of a fixed small run of every method, task and kind of model, kept beside its version.

Versions are part of every job's id: results of a store are found again where name, options and versions are the same. Code
that gives other numbers under the same version therefore mixes old rows with new ones, and nothing else would say so. The
runs are those of the conformance suite's probes, on untrained weights. Kept are smooth summaries of outputs, and costs, within
``TOLERANCE``; but none that a near-tie decides, since rounding differs between processors: what is written was tried with
slightly other weights, too, and what moved is left out.

    python -m isoflop.testing.golden                        # compare all
    python -m isoflop.testing.golden --write                # write what is new, or has a new version
    python -m isoflop.testing.golden --write method:quecc   # only that
    python -m isoflop.testing.golden --prune method:quecc   # leave out what comes out otherwise here, on another processor
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoflop.core.errors import unknown
from isoflop.core.hashing import content_hash
from isoflop.methods.base import METHODS, Method
from isoflop.methods.probe import Probe
from isoflop.models.base import Model
from isoflop.models.family import FAMILIES, family_of
from isoflop.models.worlds.english import python_release
from isoflop.tasks.base import TASKS, Task
from isoflop.testing.configurations import at_default, ladder
from isoflop.testing.model_probes import PROBES as MODEL_PROBES
from isoflop.testing.model_probes import ModelProbe, model_probe
from isoflop.testing.task_probes import TaskProbe, task_probe

TOLERANCE = 5e-5
"""Of a number, relative to itself; of a mean over outputs, to their root mean square. Rounding of one processor or another
moves them by 1e-7."""
SHAKE, SHAKES = 2e-6, 12
"""Relative noise on all weights, and how many draws of it, under which a number must hold to be kept."""
ROWS = 3
"""Examples whose outputs are kept for themselves, so that a near-tie in one of them costs the others nothing."""
FOLDER = Path("tests") / "golden"
_TIMES = re.compile(r"(^|_)(seconds|ms|peak)(_|$)")
Make = Callable[[int], "Golden"]
"""From the number of a shake, 0 for none."""


@dataclass(frozen=True)
class Golden:
    """Numbers of one thing.

    Attributes:
        kind, name: ``method``, ``task`` or ``model``, and which.
        version: that its rows carry.
        numbers: by name; those under ``….mean`` and ``….wave`` are means whose scale is ``….rms``.
    """

    kind: str
    name: str
    version: str
    numbers: Mapping[str, float]

    @property
    def id(self) -> str:
        """``method:quecc``."""
        return f"{self.kind}:{self.name}"

    @property
    def file(self) -> str:
        """Of a name that file systems take."""
        return re.sub(r"[^A-Za-z0-9._-]", "_", f"{self.kind}-{self.name}") + ".json"


def golden_method(cls: type[Method], probe: Probe | None = None, shake: int = 0) -> Golden:
    """Outputs, cost and footprint of a method at its defaults, and in the middle of its ratio knob's range."""
    used = probe if probe is not None else cls.probe()
    _shake(used.model, shake)
    rungs = ladder(cls, used)
    numbers: dict[str, float] = {}
    for place, method in {
        "default": at_default(cls, used),
        **({"middle": rungs[len(rungs) // 2]} if rungs else {}),
    }.items():
        with method.apply(used.model, used.prepared(method, 0)):
            outputs = used.outputs(range(used.examples))
            numbers |= summary(f"{place}.outputs", outputs)
            for row in range(min(ROWS, len(outputs))):
                numbers |= summary(f"{place}.outputs {row}", outputs[row])
            cost = used.cost()
            numbers |= _costs(place, {**method.footprint(used.model, used.ctx), "cost": cost})
    return Golden("method", cls.name, cls.version, numbers)


def golden_task(cls: type[Task], probe: TaskProbe | None = None, shake: int = 0) -> Golden:
    """Errors, metrics and measured costs of a task on its probe's model; times are left out."""
    used = probe if probe is not None else task_probe(cls)
    _shake(used.model, shake)
    task = used.task(cls)
    numbers: dict[str, float] = {}
    with used.applied():
        if not used.timed:
            shards = list(task.evaluate(used.model, used.ctx, 0))
            columns = {"errors": [s.errors for s in shards]}
            columns |= {name: [s.metrics[name] for s in shards] for name in shards[0].metrics}
            for name, parts in columns.items():
                numbers |= summary(name, torch.cat([torch.as_tensor(part) for part in parts]))
        numbers |= _costs("costs", task.measure(used.model, used.ctx))
    return Golden("task", cls.name, cls.version.replace(f"-{python_release()}", ""), numbers)


def golden_model(ref: str, options: Mapping[str, Any], probe: ModelProbe | None = None, shake: int = 0) -> Golden:
    """Outputs and sizes of a model before its training, under the version of its recipe and of the training's code."""
    family = family_of(ref)
    used = probe if probe is not None else model_probe(family.name)
    info = family.info(ref, options)
    model = used.load(info)
    _shake(model, shake)
    stage = family.weights(info, (), 0)
    # not the model's own version, which on some corpora tells the Python release
    version = content_hash({"stage": "" if stage is None else stage.version, "recipe": dict(info.options)}, 12)
    sizes = {"n_params": float(info.n_params), "dense_bytes": model.dense_weight_bytes()}
    return Golden("model", _named(ref, options), version, {**summary("outputs", used.outputs(model)), **sizes})


def summary(name: str, x: Tensor) -> dict[str, float]:
    """Mean, root mean square, and the mean against a wave over the places, which tells an order from another."""
    flat = x.detach().double().cpu().flatten()
    wave = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    found = {"mean": flat.mean(), "rms": flat.square().mean().sqrt(), "wave": (flat * wave).mean()}
    return {f"{name}.{what}": _short(float(value)) for what, value in found.items()}


@torch.no_grad()
def _shake(model: Model, number: int) -> None:
    """A little noise on every weight; none for number 0."""
    if not number:
        return
    generator = torch.Generator().manual_seed(number)
    for parameter in model.module.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.mul_(1 + SHAKE * noise)


def _named(ref: str, options: Mapping[str, Any]) -> str:
    return ref + "?" * bool(options) + "&".join(f"{name}={value}" for name, value in options.items())


def _costs(place: str, costs: Mapping[str, float]) -> dict[str, float]:
    return {f"{place}.{name}": _short(float(v)) for name, v in sorted(costs.items()) if not _TIMES.search(name)}


def _short(value: float) -> float:
    return float(f"{value:.9g}")


def everything(own: bool = True) -> dict[str, Make]:
    """What has golden numbers, by id.

    Args:
        own: this project's parts only, not those that others have registered.
    """
    found: dict[str, Make] = {}
    for name in METHODS.own() if own else METHODS.names():
        cls = METHODS.get(name)
        found[f"method:{name}"] = lambda shake, cls=cls: golden_method(cls, shake=shake)  # type: ignore[misc]
    for name in TASKS.own() if own else TASKS.names():
        task = TASKS.get(name)
        found[f"task:{name}"] = lambda shake, task=task: golden_task(task, shake=shake)  # type: ignore[misc]
    for family in FAMILIES.names():
        if family in MODEL_PROBES and FAMILIES.get(family).members():  # a checkpoint's version is a hash of its files
            for ref, options in model_probe(family).kinds:
                found[f"model:{_named(ref, options)}"] = lambda shake, ref=ref, options=options: golden_model(  # type: ignore[misc]
                    ref, options, shake=shake
                )
    return found


def check_golden(found: Golden, folder: Path) -> None:
    """Compare with what is kept.

    Raises:
        AssertionError: nothing is kept, or of another version, or other numbers; says what to do.
    """
    how = f"`python -m isoflop.testing.golden --write {found.id}`"
    kept = read(folder / found.file)
    assert kept is not None, (
        f"{found.id} has no golden numbers yet: write them with {how} and commit {folder / found.file}"
    )
    assert kept.version == found.version, (
        f"{found.id} has version {found.version!r}, its golden numbers are of version {kept.version!r}: write them anew with {how}"
    )
    others = list(differences(kept.numbers, found.numbers).values())
    assert not others, (
        f"{found.id} gives other numbers than before under the same version {found.version!r}: {'; '.join(others[:4])}"
        f"{' …' if len(others) > 4 else ''}. Raise its `version`, since rows of a store from before would stand beside new ones, "
        f"then write them anew with {how}. (Where what it is run on has changed, and not the {found.kind}: the same with --force.)"
    )


def differences(kept: Mapping[str, float], found: Mapping[str, float]) -> dict[str, str]:
    """What is kept and is gone or differs by more than ``TOLERANCE``, in words by name; what nobody kept may have any value."""
    return {
        name: f"{name} {kept[name]:g} → {found[name]:g}" if name in found else f"{name} is gone"
        for name in sorted(kept)
        if name not in found or _moved(name, kept, found) > TOLERANCE
    }


def _moved(name: str, before: Mapping[str, float], now: Mapping[str, float]) -> float:
    scale = max(abs(before[name]), before.get(_scale_of(name), 0.0))
    difference = abs(before[name] - now[name])
    return difference / scale if difference and scale else difference


def _scale_of(name: str) -> str:
    return f"{name.rpartition('.')[0]}.rms"


def steady(make: Make) -> Golden:
    """The numbers that no near-tie decides: those that hold within half the tolerance under every shake of the weights."""
    found, shaken = make(0), [make(number).numbers for number in range(1, SHAKES + 1)]
    held = {
        name: value
        for name, value in found.numbers.items()
        if all(name in other and _moved(name, found.numbers, other) <= TOLERANCE / 2 for other in shaken)
    }
    # a mean has no scale without the root mean square beside it
    loose = {name for name in held if (scale := _scale_of(name)) in found.numbers and scale not in held}
    return replace(found, numbers={name: value for name, value in held.items() if name not in loose})


def read(path: Path) -> Golden | None:
    """What is kept in a file; None where there is none."""
    return Golden(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def write(make: Make, folder: Path, force: bool = False) -> bool:
    """Keep numbers; whether anything was written.

    Raises:
        AssertionError: other numbers are kept under the same version, and nobody forces it.
    """
    found = make(0)
    kept = read(folder / found.file)
    if kept is not None and kept.version == found.version:
        if not force:
            check_golden(found, folder)
        if not differences(kept.numbers, found.numbers):
            return False  # a last digit is no news
    folder.mkdir(parents=True, exist_ok=True)
    (folder / found.file).write_text(json.dumps(asdict(steady(make)), indent=1) + "\n", encoding="utf-8")
    return True


def prune(make: Make, folder: Path) -> list[str]:
    """Leave out what comes out otherwise here: for processors that round otherwise than the one that wrote. Says what went.

    Raises:
        AssertionError: nothing is kept, or of another version, or nothing is left.
    """
    found = make(0)
    path = folder / found.file
    kept = read(path)
    assert kept is not None, f"{found.id} has no golden numbers yet"
    assert kept.version == found.version, f"{found.id} has version {found.version!r}, and {kept.version!r} is kept"
    moved = differences(kept.numbers, found.numbers)
    if moved:
        left = {name: value for name, value in kept.numbers.items() if name not in moved}
        loose = {name for name in left if _scale_of(name) in kept.numbers and _scale_of(name) not in left}
        left = {name: value for name, value in left.items() if name not in loose}
        assert left, f"{found.id}: no number holds here"
        path.write_text(json.dumps(asdict(replace(kept, numbers=left)), indent=1) + "\n", encoding="utf-8")
    return list(moved.values())


def stale(folder: Path, known: Mapping[str, Any]) -> list[Path]:
    """Files about what is not there any more."""
    return [path for path in sorted(folder.glob("*.json")) if (kept := read(path)) is not None and kept.id not in known]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 where everything is as kept, or was written."""
    parser = argparse.ArgumentParser(
        prog="python -m isoflop.testing.golden", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("ids", nargs="*", help="method:NAME, task:NAME or model:REFERENCE; by default everything")
    parser.add_argument("--write", action="store_true", help="keep numbers that are new or of a new version")
    parser.add_argument(
        "--prune", action="store_true", help="leave out kept numbers that come out otherwise on this processor"
    )
    parser.add_argument(
        "--force", action="store_true", help="also where only the run has changed, under the same version"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where they are kept (default: {FOLDER})")
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="registers parts of yours"
    )
    chosen = parser.parse_args(arguments)
    for module in chosen.modules:
        importlib.import_module(module)
    known = everything(own=not chosen.ids and not chosen.modules)
    for name in chosen.ids:
        if name not in known:
            parser.error(str(unknown("golden number", name, known)))
    wrong = 0
    for name in chosen.ids or known:
        try:
            if chosen.prune:
                gone = prune(known[name], chosen.folder)
                print(f"{name}: {'; '.join(gone) + ' left out' if gone else 'as kept'}")
            elif chosen.write:
                print(f"{name}: {'written' if write(known[name], chosen.folder, chosen.force) else 'as kept'}")
            else:
                check_golden(known[name](0), chosen.folder)
        except AssertionError as error:
            wrong += 1
            print(error, file=sys.stderr)
    for path in [] if chosen.ids else stale(chosen.folder, known):
        wrong += 1
        print(f"{path} is about nothing that is registered: delete it", file=sys.stderr)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
