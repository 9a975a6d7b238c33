"""Retrieval by query likelihood, against brute force."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from isoflop.core.errors import UserError
from isoflop.methods.base import build
from isoflop.tasks.data.retrieval import ASKS, Retrieval
from isoflop.testing.task_probes import own, reader_of_text

LM, CTX = reader_of_text()


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in Path(own("questions.jsonl")).read_text().splitlines()[:7]]
    documents = [{"id": f"d{n}", "text": row["passage"]} for n, row in enumerate(rows)]
    queries = [
        {"query": row["question"], "relevant": [f"d{n}", "d0"] if n == 2 else f"d{n}"} for n, row in enumerate(rows[:4])
    ]
    for name, table in (("corpus", documents), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return {"corpus": str(tmp_path / "corpus.jsonl"), "queries": str(tmp_path / "queries.jsonl")}


def likelihood(document: str, query: str) -> float:
    """Mean log-likelihood per token of a query behind a document, in one plain pass."""
    before = LM.tokenizer(document + ASKS, add_special_tokens=False)["input_ids"]
    ids = LM.tokenizer(f"{document}{ASKS} {query}", add_special_tokens=False)["input_ids"]
    logits_TW = LM.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(np.mean([float(logits_TW[p - 1, ids[p]]) for p in range(len(before), len(ids))]))


@pytest.mark.parametrize("k", [1, 3])
def test_documents_are_ranked_by_the_likelihood_of_the_query(data: dict[str, str], k: int) -> None:
    task = Retrieval(**data, k=k, shard=3)
    found = {}
    for shard in task.evaluate(LM, CTX, 0):
        for n, number in enumerate(shard.ids.tolist()):
            found[number] = shard.errors[n], shard.metrics["mrr"][n]
    documents = [json.loads(line) for line in Path(data["corpus"]).read_text().splitlines()]
    from isoflop.core.rows import read

    queries = read(data["queries"])
    for number, row in zip(queries.ids_N.tolist(), queries.rows, strict=True):
        scores = {d["id"]: likelihood(d["text"], row["query"]) for d in documents}
        order = sorted(scores, key=scores.__getitem__, reverse=True)
        relevant = [row["relevant"]] if isinstance(row["relevant"], str) else row["relevant"]
        ranks = sorted(order.index(name) + 1 for name in relevant)
        assert found[number][1] == pytest.approx(1 / ranks[0])
        # the second of two relevant ones is not pushed down by the first
        wanted = [rank - sum(other < rank for other in ranks) for rank in ranks]
        assert found[number][0] == pytest.approx(1 - sum(rank <= k for rank in wanted) / len(ranks))


def test_a_method_on_the_cache_changes_scores_and_costs(data: dict[str, str]) -> None:
    task = Retrieval(**data)
    full = task.measure(LM, CTX)
    with build("streaming-llm", {"keep": 0.2}).apply(LM, None):
        assert task.measure(LM, CTX)["kv_bytes"] < 0.7 * full["kv_bytes"]
        assert len(list(task.evaluate(LM, CTX, 0))) == 1


def test_equal_scores_count_against_the_relevant_document(data: dict[str, str]) -> None:
    assert Retrieval(**data)._judged(np.zeros(5), [2]) == (1.0, 5.0)
    assert Retrieval(**data, k=5)._judged(np.zeros(5), [2]) == (0.0, 5.0)


def test_wrong_data_are_refused(data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'body'.*allowed: id, text"):
        Retrieval(**data, text="body").check(LM.info)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"query": "x", "relevant": ["d0", "d99"]}))
    with pytest.raises(UserError, match=r"relevant names \['d99'\], which is no id of"):
        Retrieval(corpus=data["corpus"], queries=str(bad)).check(LM.info)
    twice = tmp_path / "twice.jsonl"
    twice.write_text((json.dumps({"id": "a", "text": "x"}) + "\n") + json.dumps({"id": "a", "text": "y"}))
    with pytest.raises(UserError, match="'a' stands there twice"):
        Retrieval(corpus=str(twice), queries=data["queries"]).check(LM.info)
