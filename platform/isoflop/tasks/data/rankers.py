"""Documents ranked by a text encoder: by the similarity of embeddings, or pair by pair.

Shape suffixes: Q queries, D documents, d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from isoflop.core.errors import Infeasible
from isoflop.models.base import ModelInfo
from isoflop.models.counting import flops_of
from isoflop.models.encoder import EMBEDS, RANKS, EncoderInfo, EncoderModel
from isoflop.tasks.footprint import peak_bytes_of, seconds_of
from isoflop.tasks.language_task import lm_info


def check_ranks(info: ModelInfo, task: str) -> None:
    """Raise Infeasible unless a model is a language model, or an encoder that embeds texts or ranks pairs of them."""
    if not isinstance(info, EncoderInfo):
        lm_info(info, task)
    elif not info.offers & {EMBEDS, RANKS}:
        raise Infeasible(
            f"task {task} needs embeddings, or one number for a query with a document, and model {info.ref} has a head for options "
            f"({info.head}); allowed: encoders without a head, …ForMaskedLM, …ForSequenceClassification with one label, language models"
        )


def scores_of_encoder(model: EncoderModel, documents: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """How well every document answers every query, (Q, D); more is better."""
    if EMBEDS in model.info.offers:
        queries_Qd, documents_Dd = model.embed_all(queries, query=True), model.embed_all(documents, query=False)
        scores_QD: np.ndarray = model.info.sentence.similarities(queries_Qd, documents_Dd).double().cpu().numpy()
        return scores_QD
    found_QD = np.zeros((len(queries), len(documents)))
    for place, query in enumerate(queries):
        rows = [model.tokens(query, document) for document in documents]
        for numbers in model.batches([len(row["input_ids"]) for row in rows]):
            found_QD[place, numbers] = model.rank(model.batch([rows[n] for n in numbers])).double().cpu().numpy()
    return found_QD


def costs_of_encoder(model: EncoderModel, documents: Sequence[str], query: str) -> dict[str, float]:
    """Footprint of one query with one document, batch of one, means over some documents.

    Where texts are embedded, ``flops_query`` and ``flops_document`` are their shares, of which a server pays the latter once for
    all queries, and ``embedding_bytes`` are those of a document's embedding. Seconds and peak are of the first document.
    """
    embeds = EMBEDS in model.info.offers
    given = model.info.sentence.given

    def embedding(text: str, is_query: bool) -> tuple[int, Callable[[], Any]]:
        batch = model.batch([model.tokens(given(text, is_query))])
        return batch.tokens, lambda: model.embed(batch)

    def pair(document: str) -> tuple[int, Callable[[], Any]]:
        batch = model.batch([model.tokens(query, document)])
        return batch.tokens, lambda: model.rank(batch)

    runs = [embedding(text, False) if embeds else pair(text) for text in documents]
    flops = float(np.mean([flops_of(run)[0] for _, run in runs]))
    tokens = float(np.mean([count for count, _ in runs]))
    own: dict[str, float] = {}
    asked = embedding(query, True) if embeds else None
    if asked is not None:
        asking, embedded = flops_of(asked[1])
        own = {
            "flops_query": float(asking),
            "flops_document": flops,
            "embedding_bytes": embedded.shape[1] * model.info.dense_bits / 8,
        }
        tokens += asked[0]

    def answer() -> None:
        runs[0][1]()
        if asked is not None:
            asked[1]()

    whole = flops + own.get("flops_query", 0.0)
    return {**cost_of_run(model, answer), **own, "text_tokens": tokens, "flops": whole, "flops_llm": whole}


def cost_of_run(model: EncoderModel, run: Callable[[], Any]) -> dict[str, float]:
    """Bytes, seconds and peak of a call on an encoder; there is no cache."""
    weights, dense = model.served_bytes(), model.dense_weight_bytes()
    return {
        "visual_tokens": 0.0,
        "weight_bytes": weights,
        "weight_bytes_dense": dense,
        "bytes": weights,
        "bytes_dense": dense,
        "seconds": seconds_of(run, model.devices),
        "peak_bytes": float(model.resident_bytes() + peak_bytes_of(run, model.devices)),
    }
