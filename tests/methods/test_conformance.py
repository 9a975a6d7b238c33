"""The conformance suite on every registered method, and on methods that break a promise."""

from __future__ import annotations

import pytest
from isoflop.methods.base import METHODS
from isoflop.testing import check_method


@pytest.mark.parametrize("name", METHODS.names())
def test_registered_method_keeps_the_contract(name: str) -> None:
    check_method(name)
