"""What a method's page says of knobs is true of its knobs."""

from __future__ import annotations

import re

import pytest

from isoflop.core.knobs import knob_specs
from isoflop.methods.base import METHODS

SETTING = re.compile(r"``(\w+): ?([^`]*)``")


@pytest.mark.parametrize("name", METHODS.own())
def test_settings_in_a_docstring_are_knobs_with_values_they_may_have(name: str) -> None:
    cls = METHODS.get(name)
    knobs = knob_specs(cls)
    for knob, value in SETTING.findall(" ".join((cls.__doc__ or "").split())):
        assert knob in knobs, f"{name} has no knob {knob!r}; it has {', '.join(knobs)}"
        choices = knobs[knob].knob.choices
        assert not choices or value.rstrip(" …") in {str(choice) for choice in choices}, (
            f"{name}: {knob} is never {value!r}"
        )
