"""A walk over every causal language model that the installed transformers knows; see ``walk`` and ``page``."""

from isoflop.testing.architectures.llava import LLAVA_CHECKS, LlavaSubject, examine_llava
from isoflop.testing.architectures.page import Row, page, rows
from isoflop.testing.architectures.small import (
    Architecture,
    NotSmall,
    architectures,
    full_attention,
    small_config,
    some_windows,
)
from isoflop.testing.architectures.walk import CHECKS, Check, Finding, Findings, Subject, Wrong, examine, same

__all__ = [
    "CHECKS",
    "LLAVA_CHECKS",
    "Architecture",
    "Check",
    "Finding",
    "Findings",
    "LlavaSubject",
    "NotSmall",
    "Row",
    "Subject",
    "Wrong",
    "architectures",
    "examine",
    "examine_llava",
    "full_attention",
    "page",
    "rows",
    "same",
    "small_config",
    "some_windows",
]
