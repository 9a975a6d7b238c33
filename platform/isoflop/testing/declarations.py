"""What is asked of the declaration of everything whose annotated fields are knobs."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from typing import Any

from isoflop.core.errors import UserError
from isoflop.core.hook import Hook
from isoflop.core.knobs import check_knobs, knob_specs
from isoflop.testing.configurations import wrong_values
from isoflop.testing.refusals import refused


def declared(cls: type[Any]) -> None:
    """Raise AssertionError unless ``cls`` is a frozen dataclass with name, version and docstring, whose fields are all knobs.

    Knobs have a default within their range, and documentation; nothing is left abstract.
    """
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else None
    assert fields is not None, "the class is no dataclass"
    assert getattr(cls, "__dataclass_params__").frozen, "the dataclass is not frozen"  # noqa: B009
    assert cls.name, "it has no name: register it"
    assert cls.version, "it has no version"
    assert (cls.__doc__ or "").strip(), "it has no docstring"
    unwritten = [n for n in dir(cls) if getattr(getattr(cls, n, None), "__isabstractmethod__", False)]
    assert not unwritten, f"its family leaves {', '.join(unwritten)} to it, which it does not define"
    bare = [
        n
        for n, value in vars(cls).items()
        if isinstance(value, (bool, int, float, str))
        and not n.startswith("_")
        and n not in inspect.get_annotations(cls)
        and not any(hasattr(base, n) for base in cls.__mro__[1:])
    ]
    assert not bare, f"{', '.join(bare)} has no annotation, so that it is no knob"
    specs = knob_specs(cls)
    strangers = {f.name for f in fields} - set(specs)
    assert not strangers, f"fields without a Knob annotation: {', '.join(sorted(strangers))}"
    for spec in specs.values():
        assert spec.knob.doc, f"knob {spec.name} has no documentation"
        assert spec.knob.path or not spec.required, f"knob {spec.name} has no default"
        if not spec.required:
            spec.check(spec.default)


def declares_hooks(cls: type[Any], *attributes: str) -> None:
    """Raise AssertionError unless these class attributes hold hooks, and ``needs`` holds words."""
    for attribute in attributes:
        odd = [value for value in getattr(cls, attribute) if not isinstance(value, Hook)]
        assert not odd, f"{attribute} holds {odd[0]!r}, which is no Hook"
    words = [value for value in cls.needs if not isinstance(value, str) or not value]
    assert not words, f"needs holds {words[0]!r}, which is no word that a model offers"


def refuses_wrong_knobs(cls: type[Any], what: str) -> None:
    """Raise AssertionError unless wrong types, values out of range and unknown knobs are refused in a line that names the knob.

    Args:
        what: "method" or "task".
    """

    def build(values: dict[str, Any]) -> Any:
        return cls(**check_knobs(cls, values, f"{what} {cls.name}"))

    for spec in knob_specs(cls).values():
        for wrong in wrong_values(spec):
            refused(partial(build, {spec.name: wrong}), UserError, spec.name, f"{spec.name} = {wrong!r}")
    refused(partial(build, {"no-such-knob": 1}), UserError, "no-such-knob", "an unknown knob")
