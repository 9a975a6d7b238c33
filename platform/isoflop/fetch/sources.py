"""All that can be fetched."""

from __future__ import annotations

from isoflop.fetch import documents, easy_vqa, facts, human_eval, minilm, smollm2
from isoflop.fetch.base import Source

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (smollm2.SOURCE, minilm.SOURCE, documents.SOURCE, easy_vqa.SOURCE, facts.SOURCE, human_eval.SOURCE)
}
