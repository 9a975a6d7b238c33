"""The task ``retrieval``: which documents of a corpus answer a query, ranked by a language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import UserError
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.rows import Rows, read
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.contexts import read_contexts, room_for
from isoflop.models.encoder import EncoderModel
from isoflop.models.lm import LmModel
from isoflop.tasks.base import TASKS, Shard, Task
from isoflop.tasks.data.base import Example, bad_row, drawn, shards
from isoflop.tasks.data.costs import MEASURED, Priced, costs_of
from isoflop.tasks.data.language import batches_of, listed
from isoflop.tasks.data.prompts import PromptText, PromptTokenizer, TokenPrompt, shown
from isoflop.tasks.data.rankers import check_ranks, costs_of_encoder, scores_of_encoder
from isoflop.tasks.language_task import lm_model

ASKS = "\n\nA question that the text above answers:"
"""Between a document and the query whose likelihood ranks it."""


@TASKS.register("retrieval")
@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """Documents ranked by the likelihood of the query behind them (query likelihood, Ponte and Croft 1998; arXiv 2204.07496).

    Every document of the corpus is a context, which methods compress and which is read once for all queries; its score is the
    query's mean log-likelihood per token behind it. A text encoder embeds every document and every query once instead, and documents
    are ranked by similarity, as sentence-transformers computes both (arXiv 1908.10084); one whose head gives a pair of texts one
    number (…ForSequenceClassification) ranks by that, for every query with every document. Encoders see texts cut to what they have
    room for. An example is a query, its error 1 − the share of its relevant documents
    among the ``k`` best. Secondary metrics: ``mrr`` (1 over the rank of the first relevant one), ``rank`` of it.
    """

    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[str, ...] | None] = ("mrr", "rank")
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset()

    corpus: Annotated[str, Knob(path=True, doc="rows of documents")]
    queries: Annotated[str, Knob(path=True, doc="rows of queries with the ids of relevant documents")]
    id: Annotated[str, Knob(doc="field of a document's id")] = "id"
    text: Annotated[str, Knob(doc="field of a document's text")] = "text"
    query: Annotated[str, Knob(doc="field of a query's text")] = "query"
    relevant: Annotated[str, Knob(doc="field of a query's relevant ids, one or a list")] = "relevant"
    k: Annotated[int, Knob(low=1, high=10_000, doc="documents that count as found")] = 1
    limit: Annotated[int, Knob(low=0, high=10_000_000, doc="most queries; 0 takes all")] = 0
    seed: Annotated[int, Knob(low=0, high=2**31 - 1, doc="draws the queries where there are more than limit")] = 0
    shard: Annotated[int, Knob(low=1, high=100_000, doc="queries per shard")] = 64

    def content(self) -> str:
        """Corpus and queries."""
        return f"{read(self.corpus).content}+{read(self.queries).content}"

    def check(self, info: ModelInfo) -> None:
        """Fields that exist, and relevant ids that are those of documents."""
        super().check(info)
        check_ranks(info, self.name)
        corpus, queries = read(self.corpus), read(self.queries)
        for rows, options in ((corpus, ("id", "text")), (queries, ("query", "relevant"))):
            for option in options:
                rows.require(getattr(self, option), option, self.name)
        ids = self._ids(corpus)
        if len(set(ids)) < len(ids):
            double = next(name for name, count in Counter(ids).items() if count > 1)
            raise UserError(f"task {self.name}: corpus {self.corpus}: the id {double!r} stands there twice")
        known = set(ids)
        for example in drawn(queries, 0, 0):
            missing = [name for name in listed(example, self.relevant) if name not in known]
            if missing or not listed(example, self.relevant):
                raise bad_row(
                    self, example, f"{self.relevant} names {missing or 'nothing'}, which is no id of {self.corpus}"
                )

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Read the corpus once, then give the queries shard by shard."""
        corpus = read(self.corpus)
        queries = drawn(read(self.queries), self.limit, self.seed)
        place = {name: number for number, name in enumerate(self._ids(corpus))}
        if isinstance(model, EncoderModel):
            scores_QD = scores_of_encoder(model, *self._texts(corpus, queries))
        else:
            lm = lm_model(model, self.name)
            tokens = PromptTokenizer(lm.tokenizer, False, f"task {self.name}: model {lm.info.ref}")
            scores_QD = self._scores(lm, tokens, corpus, queries)
        row = {example.id: number for number, example in enumerate(queries)}
        for examples in shards(self, queries, self.shard, seed):
            found = [
                self._judged(scores_QD[row[one.id]], [place[name] for name in listed(one, self.relevant)])
                for one in examples
            ]
            errors, ranks = (np.array(column) for column in zip(*found, strict=True))
            yield Shard(np.array([one.id for one in examples]), errors, {"mrr": 1.0 / ranks, "rank": ranks})

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Costs of scoring one query behind one document, which is read for it alone; of an encoder see ``costs_of_encoder``."""
        documents = drawn(read(self.corpus), 0, 0)[:MEASURED]
        query = drawn(read(self.queries), self.limit, self.seed)[0]
        if isinstance(model, EncoderModel):
            texts = [shown(document.row, self.text) for document in documents]
            return costs_of_encoder(model, texts, shown(query.row, self.query))
        lm = lm_model(model, self.name)
        tokens = PromptTokenizer(lm.tokenizer, False, f"task {self.name}: model {lm.info.ref}")
        examples = []
        for document in documents:
            prompt, tail = self._read(document, query, tokens)

            def run(_: Any, prompt: TokenPrompt = prompt, tail: tuple[int, ...] = tail) -> Any:
                with read_contexts(lm, [prompt.context]) as contexts:
                    return contexts.score([tail], [len(tail) - len(prompt.behind)])

            length = len(prompt.context) + len(tail)
            examples.append(Priced(lambda: None, run, length, len(prompt.context), length))
        return costs_of(lm, examples)

    def _texts(self, corpus: Rows, queries: Sequence[Example]) -> tuple[list[str], list[str]]:
        """Of all documents and of the queries."""
        return [shown(row, self.text) for row in corpus.rows], [shown(query.row, self.query) for query in queries]

    def _scores(self, lm: LmModel, tokens: PromptTokenizer, corpus: Rows, queries: Sequence[Example]) -> np.ndarray:
        """Mean log-likelihood per token of every query behind every document, (Q, D)."""
        documents = [Example(int(n), row) for n, row in zip(corpus.ids_N, corpus.rows, strict=True)]
        pairs = [[self._read(document, query, tokens) for query in queries] for document in documents]
        lengths = [max(len(p.context) + len(tail) for p, tail in row) for row in pairs]
        room_for(lm, max(lengths), f"task {self.name}: a document with a query")
        scores_QD = np.zeros((len(queries), len(documents)))
        contexts = [len(row[0][0].context) for row in pairs]
        for batch in batches_of(lm, [None] * len(documents), lengths, contexts):
            with read_contexts(lm, [pairs[number][0][0].context for number in batch], known=True) as documents_read:
                for place in range(len(queries)):
                    rows = [pairs[number][place] for number in batch]
                    counts = [len(tail) - len(prompt.behind) for prompt, tail in rows]
                    found = documents_read.score([tail for _, tail in rows], counts)
                    scores_QD[place, batch] = -found.nll_B / found.scored_B
        return scores_QD

    def _read(self, document: Example, query: Example, tokens: PromptTokenizer) -> tuple[TokenPrompt, tuple[int, ...]]:
        """A document as a prompt, and the query behind it."""
        text = PromptText("", shown(document.row, self.text), ASKS)
        prompt = tokens.prompt(text)
        return prompt, (*prompt.behind, *tokens.answer(text, f" {shown(query.row, self.query)}"))

    def _judged(self, scores_D: np.ndarray, relevant: Sequence[int]) -> tuple[float, float]:
        """Error, and the rank of the first relevant document; of equal scores the relevant one counts as the worse."""
        ranks = []
        for place in relevant:
            above = scores_D >= scores_D[place]
            above[list(relevant)] = scores_D[list(relevant)] > scores_D[place]
            ranks.append(1 + int(above.sum()))
        return 1.0 - sum(rank <= self.k for rank in ranks) / len(ranks), float(min(ranks))

    def _ids(self, corpus: Rows) -> list[str]:
        return [shown(row, self.id) for row in corpus.rows]
