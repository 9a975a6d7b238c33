"""How a refusal must look: the right kind of error, one line, which names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def refused(call: Callable[[], Any], kind: type[Exception], word: str, what: str) -> None:
    """Raise AssertionError unless ``call`` is refused by an error of ``kind`` whose one line holds ``word``.

    Args:
        what: is tried, for the message.
    """
    message: str | None = None
    try:
        call()
    except kind as error:
        message = str(error)
    assert message is not None, f"{what} is accepted"
    assert word in message, f"the refusal of {what} does not name {word}: {message}"
    assert "\n" not in message, f"the refusal of {what} is longer than one line"
