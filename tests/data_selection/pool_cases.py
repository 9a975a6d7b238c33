"""Made-up documents, and options of a tiny model that trains in a second."""

from __future__ import annotations

from typing import Any

from isoflop.methods.data_selection.probe import documents_of
from isoflop.models.worlds.text_domains import DOMAINS
from isoflop.models.worlds.text_pool import Document

REF = "tiny-lm/mixed-d64"
OPTIONS: dict[str, Any] = {
    "steps": 2, "first_steps": 2, "batch": 2, "context": 32, "vocabulary": 300, "pool": 40, "examples": 20,
}  # fmt: skip


def pool(pieces: int = 12, length: int = 300) -> list[Document]:
    """Documents of all domains."""
    return [document for domain in DOMAINS for document in documents_of(domain, pieces, length, 0)]


def target(pieces: int = 6, length: int = 300) -> list[Document]:
    """Examples of code."""
    return documents_of("code", pieces, length, 1)
