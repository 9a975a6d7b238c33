"""``isoflop methods``, ``models``, ``tasks`` and ``samplers``: what a sweep can name."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from typing import Any

import click
from rich.markup import escape

from isoflop.cli.common import console, emit, grid, json_option
from isoflop.core.errors import unknown
from isoflop.core.hook import names_of
from isoflop.core.knobs import KnobSpec, knob_specs
from isoflop.methods.base import METHODS, Method
from isoflop.models.base import ModelInfo
from isoflop.models.family import FAMILIES, ModelFamily, family_of
from isoflop.search import STRATEGIES
from isoflop.tasks.base import TASKS

_OWN_LINE = re.compile(r"\s|[-*|] |\d+[.)] |\([a-z0-9]+\) ")  # how a line starts that is not joined to the one before

import_option = click.option(
    "--import", "modules", multiple=True, metavar="MODULE", help="Import a module that registers more."
)


def _import(modules: tuple[str, ...]) -> None:
    if modules and os.getcwd() not in sys.path:  # as with `python -m`, and as a sweep's own folder
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise click.BadParameter(f"{module!r} cannot be imported: {error}", param_hint="--import") from None


def _plain(value: Any) -> Any:
    """A default as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _knob_dict(spec: KnobSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "type": spec.type_name,
        "default": None if spec.required else _plain(spec.default),
        "allowed": spec.describe(),
        "ratio": spec.knob.ratio,
        "unit": spec.knob.unit,
        "doc": spec.knob.doc,
    }


@click.command("methods")
@click.argument("name", required=False)
@click.option("--family", help="Only the methods of a family, with their knobs.")
@click.option("--knobs/--brief", "knobs", default=None, help="With all knobs, or without (default: those of a family).")
@import_option
@json_option
def methods_command(
    name: str | None, family: str | None, knobs: bool | None, modules: tuple[str, ...], as_json: bool
) -> None:
    """List compression methods by family, or document one."""
    _import(modules)
    if name is not None:
        _document(name, METHODS.get(name), as_json)
        return
    found = [(n, METHODS.get(n)) for n in METHODS]
    found.sort(key=lambda pair: (pair[1].family, pair[0]))
    if family is not None:
        families = sorted({c.family for _, c in found})
        if family not in families:
            raise unknown("family", family, families)
        found = [pair for pair in found if pair[1].family == family]
    data: list[dict[str, Any]] = [
        {
            "name": n,
            "family": c.family,
            "paper": c.paper,
            "version": c.version,
            "hooks": names_of(c.hooks),
            "trains_model": c.trains_model,
            "knobs": [_knob_dict(k) for k in knob_specs(c).values()],
        }
        for n, c in found
    ]

    def human() -> None:
        _print_methods(data, family is not None if knobs is None else knobs)

    emit(data, as_json, human)


def _print_methods(data: list[dict[str, Any]], knobs: bool) -> None:
    """A line per method; with knobs, a line for each of those. On a terminal a family is named once."""
    columns = ("family", "method", *(("knobs (* sets the ratio)",) if knobs else ()), "paper")
    out = console()
    rows, before = [], ""
    for d in data:
        shown = d["family"] if d["family"] != before or not out.is_terminal else ""  # every line of a pipe is whole
        lines = "\n".join(_knob_line(k) for k in d["knobs"]) or "-"
        rows.append((shown, d["name"], *((lines,) if knobs else ()), d["paper"] or "-"))
        before = d["family"]
    out.print(grid(columns, rows))
    more = "" if knobs else "; `isoflop methods --family FAMILY` shows the knobs of a family, `--knobs` all"
    out.print(f"\n`isoflop methods NAME` documents one{more}.")


def _knob_line(knob: dict[str, Any]) -> str:
    return f"{knob['name']}{'*' if knob['ratio'] else ''} = {knob['default']}  [{knob['allowed']}]"


def _flowing(doc: str) -> str:
    """The lines of each paragraph as one, for the terminal to break; lists and what is indented keep their lines."""
    found: list[str] = []
    for line in doc.splitlines():
        before = found[-1] if found else ""
        own = not line or _OWN_LINE.match(line) or not before or before.startswith(" ") or before.endswith("::")
        if own:
            found.append(line)
        else:
            found[-1] = f"{before} {line}"
    return "\n".join(found)


def _sharing(name: str, cls: type[Method]) -> dict[str, list[str]]:
    """Methods that may take a hook with this one, by whether they act before or behind it."""
    others = {n: METHODS.get(n) for n in METHODS.names() if n != name and set(METHODS.get(n).hooks) & set(cls.hooks)}
    return {
        "before": [n for n, other in others.items() if cls().over(other()) is not None],
        "behind": [n for n, other in others.items() if other().over(cls()) is not None],
    }


def _document(name: str, cls: type, as_json: bool) -> None:
    knobs = [_knob_dict(k) for k in knob_specs(cls).values()]
    doc = inspect.getdoc(cls) or ""
    data = {
        "name": name,
        "doc": doc,
        "knobs": knobs,
        **{k: getattr(cls, k) for k in ("family", "paper", "version", "trains_model") if hasattr(cls, k)},
        **({"hooks": names_of(cls.hooks), "shares_with": _sharing(name, cls)} if issubclass(cls, Method) else {}),
    }

    def human() -> None:
        out = console()
        head = " · ".join(str(data[k]) for k in ("family", "paper") if data.get(k))
        out.print(f"[bold]{name}[/bold]  {head}\n")
        out.print(_flowing(doc), markup=False)
        if issubclass(cls, Method) and cls.hooks:
            trained = "; takes part in training models that are trained here" if cls.trains_model else ""
            out.print(
                f"\nActs at {', '.join(names_of(cls.hooks))}{trained}. Goes together with methods that act elsewhere."
            )
            for place, others in data["shares_with"].items():
                if others:
                    out.print(f"{place.capitalize()} it, at the same place: {', '.join(others)}.")
            if cls.ratio_of:
                out.print(f"Its ratio: uncompressed over compressed, {cls.ratio_of}; * is the knob that sets it.")
        if knobs:
            rows = [
                (k["name"] + ("*" if k["ratio"] else ""), k["type"], k["default"], k["allowed"], k["doc"])
                for k in knobs
            ]
            out.print()
            out.print(grid(("knob", "type", "default", "allowed", "meaning"), rows))

    emit(data, as_json, human)


@click.command("models")
@click.argument("name", required=False)
@import_option
@json_option
def models_command(name: str | None, modules: tuple[str, ...], as_json: bool) -> None:
    """List models, or document one; any LLaVA-style checkpoint can be named as hf:REPO or hf:PATH besides."""
    _import(modules)
    if name is not None:
        _document_model(name, as_json)
        return
    families = [FAMILIES.get(n) for n in FAMILIES]
    data = [_model_dict(family.info(ref, {})) for family in families for ref in family.members()]

    def human() -> None:
        rows = [(d["ref"], d["N"], ", ".join([*d["hooks"], *d["offers"]])) for d in data]
        console().print(grid(("model", "N", "hooks, and what it offers besides"), rows, right=("N",)))
        console().print("\nN: non-embedding parameters of the language model. hf:REPO and hf:PATH name checkpoints.")
        console().print("`isoflop models NAME` documents one.")

    emit(data, as_json, human)


def _model_dict(info: ModelInfo) -> dict[str, Any]:
    return {
        "ref": info.ref,
        "N": info.n_params,
        "hooks": names_of(info.hooks),
        "offers": sorted(info.offers),
        "geometry": dict(info.geometry),
    }


def _document_model(ref: str, as_json: bool) -> None:
    """One model, or a family by its name with the members that it has."""
    if ref in FAMILIES:
        family: ModelFamily = FAMILIES.get(ref)
        info: ModelInfo | None = None
    else:
        family = family_of(ref)
        info = family.info(ref, {})
    doc = inspect.getdoc(type(family)) or ""
    about = {"family": family.name, "doc": doc, "members": family.members()}
    data = about if info is None else {**_model_dict(info), "version": info.version, **about}

    def human() -> None:
        out = console()
        out.print(f"[bold]{escape(ref)}[/bold]  {family.name}\n")
        out.print(_flowing(doc), markup=False)
        if info is not None:
            size = ", ".join(f"{k} {v}" for k, v in info.geometry.items())
            out.print(f"\nN {info.n_params:,}; {size}", markup=False)
            out.print(f"Methods can act at {', '.join(names_of(info.hooks)) or 'no hook'}.", markup=False)
            out.print(f"It offers besides: {', '.join(sorted(info.offers)) or 'nothing'}.", markup=False)
        if members := family.members():
            out.print(f"\nThe family's members: {', '.join(members)}", markup=False)

    emit(data, as_json, human)


@click.command("tasks")
@click.argument("name", required=False)
@import_option
@json_option
def tasks_command(name: str | None, modules: tuple[str, ...], as_json: bool) -> None:
    """List tasks, or document one."""
    _import(modules)
    if name is not None:
        _document(name, TASKS.get(name), as_json)
        return
    data = []
    for task in TASKS:
        cls = TASKS.get(task)
        first = (inspect.getdoc(cls) or "").split("\n")[0]
        data.append(
            {
                "name": task,
                "version": cls.version,
                "metric": cls.quantity,
                "chance": cls.chance,
                "doc": first,
                "options": [_knob_dict(k) for k in knob_specs(cls).values()],
            }
        )

    def human() -> None:
        rows = [(d["name"], d["metric"], d["chance"], d["doc"]) for d in data]
        console().print(grid(("task", "metric", "chance", "what"), rows, right=("chance",)))
        console().print("\n`isoflop tasks NAME` documents one.")

    emit(data, as_json, human)


@click.command("samplers")
@click.argument("name", required=False)
@import_option
@json_option
def samplers_command(name: str | None, modules: tuple[str, ...], as_json: bool) -> None:
    """List the ways in which a sweep's trials can be proposed, or document one."""
    _import(modules)
    if name is not None:
        _document(name, STRATEGIES.get(name), as_json)
        return
    data: list[dict[str, Any]] = []
    for sampler in STRATEGIES:
        cls = STRATEGIES.get(sampler)
        data.append(
            {
                "name": sampler,
                "eager": cls.eager,
                "dear": cls.dear,
                "pruner": cls.prunable,
                "objectives": cls.most_aims,
                "keys": list(cls.keys),
                "doc": (inspect.getdoc(cls) or "").split("\n")[0],
                "options": [_knob_dict(k) for k in knob_specs(cls).values()],
            }
        )

    def human() -> None:
        rows = [(d["name"], "no" if d["eager"] else "yes", "yes" if d["pruner"] else "no", d["doc"]) for d in data]
        console().print(grid(("sampler", "learns", "pruner", "what"), rows))
        console().print("\n`isoflop samplers NAME` documents one with its options.")

    emit(data, as_json, human)
