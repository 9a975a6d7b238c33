"""The sweep specification: one YAML file, validated, immutable.

:func:`load_spec` is the only door: it reads YAML (or takes a dict), checks names, types and ranges, and raises a
:class:`UserError` that says file, line, key, value, what is allowed and the nearest right name. Knob names and ranges
are checked against the registered methods in :mod:`isoflop.sweep.resolve`.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from isoflop.core.errors import UserError
from isoflop.core.hashing import content_hash
from isoflop.core.secrets import redacted
from isoflop.core.text import storable
from isoflop.core.yaml_source import KeyPath, Source, load_yaml
from isoflop.sweep.blocks import (
    Block,
    Budget,
    Calibrations,
    Composition,
    FrontierBlock,
    LawBlock,
    Limits,
    Model_,
    Objective,
    ResourcesBlock,
    SearchBlock,
    Seed,
    Task_,
    Whole,
)
from isoflop.sweep.explain import explain

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class SweepSpec(Block):
    """A sweep: which models, methods and tasks, how to search them, within which budget, on which resources."""

    name: str = Field(description="Name of the sweep; letters, digits, '.', '_' and '-'.")
    description: str = ""
    seed: Seed = 0
    store: str | None = Field(None, description="Path or URI for results; default ~/.local/share/isoflop.")
    imports: tuple[str, ...] = Field(
        (), alias="import", description="Python modules that register further methods, models, tasks or laws."
    )
    models: tuple[Model_, ...] = Field(min_length=1)
    methods: tuple[Composition, ...] = Field(min_length=1)
    tasks: tuple[Task_, ...] = Field(min_length=1)
    calibration: Annotated[Calibrations, Field(min_length=1)] | None = Field(
        None,
        description="Text that methods calibrate on, or a list of texts that are compared; default: a model's training text, or what Python carries.",
    )
    repeats: Whole = Field(1, ge=1, le=10_000, description="Repeats with another seed each.")
    zip: tuple[dict[str, tuple[Any, ...]], ...] = Field(
        (), description="Blocks of parameters that move together, e.g. {model: [a, b], quecc.k: [1, 2]}."
    )
    exclude: tuple[dict[str, Any], ...] = Field(
        (), description="Combinations that are left out, e.g. {model: a, quecc.k: [1, 2]}."
    )
    search: SearchBlock = SearchBlock()
    objectives: tuple[Objective, ...] = Field((Objective(),), min_length=1)
    budget: Budget = Budget()
    resources: ResourcesBlock = ResourcesBlock()
    limits: Limits = Limits()
    laws: tuple[LawBlock, ...] = ()
    frontiers: tuple[FrontierBlock, ...] = ()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(
                "must begin with a letter or digit and hold only letters, digits, '.', '_' and '-' (at most 100)"
            )
        return value

    @field_validator("zip", "exclude", mode="before")
    @classmethod
    def _one_block(cls, value: Any) -> Any:
        return (value,) if isinstance(value, Mapping) else value

    @property
    def digest(self) -> str:
        """Hash of the specification; the same with the passwords of its addresses and without."""
        return content_hash(json.loads(redacted(json.dumps(self.model_dump(mode="json")))))


def load_spec(given: str | Path | Mapping[str, Any] | Source) -> tuple[SweepSpec, Source]:
    """Read and validate a specification. Looks no names up and imports nothing.

    Args:
        given: path of a YAML file, the same content as a dict, or a parsed source.

    Returns:
        The spec, and its source for messages about later checks.
    """
    if isinstance(given, Source):
        source = given
    else:
        source = Source(dict(given), "<dict>") if isinstance(given, Mapping) else load_yaml(given)
    _check_texts(source.data, (), source)
    if source.data is None:
        raise UserError(f"{source.name}: is empty; a sweep needs name, models, methods and tasks")
    if not isinstance(source.data, Mapping):
        raise UserError(
            f"{source.where(())}: a sweep is a block of keys (name, models, methods, tasks …), not {type(source.data).__name__}"
        )
    try:
        spec = SweepSpec.model_validate(source.data)
    except ValidationError as error:
        raise UserError(explain(error, source, SweepSpec)) from None
    _check_blocks_together(spec, source)
    return spec, source


def _check_blocks_together(spec: SweepSpec, source: Source) -> None:
    """What no block can tell by itself."""
    together = "list the values of its knobs in one entry"
    for what, names, instead in (
        ("models", [m.ref for m in spec.models], together),
        ("methods", ["+".join(sorted(m.name for m in c)) for c in spec.methods], together),
        ("tasks", [t.name for t in spec.tasks], "give one a label, as in {name}:mine"),
    ):
        double = next((i for i, name in enumerate(names) if name in names[:i]), None)
        if double is not None:
            told = instead.format(name=names[double].partition(":")[0])
            raise UserError(f"{source.where((what, double))}: {names[double]!r} is named twice; {told}")
    if len(spec.objectives) > 1 and spec.search.pruner != "none":
        raise UserError(f"{source.where(('search', 'pruner'))}: pruning needs a single objective")


def _check_texts(value: Any, path: KeyPath, source: Source) -> None:
    """A dict may hold what no file can: YAML refuses half of a surrogate pair by itself."""
    if isinstance(value, str) and not storable(value):
        raise UserError(f"{source.where(path)}: {value!r} is no text: half of a surrogate pair is in it")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_texts(key, path, source)
            _check_texts(inner, (*path, key), source)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_texts(inner, (*path, index), source)


def import_modules(spec: SweepSpec, source: Source) -> None:
    """Import the modules that the sweep names; they register what it uses. Nothing else is imported by name."""
    folder = str(source.folder) if source.folder is not None else None
    for index, module in enumerate(spec.imports):
        where = source.where(("import", index))
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
            raise UserError(f"{where}: {module!r} is not a module name like 'package.module'")
        if folder is not None and folder not in sys.path:
            sys.path.append(folder)
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{where}: module {module!r} cannot be imported: {error}") from None
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{where}: module {module!r} failed while it was imported: {type(error).__name__}: {error}"
            ) from None
