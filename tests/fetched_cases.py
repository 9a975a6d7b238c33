"""Stand-ins for what `make real` fetches, so that its sweeps resolve without it."""

from __future__ import annotations

import json

from isoflop.core.public import public_root
from isoflop.testing.architectures.encoders import save_encoder, small_encoder
from isoflop.testing.task_probes import reader_of_text

LAYERS = 8
"""Methods that tell layers apart refuse fewer."""


def stand_ins() -> None:
    """A small untrained language model, an encoder and a document of each kind, in the cache that ISOFLOP_CACHE names."""
    model, _ = reader_of_text()
    folder = public_root() / "smollm2-135m-instruct"
    told = {**model.module.config.to_dict(), "max_position_embeddings": 2048, "num_hidden_layers": LAYERS}
    told.pop("layer_types", None)
    type(model.module)(type(model.module.config)(**told)).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    save_encoder(small_encoder("BertModel", hidden_size=64), public_root() / "all-minilm-l6-v2")
    documents = public_root() / "documents"
    (documents / "text").mkdir(parents=True)
    (documents / "text" / "a.txt").write_text("One sentence is here. Another one is there. " * 40)
    choice = {"passage": "One.", "options": ["Two.", "Three."], "answer": 0}
    lookup = {"functions": "f: does.", "function": "f", "answers": ["does."]}
    text, query = {"id": "d0", "text": "What it does."}, {"query": "It does.", "relevant": "d0"}
    for name, row in (("choice", choice), ("lookup", lookup), ("corpus", text), ("queries", query)):
        (documents / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
