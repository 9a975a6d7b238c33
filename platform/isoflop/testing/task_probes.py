"""What the suite runs the built-in tasks on: small untrained models, and options under which a task takes a moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from isoflop.core.errors import UserError
from isoflop.core.folder_context import FolderContext
from isoflop.core.hook import Hook
from isoflop.core.knobs import KnobValue, check_knobs
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method, build
from isoflop.methods.kv_cache.probe import untrained_decoder
from isoflop.methods.prompts.probe import untrained_reader
from isoflop.methods.tokenization.probe import untrained_reader as untrained_byte_reader
from isoflop.methods.visual_tokens.probe import untrained_model as untrained_vlm
from isoflop.methods.vit_tokens.probe import untrained_model as untrained_vit
from isoflop.models.base import Model
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.hooks.prompt_text import PROMPT_TEXT
from isoflop.models.lm import LmModel, tokenizer_of
from isoflop.models.worlds.sprite_world import ImageSet
from isoflop.tasks.base import Task
from isoflop.tasks.byte_completion import ByteTask
from isoflop.tasks.data.choice import Choice
from isoflop.tasks.data.generate import Generate
from isoflop.tasks.data.human_eval import HumanEval
from isoflop.tasks.data.image_classes import ImageClasses
from isoflop.tasks.data.needle import Needle
from isoflop.tasks.data.retrieval import Retrieval
from isoflop.tasks.data.text import Text
from isoflop.tasks.data.vqa import Vqa
from isoflop.tasks.digit_scenes import DigitSceneTask
from isoflop.tasks.find_digit import FindDigit
from isoflop.tasks.harness.lm_eval_task import LmEval
from isoflop.tasks.harness.lmms_eval_task import LmmsEval
from isoflop.tasks.labelled_images import LabelledImages
from isoflop.tasks.language import BitsPerByte
from isoflop.tasks.latency import GenerationLatency
from isoflop.tasks.prompt_qa import PromptQa
from isoflop.tasks.reconstruction import Reconstruction
from isoflop.tasks.symbols import SymbolTask
from isoflop.tasks.text_classification import TextClassification
from isoflop.testing.given import GivenContext, made_up_documents
from isoflop.testing.model_probes import untrained
from isoflop.testing.small_llava import save_small_llava

VOCABULARY = 290
"""Tokens of the reader of bytes."""


@dataclass
class TaskProbe:
    """What a task is run on.

    Attributes:
        model: loaded, in evaluation mode, with fixed untrained weights.
        ctx: the stage context that is handed to ``evaluate`` and ``measure``.
        options: of the task, small enough for seconds; about a dozen examples in at least two shards.
        method, prepared: in place while the task runs, for tasks that need one.
        timed: what the task scores are times, which no run gives twice.
    """

    model: Model
    ctx: StageContext
    options: Mapping[str, KnobValue] = field(default_factory=dict)
    method: Method | None = None
    prepared: Any = None
    timed: bool = False

    def task(self, cls: type[Task], **changes: KnobValue) -> Task:
        """The task with the options, and some of them changed."""
        return cls(**check_knobs(cls, {**self.options, **changes}, f"task {cls.name}"))

    def applied(self) -> AbstractContextManager[None]:
        """The method in place."""
        return nullcontext() if self.method is None else self.method.apply(self.model, self.prepared)


def task_probe(cls: type[Task]) -> TaskProbe:
    """That of a built-in task, or of the nearest built-in base class.

    Raises:
        UserError: of another one, whose author hands one to the suite.
    """
    for base in cls.__mro__:
        if base in PROBES:
            return PROBES[base]()
    raise UserError(f"the suite knows no model for task {cls.name!r}: give check_task a TaskProbe")


def _scenes(tower: str = "dense") -> TaskProbe:
    model = untrained_vlm("d24", tower=tower)
    return TaskProbe(model, GivenContext({"tower": model.vision}), {"examples": 14, "shard": 6})


def _images() -> TaskProbe:
    return TaskProbe(untrained_vit("c48"), GivenContext({}), {"examples": 14, "shard": 6})


def _coded_images() -> TaskProbe:
    return TaskProbe(
        untrained_vit("c48"), GivenContext({}), {"examples": 14, "shard": 6}, build("downsample", {"factor": 2})
    )


def _symbols() -> TaskProbe:
    return TaskProbe(untrained("tiny-lm/recall-d64"), GivenContext({}), {"examples": 14, "shard": 6})


def _reviews() -> TaskProbe:
    return TaskProbe(untrained("tiny-bert/d32"), GivenContext({}), {"examples": 14, "shard": 6})


def _text(**options: KnobValue) -> TaskProbe:
    ctx = GivenContext({"english": made_up_documents()})
    model = untrained_byte_reader(VOCABULARY)
    model.info = replace(model.info, hooks=model.info.hooks | {ATTENTION, FEED_FORWARD})  # what its decoder can do, too
    return TaskProbe(model, ctx, {"examples": 10, "shard": 4, **options})


def reader_of_text(positions: int = 2048) -> tuple[LmModel, GivenContext]:
    """An untrained reader of bytes with its tokenizer, and its context."""
    ctx = GivenContext({"english": made_up_documents()})
    model = untrained_byte_reader(VOCABULARY)
    able: frozenset[Hook[Any]] = frozenset({ATTENTION, FEED_FORWARD, PROMPT_TEXT})  # what its decoder can do, too
    info = replace(model.info, hooks=model.info.hooks | able, geometry={**model.info.geometry, "positions": positions})
    return LmModel(info, model.module, tokenizer_of(info, ctx)), ctx


def own(name: str) -> str:
    """A file of the data that come with the package, as a user's own."""
    return str(Path(str(files("isoflop.sweeps") / "own" / name)))


def _own(name: str, **options: KnobValue) -> TaskProbe:
    model, ctx = reader_of_text()
    return TaskProbe(model, ctx, {"data": own(name), "limit": 8, "shard": 3, **options})


HARNESS_TASK = """
task: own_questions
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{passage}} {{question}}"
doc_to_choice: "{{options}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""


def _harness() -> TaskProbe:
    model, ctx = reader_of_text()
    folder = ctx.root / "tasks"
    folder.mkdir(parents=True)
    (folder / "own_questions.yaml").write_text(HARNESS_TASK.replace("DATA", own("questions.jsonl")))
    return TaskProbe(model, ctx, {"task": "own_questions", "include_path": str(folder), "limit": 8, "shard": 3})


def _retrieval() -> TaskProbe:
    model, ctx = reader_of_text()
    return TaskProbe(
        model, ctx, {"corpus": own("corpus.jsonl"), "queries": own("queries.jsonl"), "limit": 8, "shard": 3}
    )


def _drawn(folder: Path) -> list[Path]:
    """A folder of pictures, one for each of a few classes."""
    from PIL import Image

    images, found = ImageSet("sprites", "test", 14, 0.0, seed=1), []
    for number, (image_CHW, label) in enumerate(zip(next(images.images()), images.labels(), strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        found.append(place / f"{number}.png")
        Image.fromarray((image_CHW.transpose(1, 2, 0) * 255).round().astype("uint8")).save(found[-1])
    return found


def _pictures() -> TaskProbe:
    ctx = GivenContext({})
    _drawn(ctx.root / "pictures")
    return TaskProbe(untrained_vit("c48"), ctx, {"data": str(ctx.root / "pictures"), "shard": 6})


def _asked_pictures() -> tuple[Model, GivenContext, Path]:
    """A small LLaVA with untrained weights, and a table of questions about pictures."""
    reader, ctx = reader_of_text()
    asked = ("what is it", "which colour has it")
    rows = [
        {"image": str(path), "question": asked[number % 2], "answers": ["the", "same"]}
        for number, path in enumerate(_drawn(ctx.root / "pictures")[:8])
    ]
    table = ctx.root / "questions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_small_llava(ctx.root / "llava", reader.tokenizer)
    ref = f"hf:{ctx.root / 'llava'}"
    return family_of(ref).load(family_of(ref).info(ref, {}), None, FolderContext(ctx.root / "cache")), ctx, table


def _questions_about_pictures() -> TaskProbe:
    model, ctx, table = _asked_pictures()
    return TaskProbe(model, ctx, {"data": str(table), "max_tokens": 4, "shard": 3, "metric": "contains"})


VISION_HARNESS_TASK = """
task: own_pictures
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_visual: image
doc_to_text: "{{question}}"
doc_to_choice: ["the", "same"]
doc_to_target: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def _vision_harness() -> TaskProbe:
    model, ctx, table = _asked_pictures()
    folder = ctx.root / "tasks"
    folder.mkdir(parents=True)
    (folder / "own_pictures.yaml").write_text(VISION_HARNESS_TASK.replace("DATA", str(table)))
    return TaskProbe(model, ctx, {"task": "own_pictures", "include_path": str(folder), "limit": 8, "shard": 3})


def _needle() -> TaskProbe:
    model, ctx = reader_of_text()
    kinds = ("single", "multi-query", "variable-tracking")
    options: dict[str, KnobValue] = {
        "haystack": own("notes.txt"),
        "lengths": (1024,),
        "depths": (0.0, 1.0),
        "kinds": kinds,
    }
    return TaskProbe(model, ctx, {**options, "repeats": 1, "shard": 3})


def _questions() -> TaskProbe:
    ctx = GivenContext({})
    sizes: dict[str, KnobValue] = {"examples": 10, "shard": 4, "documents": 2, "facts": 4, "filler": 4}
    return TaskProbe(untrained_reader(ctx), ctx, sizes)


def _generation() -> TaskProbe:
    return TaskProbe(untrained_decoder(), GivenContext({}), {"prompt": 12, "new": 4, "examples": 3}, timed=True)


PROBES: dict[Any, Callable[[], TaskProbe]] = {
    FindDigit: lambda: _scenes("cls"),
    DigitSceneTask: _scenes,
    Reconstruction: _coded_images,
    LabelledImages: _images,
    SymbolTask: _symbols,
    TextClassification: _reviews,
    BitsPerByte: lambda: _text(tokens=24),
    ByteTask: lambda: _text(prompt=32, scored=4),
    PromptQa: _questions,
    Choice: lambda: _own("questions.jsonl", context="passage"),
    HumanEval: lambda: _own("programs.jsonl", execute=True, max_tokens=3, limit=4, seconds=1),
    Generate: lambda: _own(
        "questions.jsonl", prompt="{passage} {question}", context="passage", references="answers", max_tokens=4
    ),
    Text: lambda: _own("notes.txt", tokens=48),
    Needle: _needle,
    Vqa: _questions_about_pictures,
    ImageClasses: _pictures,
    Retrieval: _retrieval,
    LmEval: _harness,
    LmmsEval: _vision_harness,
    GenerationLatency: _generation,
}
