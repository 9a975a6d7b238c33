"""Stand-ins for what `make real` fetches, so that its sweeps resolve without it."""

from __future__ import annotations

import json

from isoflop.core.public import public_root
from isoflop.testing.task_probes import reader_of_text


def stand_ins() -> None:
    """A small untrained language model and a document of each kind, in the cache that ISOFLOP_CACHE names."""
    model, _ = reader_of_text()
    folder = public_root() / "smollm2-135m-instruct"
    model.module.config.max_position_embeddings = 2048
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    documents = public_root() / "documents"
    (documents / "text").mkdir(parents=True)
    (documents / "text" / "a.txt").write_text("One sentence is here. Another one is there. " * 40)
    choice = {"passage": "One.", "options": ["Two.", "Three."], "answer": 0}
    lookup = {"functions": "f: does.", "function": "f", "answers": ["does."]}
    for name, row in (("choice", choice), ("lookup", lookup)):
        (documents / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
