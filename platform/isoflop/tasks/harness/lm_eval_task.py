"""The task ``lm-eval``: tasks of EleutherAI's lm-evaluation-harness, on models of this platform."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import StringIO
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import Infeasible, UserError, unknown
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.features import batches
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.lm import LmModel
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.data.costs import MEASURED, Priced, costs_of
from isoflop.tasks.data.prompts import PromptTokenizer
from isoflop.tasks.harness.common import (
    Documents,
    HarnessTask,
    check_folder,
    config_text,
    is_group,
    loaded_beside,
    not_loaded,
    numbers_of,
    shots_text,
    unknown_task,
)
from isoflop.tasks.language_task import lm_info, lm_model

CORPUS = frozenset({"bleu", "chrf", "ter", "f1", "mcc", "matthews_correlation", "brier_score", "perplexity"})
"""Metrics that are of all documents together and of none alone, beside those whose documents give no number."""
IN_HUNDREDTHS = frozenset({"bleu", "chrf"})


@TASKS.register("lm-eval")
@dataclass(frozen=True, kw_only=True)
class LmEval(HarnessTask):
    """A task of lm-evaluation-harness (``pip install 'isoflop[lm-eval]'``), its own or one's own YAML under ``include_path``.

    The harness makes the prompts and judges the answers; the model answers here. A prompt is the context that methods on
    the cache compress, but for its last token, or, where ``question`` names a text, but for what begins at its last place;
    continuations are scored, and answers go on, behind the compressed context. Several continuations of one prompt pay
    for it once.

    An example is a document, its error 1 − its value of ``metric`` where more is better, else the value; the first metric of
    the harness' task unless one is named. Of perplexities it is bits per byte, or per word, of the document. A metric that is of
    all documents together (BLEU …) gives one example, which cannot be compared pairwise. Secondary metrics: the task's others.

    ``lm-eval:arc_easy`` is short for ``lm-eval: {task: arc_easy}``. Versions of harness and task and the documents enter job ids.
    """

    version: ClassVar[str] = "3"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})

    num_fewshot: Annotated[
        int, Knob(low=-1, high=1000, doc="answered examples in a prompt; -1 for the task's own")
    ] = -1
    question: Annotated[str, Knob(doc="text at whose last place in a prompt the context ends, as '\\nQuestion:'")] = ""
    chat: Annotated[bool, Knob(doc="lay the checkpoint's chat template around every prompt")] = False

    def check(self, info: ModelInfo) -> None:
        """A language model with a tokenizer; a task and a metric that exist."""
        super().check(info)
        lm_info(info, self.name)
        if self.loaded().unsafe:
            raise UserError(
                f"task {self.name}: {self.task} runs code that models write, which this platform does not do"
            )

    def check_method(self, method: Method, info: ModelInfo) -> None:
        """Refuse methods on the cache where whole texts are scored, which leaves no context to compress."""
        if ATTENTION in method.hooks and str(self.loaded().task.OUTPUT_TYPE) == "loglikelihood_rolling":
            raise Infeasible(
                f"task {self.name}: {self.task} scores whole texts, so that there is no context for method {method.name} to "
                "compress; the task text does, with prefix"
            )

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Ask the documents shard by shard, in a seeded order."""
        lm, loaded = lm_model(model, self.name), self.loaded()
        harness = self._harness(lm)
        count = min(self.limit or len(loaded.numbers), len(loaded.numbers))
        order = np.random.default_rng(derive_seed("order", self.name, self.task, seed)).permutation(count)
        metric = self.chosen_metric()
        if metric in loaded.corpus:
            yield self._whole(loaded, harness, np.sort(order))
            return
        for part in batches(count, self.shard):
            samples, _ = self._run(
                loaded, harness, np.sort(order[part])
            )  # the harness numbers documents in ascending order
            errors = np.array([self.error_of(metric, _number(sample[metric])) for sample in samples])
            others = [m for m in loaded.metrics if m != metric and m not in loaded.corpus]
            metrics = {m: np.array([_number(sample[m]) for sample in samples]) for m in others if m in samples[0]}
            yield Shard(np.array([loaded.numbers[sample["doc_id"]] for sample in samples]), errors, metrics)

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Mean costs of all requests of single documents."""
        lm, loaded = lm_model(model, self.name), self.loaded()
        harness = self._harness(lm)
        examples = []
        for place in range(min(MEASURED, len(loaded.numbers))):
            requests = self._requests(loaded, harness, np.array([place]))
            text = harness.text(requests[0].args[0])
            prompt = harness.tokens.prompt(text)
            kind = requests[0].request_type
            rolling = kind == "loglikelihood_rolling"
            length = len(harness.tokens.with_ends(requests[0].args[0])[0]) if rolling else prompt.tokens
            run = getattr(harness, kind)
            examples.append(
                Priced(lambda requests=requests: requests, run, length, 1 if rolling else len(prompt.context), length)  # type: ignore[misc]
            )
        return costs_of(lm, examples)

    def _harness(self, lm: LmModel) -> Any:
        from isoflop.tasks.harness._lm_eval_model import HarnessModel

        where = f"task {self.name}: {self.task}"
        # the harness lays the chat template itself, so that prompts come as they are
        return HarnessModel(lm, PromptTokenizer(lm.tokenizer, False, where), self.question, where)

    def loaded(self) -> Loaded:
        """The harness' task with its documents."""
        return load(self.task, self.include_path, self.num_fewshot)

    def _requests(self, loaded: Loaded, harness: Any, places: np.ndarray) -> list[Any]:
        """The harness' requests for some documents."""
        with redirect_stderr(StringIO()):  # its progress bars
            loaded.task.build_all_requests(
                samples=places.tolist(),
                apply_chat_template=self.chat,
                chat_template=harness.apply_chat_template if self.chat else None,
                tokenizer_name=harness.tokenizer_name if self.chat else "",
            )
        found: list[Any] = loaded.task.instances
        return found

    def _run(self, loaded: Loaded, harness: Any, places: np.ndarray) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
        """What the harness notes of some documents, and its own figures of all of them."""
        from lm_eval.evaluator import evaluate

        with redirect_stderr(StringIO()):  # its progress bars
            results = evaluate(
                lm=harness,
                task_dict={self.task: loaded.task},
                samples={self.task: places.tolist()},
                bootstrap_iters=0,
                apply_chat_template=self.chat,
            )
        samples = results["samples"][self.task]
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        if self.filter and self.filter not in filters:
            raise unknown(f"filter of {self.task}", self.filter, filters, f"task {self.name}")
        chosen = self.filter or filters[0]
        return [sample for sample in samples if sample["filter"] == chosen], results["results"][self.task]

    def _whole(self, loaded: Loaded, harness: Any, places: np.ndarray) -> Shard:
        """One example: the metric of all documents."""
        samples, figures = self._run(loaded, harness, places)
        metric = self.chosen_metric()
        value = float(figures[f"{metric},{samples[0]['filter']}"])
        return self.whole(self.error_of(metric, value / 100 if metric in IN_HUNDREDTHS else value), len(places))


@dataclass(frozen=True)
class Loaded(Documents):
    """A task of lm-eval.

    Attributes:
        corpus: metrics that are of all documents together.
        unsafe: whether it runs code that models write.
    """

    corpus: frozenset[str]
    unsafe: bool


@lru_cache(maxsize=16)
def load(name: str, include_path: str, num_fewshot: int) -> Loaded:
    """A task with its documents.

    Raises:
        UserError: the harness is not installed, has no such task, a group of several, or cannot load its data.
    """
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError:
        raise UserError("task lm-eval needs the package lm-eval: pip install 'isoflop[lm-eval]'") from None
    for talkative in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    check_folder("lm-eval", include_path)
    manager = lm_eval.tasks.TaskManager(include_path=include_path or None, include_defaults=not include_path)
    if include_path and name not in manager.all_tasks:  # reading the harness' own thousands takes seconds
        manager = lm_eval.tasks.TaskManager(include_path=include_path)
    if name not in manager.all_tasks:
        raise unknown_task("lm-eval", name, manager.all_tasks, include_path)
    try:
        with redirect_stderr(StringIO()):  # progress bars of data sets
            yaml = str(manager.task_index[name].yaml_path) if include_path else None
            found = loaded_beside(yaml, lambda: lm_eval.tasks.get_task_dict([name], manager))
    except Exception as error:  # data sets, configurations and templates fail in ways of their own
        raise not_loaded("lm-eval", name, error) from None
    if list(found) != [name]:
        raise is_group("lm-eval", name, found)
    task = found[name]
    task.set_fewshot_seed(seed=1234)  # the harness' own
    if num_fewshot >= 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    documents = [json.dumps(doc, sort_keys=True, default=str) for doc in task.eval_docs]
    better = {str(metric): bool(value) for metric, value in task.higher_is_better().items()}
    return Loaded(
        task,
        (lm_eval.__version__, str(task.VERSION)),
        config_text(asdict(task.config)) + shots_text(task),
        numbers_of(documents),
        tuple(better),
        better,
        frozenset(metric for metric in better if metric in CORPUS),
        bool(getattr(task, "UNSAFE_CODE", False)),
    )


def _number(value: Any) -> float:
    """A document's value; of a perplexity bits per word or byte."""
    if isinstance(value, tuple):
        loglikelihood, weight = value
        return -float(loglikelihood) / float(weight) / float(np.log(2))
    return float(value)
