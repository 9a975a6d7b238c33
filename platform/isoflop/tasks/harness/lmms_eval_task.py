"""The task ``lmms-eval``: tasks of lmms-eval, on vision-language models of this platform."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from isoflop.core.errors import Infeasible, UserError, unknown
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.features import batches
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.data.image_questions import ImageQuestions, check_model, check_prompt
from isoflop.tasks.data.images import digest, opened
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

KINDS = frozenset({"generate_until", "multiple_choice", "loglikelihood"})
"""Kinds of requests that are answered."""


@TASKS.register("lmms-eval")
@dataclass(frozen=True, kw_only=True)
class LmmsEval(HarnessTask):
    """A task of lmms-eval (``pip install 'isoflop[lmms-eval]'``), its own or one's own YAML under ``include_path``.

    The harness makes the questions and judges the answers; the model answers here, about one image per document. What a method
    leaves of the image is what the answer is generated, or the choices are scored, behind. A question that holds ``<image>``
    places the image itself; else ``prompt`` does.

    An example is a document, its error 1 − its value of ``metric`` where more is better, else the value; the first metric of
    the harness' task unless one is named. A value that is a record counts by its ``score``; documents without a value of the metric are left
    out, and a metric whose values are no numbers is of all documents together and gives one example, which cannot be compared pairwise.

    ``lmms-eval:mmstar`` is short for ``lmms-eval: {task: mmstar}``. Versions of harness and task, documents and images enter job ids.
    """

    version: ClassVar[str] = "1"

    prompt: Annotated[str, Knob(doc="text around {question}, with <image> where the image stands")] = (
        "USER: <image>\n{question} ASSISTANT:"
    )
    chat: Annotated[bool, Knob(doc="the checkpoint's chat template instead of prompt")] = False

    def check(self, info: ModelInfo) -> None:
        """A vision-language model with a tokenizer; a task, a metric and a filter that exist."""
        super().check(info)
        check_model(info, f"task {self.name}")
        check_prompt(self.prompt, f"task {self.name}")
        filters = self.loaded().filters
        if self.filter and self.filter not in filters:
            raise unknown(f"filter of {self.task}", self.filter, filters, f"task {self.name}")

    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Ask the documents shard by shard, in a seeded order."""
        loaded, asked = self.loaded(), self._asked(model)
        order = np.random.default_rng(derive_seed("order", self.name, self.task, seed)).permutation(len(loaded.numbers))
        collected: list[Mapping[str, Any]] = []
        metric, yielded = self.chosen_metric(), False
        for part in batches(len(order), self.shard):
            places = order[part].tolist()
            values = _judged(loaded, asked, places, self.filter or loaded.filters[0])
            # several benchmarks give some metrics of some documents only
            asked_of = [(place, value) for place, value in zip(places, values, strict=True) if metric in value]
            errors = [_number(value[metric]) for _, value in asked_of]
            if None in errors:
                collected.extend(value for _, value in asked_of)
                continue
            if not asked_of:
                continue
            yielded = True
            noted = {m: [_number(value.get(m)) for _, value in asked_of] for m in asked_of[0][1] if m != metric}
            yield Shard(
                np.array([loaded.numbers[place] for place, _ in asked_of]),
                np.array([self.error_of(metric, float(error or 0.0)) for error in errors]),
                {m: np.array(found, dtype=float) for m, found in noted.items() if None not in found},
            )
        if collected:
            yield self._whole(loaded, collected)
        elif not yielded:
            raise Infeasible(
                f"task {self.name}: no document of {self.task} has a value of {metric}; allowed: another metric"
            )

    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of a document's question, from pixels to the first token of its answer; see ``ImageQuestions.measure``."""
        loaded, questions = self.loaded(), self._questions(model)
        return questions.measure(
            questions.prompt(0, loaded.visuals(document)[0], loaded.task.fewshot_context(document, 0))
            for document in loaded.task.eval_docs
        )

    def loaded(self) -> Loaded:
        """The harness' task with its documents."""
        return load(self.task, self.include_path, self.limit)

    def _questions(self, model: Model) -> ImageQuestions:
        return ImageQuestions(model, self.prompt, self.chat, f"task {self.name}: {self.task}")

    def _asked(self, model: Model) -> Any:
        from isoflop.tasks.harness._lmms_eval_model import VisionModel

        loaded = self.loaded()
        return VisionModel(self._questions(model), {self.task: loaded.task.dataset}, f"task {self.name}: {self.task}")

    def _whole(self, loaded: Loaded, values: Sequence[Mapping[str, Any]]) -> Shard:
        """One example: the metric of all documents, by the harness' own reduction."""
        metric = self.chosen_metric()
        found = _number(loaded.task.aggregation()[metric]([v[metric] for v in values if metric in v]))
        if found is None:
            raise Infeasible(f"task {self.name}: {metric} of {self.task} is no number; allowed: another metric")
        return self.whole(self.error_of(metric, found), len(values))


@dataclass(frozen=True)
class Loaded(Documents):
    """A task of lmms-eval; its ``numbers`` are of the documents that are taken, from their content and their images.

    Attributes:
        filters: names, the first first.
    """

    filters: tuple[str, ...]

    def visuals(self, document: Any) -> list[Any]:
        """What the harness shows with a document."""
        found = self.task.doc_to_visual(document)
        return [] if found is None else list(found)


@lru_cache(maxsize=16)
def load(name: str, include_path: str, limit: int) -> Loaded:
    """A task with its documents, at most ``limit`` of them (0: all).

    Raises:
        UserError: the harness is not installed, has no such task, a group of several, or cannot load its data.
        Infeasible: documents without an image or with several; requests of another kind.
    """
    try:
        import lmms_eval.tasks
        from loguru import logger
    except ImportError:
        raise UserError("task lmms-eval needs the package lmms-eval: pip install 'isoflop[lmms-eval]'") from None
    logger.disable("lmms_eval")
    check_folder("lmms-eval", include_path)
    manager = lmms_eval.tasks.TaskManager(include_path=include_path or None, include_defaults=not include_path)
    if name not in manager.all_tasks:
        raise unknown_task("lmms-eval", name, manager.all_tasks, include_path)
    try:
        with redirect_stderr(StringIO()):  # progress bars of data sets
            yaml = str(manager.task_index[name]["yaml_path"]) if include_path else None
            found = loaded_beside(yaml, lambda: lmms_eval.tasks.get_task_dict([name], manager))
            task = found.get(name)
            if not isinstance(task, dict | None):
                return _read(name, task, limit)
    except (UserError, Infeasible):
        raise
    except Exception as error:  # data sets, configurations and templates fail in ways of their own
        raise not_loaded("lmms-eval", name, error) from None
    raise is_group("lmms-eval", name, found)


def _read(name: str, task: Any, limit: int) -> Loaded:
    """What is known of a task before a model answers it."""
    from importlib.metadata import version

    kind = str(task.OUTPUT_TYPE)
    if kind not in KINDS or "acc_mutual_info" in task.aggregation():
        raise Infeasible(f"task lmms-eval: {name} asks {kind} requests; allowed: {', '.join(sorted(KINDS))}")
    documents = []
    for place in range(min(limit or len(task.eval_docs), len(task.eval_docs))):
        document = task.eval_docs[place]
        visuals = task.doc_to_visual(document) or []
        if len(visuals) != 1 or (isinstance(visuals[0], dict) and not visuals[0].get("bytes")):
            shown = "another medium than an image" if len(visuals) == 1 else f"{len(visuals)} images"
            raise Infeasible(f"task lmms-eval: document {place} of {name} has {shown}; allowed: one image per document")
        opened(visuals[0])
        rest = {key: _text(value) for key, value in task.eval_docs_no_media[place].items()}
        documents.append(json.dumps([digest(visuals[0], name), rest], sort_keys=True, default=str))
    better = {str(metric): bool(value) for metric, value in task.higher_is_better().items()}
    return Loaded(
        task,
        (version("lmms-eval"), str(task.VERSION)),
        config_text(asdict(task.config)) + shots_text(task),  # its own dump names functions by their addresses
        numbers_of(documents),
        tuple(better),
        better,
        tuple(str(ensemble.name) for ensemble in task._filters),
    )


def _judged(loaded: Loaded, asked: Any, places: Sequence[int], chosen: str) -> list[Mapping[str, Any]]:
    """The harness' values of some documents, by metric: its requests, our answers, its filters, its judgement."""
    task, config = loaded.task, loaded.task.config
    split = config.test_split if task.has_test_docs() else config.validation_split
    by_place: dict[int, list[Any]] = {}
    for place in places:
        # answers are greedy, so that the task's repeats would be copies
        metadata = {"task": config.task, "doc_id": place, "repeats": 1, "split": split}
        context = task.fewshot_context(task.eval_docs_no_media[place], config.num_fewshot or 0)
        made = task.construct_requests(doc_id=place, ctx=context, metadata=metadata)
        by_place[place] = made if isinstance(made, list) else [made]
    requests = [request for made in by_place.values() for request in made]
    for request, answer in zip(requests, getattr(asked, requests[0].request_type)(requests), strict=True):
        request.resps.append(answer)
    task._instances = requests
    task.apply_filters()
    return [
        task.process_results(task.eval_docs[place], [request.filtered_resps[chosen] for request in made])
        for place, made in by_place.items()
    ]


def _text(value: Any) -> Any:
    """A value as it names a document: of a file its name, for its content is told elsewhere."""
    if isinstance(value, str) and os.sep in value and len(value) < 4096 and Path(value).is_file():
        return Path(value).name
    return value


def _number(value: Any) -> float | None:
    """A document's value; of a record its score."""
    if isinstance(value, Mapping):
        value = value.get("score")
    if isinstance(value, bool | int | float | np.number):
        return float(value)
    return None
