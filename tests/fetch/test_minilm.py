"""The real encoder, where `isoflop fetch all-minilm-l6-v2` has been run: embeddings are those of transformers, and find documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from isoflop.core.public import public_root
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.tasks.data.retrieval import Retrieval
from isoflop.testing.architectures.encoders import loaded

HERE = public_root() / "all-minilm-l6-v2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HERE.is_dir(), reason="not fetched: isoflop fetch all-minilm-l6-v2"),
]
PAIRS = [
    ("Compute the inverse of a matrix.", "Given a square array, return the array that gives the identity when multiplied by it."),
    ("Sort the values along an axis.", "The elements are brought into ascending order, by quicksort unless another algorithm is asked for."),
    ("Read a comma-separated file.", "Each line of the text becomes a row of the table, and each field between two commas a column."),
    ("Draw samples from a normal distribution.", "Random numbers with a bell-shaped density of the given mean and deviation."),
    ("Measure the time that a call takes.", "The clock is read before the function runs and again when it has returned."),
]  # fmt: skip


def test_embeddings_are_those_of_transformers() -> None:
    from transformers import AutoModel, AutoTokenizer

    model = loaded(f"hf:{HERE}")
    assert model.info.n_params == 10_646_784
    assert model.info.tokens_at_most == 256
    tokenizer, stock = AutoTokenizer.from_pretrained(HERE), AutoModel.from_pretrained(HERE).eval()
    texts = [*(text for pair in PAIRS for text in pair), "long " * 400]
    with torch.no_grad():
        for text, ours in zip(texts, model.embed_all(texts, query=True), strict=True):
            tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            mean = stock(**tokens).last_hidden_state[0].mean(0)
            torch.testing.assert_close(ours, mean / mean.norm(), atol=1e-5, rtol=1e-5)


def test_it_finds_what_is_asked_for_and_two_bits_ruin_it(tmp_path: Path) -> None:
    corpus = [{"id": str(n), "text": text} for n, (_, text) in enumerate(PAIRS)]
    queries = [{"query": query, "relevant": str(n)} for n, (query, _) in enumerate(PAIRS)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Retrieval(corpus=str(tmp_path / "corpus.jsonl"), queries=str(tmp_path / "queries.jsonl"))
    ref = f"hf:{HERE}"
    task.check(family_of(ref).info(ref, {}))
    model = loaded(ref)
    errors = {}
    for bits in (16, 8, 2):
        with build("rtn", {"bits": bits, "group": 64}).apply(model, None):
            errors[bits] = sum(float(shard.errors.sum()) for shard in task.evaluate(model, None, 0))  # type: ignore[arg-type]
    assert errors[16] == errors[8] == 0 < errors[2]
