"""Untrained members of the built-in families, and what the suites ask of a loaded model of each kind.

Weights are those that a training would begin with, so that nothing here takes longer than building the model.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.errors import UserError
from isoflop.core.hook import Hook
from isoflop.methods.codecs.probe import CodecProbe
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.methods.visual_tokens.probe import untrained_model as untrained_vlm
from isoflop.models.base import Model, ModelInfo
from isoflop.models.checkpoints.hf import FAMILY as HF
from isoflop.models.family import family_of, split_ref
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel
from isoflop.models.text_classifier import TextClassifier
from isoflop.models.tiny.bert_training import SIZES as BERT_SIZES
from isoflop.models.tiny.bert_training import ReviewTokenizer, untrained_bert
from isoflop.models.tiny.fact_reader import WORDS, WordTokenizer
from isoflop.models.tiny.lm_config import FACT_SIZES, RECALL_SIZES, TEXT_SIZES
from isoflop.models.tiny.lm_training import TextRecipe, untrained_lm
from isoflop.models.tiny.moe_lm import MOE_SIZES, MoeRecipe, untrained_moe
from isoflop.models.tiny.vit import MEMBERS
from isoflop.models.tiny.vit_config import SIZES as VIT_SIZES
from isoflop.models.tiny.vit_config import untrained as untrained_vit
from isoflop.models.vit import VitModel
from isoflop.models.vlm import VlmModel
from isoflop.models.worlds import recall_world
from isoflop.models.worlds.reviews import review_number
from isoflop.testing.given import GivenContext

EXAMPLES, TOKENS = 3, 12


def outputs_of(model: Model) -> Tensor:
    """What a built-in kind of model gives for a few fixed examples, a row each."""
    if isinstance(model, LmModel):
        ids = np.random.default_rng(0).integers(0, model.info.geometry["vocab_size"], (EXAMPLES, TOKENS))
        ids_BT = torch.from_numpy(ids)
        return model.logits(LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED))).flatten(1)
    if isinstance(model, VlmModel):
        scenes = VisualTokenProbe(examples=EXAMPLES)
        scenes.model = model
        return scenes.outputs(range(EXAMPLES))
    if isinstance(model, VitModel):
        images = CodecProbe(examples=EXAMPLES)  # of 8-bit samples, which a codec can give back
        images.model = model
        return images.outputs(range(EXAMPLES))
    if isinstance(model, TextClassifier):
        return model.classify(model.labelled([review_number(number, "outputs") for number in range(EXAMPLES)]))
    raise UserError(f"the suite does not know how to run a {type(model).__name__}: give its ModelProbe `outputs`")


@dataclass
class ModelProbe:
    """What the suite looks at closely of a family.

    Attributes:
        kinds: one reference, with options, of every kind of model that the family has.
        load: the model of a description, untrained where the family trains its models.
        outputs: of a model as it is now, (B, …), the same for every call.
        neutral: occupants that change nothing, of hooks that the suite does not know (see ``isoflop.testing.neutral``).
    """

    kinds: tuple[tuple[str, Mapping[str, Any]], ...]
    load: Callable[[ModelInfo], Model]
    outputs: Callable[[Model], Tensor] = field(default_factory=lambda: outputs_of)
    neutral: Mapping[Hook[Any], Callable[[Model], Occupant]] = field(default_factory=dict)


def model_probe(family: str) -> ModelProbe:
    """That of a built-in family.

    Raises:
        UserError: of another one, whose author hands one to the suite.
    """
    if family not in PROBES:
        raise UserError(f"the suite knows no untrained models of family {family!r}: give check_model a ModelProbe")
    return PROBES[family]()


def untrained(ref: str, options: Mapping[str, Any] | None = None) -> Model:
    """A built-in model by reference, before any training."""
    info = family_of(ref).info(ref, options or {})
    return PROBES[info.family]().load(info)


@torch.no_grad()
def _tiny_lm(info: Any) -> LmModel:
    corpus, _, size = split_ref(info.ref)[0].partition("/")[2].partition("-")
    tokenizer = None
    if corpus == "recall":
        declared = {"vocabulary": recall_world.VOCABULARY}
        module = untrained_lm(RECALL_SIZES[size], recall_world.VOCAB_SIZE, 0, isoflop=declared)
    elif corpus == "facts":
        module = untrained_lm(FACT_SIZES[size], len(WORDS), 0)
        context = GivenContext({})
        tokenizer = lambda: context.get(WordTokenizer())  # noqa: E731
    elif corpus == "text":
        recipe = TextRecipe(**dict(info.options))
        module = untrained_lm(recipe.shaped(TEXT_SIZES[size]), recipe.vocabulary, 0, **recipe.config)
    elif corpus == "moe":
        module = untrained_moe(MOE_SIZES[size], MoeRecipe(**dict(info.options)), 0)
    else:
        module = untrained_lm(TEXT_SIZES[size], info.geometry["vocab_size"], 0)
    return LmModel(info, module.eval().requires_grad_(False), tokenizer)


def _tiny_llava(info: Any) -> VlmModel:
    model = untrained_vlm(info.ref.partition("/")[2], tower=info.tower.tower)
    return VlmModel(info, model.module, model.vision)


def _tiny_vit(info: Any) -> VitModel:
    size, data = MEMBERS[info.ref.partition("/")[2]]
    return VitModel(info, untrained_vit(VIT_SIZES[size], data, 0).eval().requires_grad_(False))


def _tiny_bert(info: Any) -> TextClassifier:
    context, module = GivenContext({}), untrained_bert(BERT_SIZES[info.ref.partition("/")[2]], 0)
    tokenizer = lambda: context.get(ReviewTokenizer())  # noqa: E731
    return TextClassifier(info, module.eval().requires_grad_(False), tokenizer)


def _checkpoint() -> ModelProbe:
    """A decoder that was written to a folder; what it is loaded with is the family's own ``load``."""
    context = GivenContext({})
    folder = context.root / "checkpoint"  # both go together
    module: Any = untrained("tiny-lm/recall-d64").module
    module.save_pretrained(folder)
    return ModelProbe(((f"hf:{folder}", {}),), lambda info: family_of(info.ref).load(info, None, context))


PROBES: dict[str, Callable[[], ModelProbe]] = {
    "tiny-lm": lambda: ModelProbe(
        (
            ("tiny-lm/recall-d64", {}),
            ("tiny-lm/text-d32", {}),
            ("tiny-lm/text-d32", {"act": "relu"}),
            ("tiny-lm/facts-d64", {}),
            ("tiny-lm/mixed-d32", {}),
            ("tiny-lm/moe-d32", {}),
        ),
        _tiny_lm,
    ),
    "tiny-llava": lambda: ModelProbe(
        (("tiny-llava/d24", {}), ("tiny-llava/d24-qwen", {}), ("tiny-llava/d24", {"tower": "cls"})), _tiny_llava
    ),
    "tiny-vit": lambda: ModelProbe((("tiny-vit/c48", {}), ("tiny-vit/c48-sprites", {})), _tiny_vit),
    "tiny-bert": lambda: ModelProbe((("tiny-bert/d32", {}),), _tiny_bert),
    HF: _checkpoint,
}
