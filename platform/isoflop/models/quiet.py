"""Keeps transformers' progress bars and advice off the screen while checkpoints are described, written and read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch the bars off inside the block; outside, the user's own setting holds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def no_advice() -> Iterator[None]:
    """Keep transformers from advising on configs inside the block: what stops a sweep is told in lines of our own."""
    from transformers.utils import logging

    heard = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(heard)
