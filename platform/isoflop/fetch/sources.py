"""All that can be fetched."""

from __future__ import annotations

from isoflop.fetch import documents, human_eval, smollm2
from isoflop.fetch.base import Source

SOURCES: dict[str, Source] = {source.name: source for source in (smollm2.SOURCE, documents.SOURCE, human_eval.SOURCE)}
