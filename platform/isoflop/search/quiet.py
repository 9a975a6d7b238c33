"""Optuna's warnings, which are for whoever calls Optuna, and not for the screens of people who run a sweep."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hushed() -> Iterator[None]:
    """Around our calls of Optuna, also as a decorator. What a user should know of options is said at plan time, in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
