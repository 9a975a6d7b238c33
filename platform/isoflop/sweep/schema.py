"""The JSON Schema of sweep files, for editors: generated from the spec and from every registered method, task and sampler.

``python -m isoflop.sweep.schema`` prints it; ``make schema`` writes it to ``sweeps/sweep.schema.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from isoflop.core.knobs import KnobSpec, knob_specs, shown
from isoflop.methods.base import METHODS
from isoflop.models.family import FAMILIES
from isoflop.search import STRATEGIES
from isoflop.sweep.spec import SweepSpec
from isoflop.tasks.base import TASKS

_TIME = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*[0-9]*\.?[0-9]+\s*(s|m|h|d)\s*$"},
    ]
}
_SIZE = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": r"^\s*[0-9]*\.?[0-9]+\s*[kKMGT]?i?B?\s*$"},
    ]
}
_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def sweep_schema() -> dict[str, Any]:
    """The schema as a dict (JSON Schema, draft 2020-12)."""
    schema = SweepSpec.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    for unused in ("MethodEntry", "ModelEntry", "TaskEntry", "KnobEntry"):
        definitions.pop(unused, None)
    definitions["Limits"]["properties"]["timeout"] = {**_TIME, **_keep(definitions["Limits"], "timeout")}
    definitions["Limits"]["properties"]["stage_timeout"] = {**_TIME, **_keep(definitions["Limits"], "stage_timeout")}
    memory = definitions["ResourcesBlock"]["properties"]["memory"]
    definitions["ResourcesBlock"]["properties"]["memory"] = {**_SIZE, "description": memory.get("description", "")}
    sampler = definitions["SearchBlock"]["properties"]["sampler"]
    definitions["SearchBlock"]["properties"]["sampler"] = {
        "enum": STRATEGIES.names(),
        **_keep(definitions["SearchBlock"], "sampler"),
        "description": f"{sampler['description']} {_samplers()}",
    }
    method = _named({name: _method(knob_specs(METHODS.get(name)), METHODS.get(name)) for name in METHODS}, "method")
    definitions["Method"] = method
    method = {"$ref": "#/$defs/Method"}
    properties = schema["properties"]
    properties["models"] = {
        "type": "array",
        "minItems": 1,
        "description": "Model references: a member of a built-in family, or hf:REPO or hf:PATH; with options as {ref: {option: value}}.",
        "items": {
            "anyOf": [{"enum": _members()}, {"type": "string", "minLength": 1}, {"type": "object", "minProperties": 1}]
        },
    }
    properties["methods"] = {
        "type": "array",
        "minItems": 1,
        "description": "Methods, each with its knobs as a value, a list, or a range {low, high, log, step}; a list of methods composes them.",
        "items": {"anyOf": [method, {"type": "array", "minItems": 1, "items": method}]},
    }
    properties["tasks"] = {
        "type": "array",
        "minItems": 1,
        "description": "Tasks, with options as {task: {option: value}}.",
        "items": _named({name: _options(knob_specs(TASKS.get(name)), TASKS.get(name)) for name in TASKS}, "task"),
    }
    text = {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/CalibrationBlock"}]}
    properties["calibration"] = {
        "anyOf": [*text["anyOf"], {"type": "array", "minItems": 1, "items": text}, {"type": "null"}],
        "description": properties["calibration"].get("description", ""),
    }
    one_or_many = {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}}
    properties["zip"] = {
        "anyOf": [one_or_many, {"type": "array", "items": one_or_many}],
        "description": properties["zip"].get("description", ""),
    }
    properties["exclude"] = {
        "anyOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}}],
        "description": properties["exclude"].get("description", ""),
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "isoflop sweep"}


def schema_text() -> str:
    """The schema as it is committed."""
    return json.dumps(sweep_schema(), indent=1, sort_keys=True) + "\n"


def _keep(definition: Mapping[str, Any], name: str) -> dict[str, Any]:
    old = definition["properties"][name]
    return {k: old[k] for k in ("description", "default") if k in old}


def _samplers() -> str:
    """What each sampler does, and the options it takes."""
    parts = []
    for name in STRATEGIES:
        kind = STRATEGIES.get(name)
        options = ", ".join(knob_specs(kind))
        parts.append(f"{name}: {_first_line(kind)}" + (f" Options: {options}." if options else ""))
    return " ".join(parts)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _members() -> list[str]:
    return [ref for family in FAMILIES for ref in FAMILIES.get(family).members()]


def _named(bodies: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A bare name, one name with its body, or the name of something that a package or an ``import`` adds."""
    known = {"type": "object", "properties": dict(bodies), "minProperties": 1, "maxProperties": 1}
    return {
        "anyOf": [
            {"enum": sorted(bodies)},
            {"type": "string", "minLength": 1, "description": f"a {what} that an import registers"},
            known,
        ]
    }


def _method(knobs: Mapping[str, KnobSpec], cls: type) -> dict[str, Any]:
    body = _options({}, cls)
    body["properties"] = {name: {"anyOf": _knob_forms(spec), "description": _doc(spec)} for name, spec in knobs.items()}
    return body


def _options(knobs: Mapping[str, KnobSpec], cls: type) -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "description": _first_line(cls),
        "properties": {name: {**_value(spec), "description": _doc(spec)} for name, spec in knobs.items()},
    }


def _knob_forms(spec: KnobSpec) -> list[dict[str, Any]]:
    value = _value(spec)
    several = {"type": "array", "items": value, "minItems": 1}
    block: dict[str, Any] = {"value": value, "values": several}
    if not spec.many:
        bound: dict[str, Any] = {"type": "number"}
        step = {"type": "number", "exclusiveMinimum": 0}
        block |= {"low": bound, "high": bound, "log": {"type": "boolean"}, "step": step}
    block["when"] = {"type": "object"}
    return [
        value,
        {**several, "uniqueItems": True},
        {"type": "object", "properties": block, "additionalProperties": False},
        {"type": "null"},
    ]


def _value(spec: KnobSpec) -> dict[str, Any]:
    if spec.knob.choices is not None:
        return {"enum": [list(c) if isinstance(c, tuple) else c for c in spec.knob.choices]}
    return {"type": "array", "items": _item(spec)} if spec.many else _item(spec)


def _item(spec: KnobSpec) -> dict[str, Any]:
    """A number, text or truth value; of a list, one of its items. A step is left to the plan: JSON Schema's counts from 0."""
    out: dict[str, Any] = {"type": _JSON_TYPES.get(spec.type, "string")}
    if spec.knob.low is not None:
        out["minimum"] = spec.knob.low
    if spec.knob.high is not None:
        out["maximum"] = spec.knob.high
    return out


def _doc(spec: KnobSpec) -> str:
    default = "" if spec.required else f" Default {shown(spec.default)}."
    return f"{spec.knob.doc} Allowed: {spec.describe()}.{default}".strip()


if __name__ == "__main__":
    print(schema_text(), end="")
