"""A walk over every causal language model that the installed transformers knows, and over classes of vision-language models; see
``walk``, ``vision_language`` and ``page``."""

from isoflop.testing.architectures.llava import LLAVA_CHECKS, LlavaSubject, examine_llava
from isoflop.testing.architectures.page import Row, class_line, page, rows, vision_language_rows
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
    "class_line",
    "examine",
    "examine_llava",
    "full_attention",
    "page",
    "rows",
    "same",
    "small_config",
    "some_windows",
    "vision_language_rows",
]
