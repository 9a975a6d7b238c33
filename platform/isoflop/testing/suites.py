"""What all suites share: checks with an id each, a report of everything that is broken, known exceptions with reasons.

A suite is a list of :class:`Case`. ``run_all`` runs every one of them and raises one error that names all that failed;
under pytest the same list is a parametrisation, so that each check is a test of its own::

    @pytest.mark.parametrize("check", [pytest.param(run, id=name) for name, run in method_checks("my-method")])
    def test_contract(check):
        check()
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from isoflop.core.errors import unknown

T = TypeVar("T")


class Case(NamedTuple):
    """One check of one thing: its id, and a call that raises where the promise is broken."""

    id: str
    run: Callable[[], None]


class BrokenPromises(AssertionError):
    """What a suite found, a line per check; their tracebacks are for whoever asks, not for the screen.

    Attributes:
        errors: by the name of the check.
    """

    def __init__(self, text: str, errors: Mapping[str, Exception]) -> None:
        super().__init__(text)
        self.errors = dict(errors)


class Shared(Generic[T]):
    """What several checks run on, made when the first of them asks, and anew after one that failed.

    A check that fails may leave a model changed; the next one would then report what is none of its business.

    Args:
        make: makes it; a value that was made already is given by ``Shared.of``.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._value: T | None = None

    @classmethod
    def of(cls, value: T) -> Shared[T]:
        """Of a value that nobody can make anew."""
        return cls(lambda: value)

    def get(self) -> T:
        """The value."""
        if self._value is None:
            self._value = self._make()
        return self._value

    def renew(self) -> None:
        """Let the next check have a fresh one."""
        self._value = None


def cases_of(
    checks: Iterable[Callable[..., None]],
    arguments: Callable[[], tuple[Any, ...]],
    expected_failures: Mapping[str, str] | None = None,
    failed: Callable[[], None] = lambda: None,
) -> list[Case]:
    """The checks as cases.

    Args:
        arguments: what every check is called with, asked for when the case runs.
        expected_failures: reasons by the id of checks that are known to fail; one that passes all the same is an error.
        failed: called after a check that failed.

    Raises:
        UserError: an expected failure names no check of the suite.
    """
    found = list(checks)
    expected = dict(expected_failures or {})
    names = [check.__name__ for check in found]
    for name in expected:
        if name not in names:
            raise unknown("check", name, names)
    return [Case(check.__name__, _case(check, arguments, expected.get(check.__name__), failed)) for check in found]


def run_all(what: str, cases: Iterable[Case]) -> None:
    """Run every case.

    Args:
        what: whose suite it is, e.g. "method quecc".

    Raises:
        BrokenPromises: names each case that failed, in a line each.
    """
    broken: list[tuple[str, Exception]] = []
    for name, run in cases:
        try:
            run()
        except Exception as error:
            broken.append((name, error))
    if broken:
        lines = [f"{what}: {name}: {finding(error)}" for name, error in broken]
        raise BrokenPromises("\n".join(lines), dict(broken)) from None


def finding(error: Exception) -> str:
    """What a check that failed found: its message, or an unexpected error with its place."""
    if isinstance(error, AssertionError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"


def _case(
    check: Callable[..., None],
    arguments: Callable[[], tuple[Any, ...]],
    reason: str | None,
    failed: Callable[[], None],
) -> Callable[[], None]:
    def run() -> None:
        try:
            check(*arguments())
        except Exception:
            failed()
            if reason is None:
                raise
            return
        assert reason is None, f"expected to fail ({reason}), but it passes: take it off the expected failures"

    run.__name__ = check.__name__
    run.__doc__ = check.__doc__
    return run
