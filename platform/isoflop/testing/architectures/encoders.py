"""The walk over text encoders: each class small, beside transformers' own module, which sees each text alone and without padding.

Shape suffixes: B texts, T tokens, d width, S masked positions, W vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoflop.methods.base import build
from isoflop.methods.weights.base import CalibratedMethod
from isoflop.methods.weights.blockwise import BlockPasses
from isoflop.methods.weights.views import linear_views, observed
from isoflop.models.checkpoints.encoder import ENCODERS, HEADS, REFUSED
from isoflop.models.checkpoints.source import DTYPES, brief
from isoflop.models.encoder import CHOOSES, EMBEDS, FILLS, EncoderBatch, EncoderModel
from isoflop.models.family import family_of
from isoflop.models.lm import NOT_SCORED
from isoflop.models.quiet import no_progress_bars
from isoflop.testing.architectures.small import WORDS, NotSmall, small_config
from isoflop.testing.architectures.vision import SAME_BUT_FOR_ROUNDING, near
from isoflop.testing.architectures.walk import Check, Findings, Wrong, examined, redrawn, same
from isoflop.testing.given import GivenContext, made_up_documents

TEXTS = ["what walks on four legs in the morning", "a cat"]
PAIRS = [("which animal is it", "a dog that walks on four legs"), ("which", "a cat")]
_SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
_LETTERS = " abcdefghijklmnopqrstuvwxyz.,:?0123456789"
SPECIAL_IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
CALIBRATED = 4
"""Windows of calibration text."""


@dataclass(frozen=True, eq=False)
class EncoderSubject:
    """A small encoder; see ``Subject``."""

    folder: Path
    stock: Any
    model: EncoderModel

    def answers(self, model: EncoderModel | None = None) -> list[Tensor]:
        """What ours gives, texts of unequal length in one batch, all that its head can."""
        model = self.model if model is None else model
        found = []
        if EMBEDS in model.info.offers:
            found.append(model.embed_all(TEXTS, query=False))
        if FILLS in model.info.offers:
            found.append(model.fill(self.masked)[0].float())
        if CHOOSES in model.info.offers:
            found.append(model.choose(self.pairs))
        elif EMBEDS not in model.info.offers:
            found.append(model.rank(self.pairs))
        return found

    @cached_property
    def pairs(self) -> EncoderBatch:
        """Two pairs of texts."""
        return self.model.batch([self.model.tokens(*pair) for pair in PAIRS])

    @cached_property
    def masked(self) -> EncoderBatch:
        """Two texts, two tokens of the first and one of the second masked."""
        batch = self.model.batch([self.model.tokens(text) for text in TEXTS])
        targets_BT = torch.full_like(batch.ids_BT, NOT_SCORED)
        for row, place in ((0, 3), (0, 9), (1, 2)):
            targets_BT[row, place] = batch.ids_BT[row, place]
        ids_BT = torch.where(targets_BT == NOT_SCORED, batch.ids_BT, self.model.tokenizer.mask_token_id)
        return replace(batch, ids_BT=ids_BT, targets_BT=targets_BT)

    def expected(self) -> list[Tensor]:
        """What the stock module gives, each text alone."""
        model, found = self.model, []
        if EMBEDS in model.info.offers:
            states = [self.stock.base_model(**self._alone(text)).last_hidden_state[0] for text in TEXTS]
            found.append(torch.stack([state_Td.mean(0) for state_Td in states]))
        if FILLS in model.info.offers:
            assert self.masked.targets_BT is not None
            rows = []
            for row, ids_T in enumerate(self.masked.ids_BT):
                real_T = self.masked.mask_BT[row].bool()
                inputs = {**self._alone(TEXTS[row]), "input_ids": ids_T[real_T][None]}
                rows.append(self.stock(**inputs).logits[0][self.masked.targets_BT[row][real_T] != NOT_SCORED])
            found.append(torch.cat(rows))
        if CHOOSES in model.info.offers:
            alone = [self.stock(**{n: t[None] for n, t in self._alone(*pair).items()}).logits[0] for pair in PAIRS]
            found.append(torch.cat(alone))
        elif EMBEDS not in model.info.offers:
            found.append(torch.cat([self.stock(**self._alone(*pair)).logits[:, 0] for pair in PAIRS]))
        return found

    def compare(self, what: str) -> None:
        """Raise Wrong unless ours gives what the stock module gives."""
        for ours, theirs in zip(self.answers(), self.expected(), strict=True):
            same(what, ours, theirs)

    def _alone(self, *texts: str) -> dict[str, Tensor]:
        """As a tokenizer gives it to transformers' module."""
        return dict(self.model.tokenizer(*texts, return_tensors="pt"))


def one_pass(subject: EncoderSubject) -> None:
    """Stock embeddings, logits of masks, of options, of pairs."""
    subject.compare("the model as it comes")


def matrices(subject: EncoderSubject) -> None:
    """Exact at 16 bits; at 3 bits what the stock module gives with those weights; the model is afterwards what it was."""
    model = subject.model
    with build("rtn", {"bits": 16}).apply(model, None):
        subject.compare("matrices at 16 bits")
    before = subject.answers()
    kept = {name: value.clone() for name, value in subject.stock.state_dict().items()}
    with build("rtn", {"bits": 3, "group": 8}).apply(model, None):
        try:
            subject.stock.load_state_dict(model.module.state_dict())
            subject.compare("matrices at 3 bits")
        finally:
            subject.stock.load_state_dict(kept)
        if all(torch.equal(a, b) for a, b in zip(before, subject.answers(), strict=True)):
            raise Wrong("matrices at 3 bits change nothing")
    subject.compare("the model as it was")


def calibration(subject: EncoderSubject) -> None:
    """Inputs of the matrices are the same block by block, all batches through one after the other, as in whole passes."""
    model, ctx = subject.model, context()
    views, batches = linear_views(model), list(model.calibration(ctx, CALIBRATED, 0))
    passes, found = (
        BlockPasses(model, views, batches),
        [_grams(model, views, batches, whole) for whole in (True, False)],
    )
    if passes._list is None or not passes._hands_states_on():
        raise Wrong("its blocks do not hand states on, so that calibration runs whole passes")
    for name, gram_II in found[0].items():
        same(f"what {name} is given", found[1][name], gram_II)
    for name in ("gptq", "wanda", "sparsegpt"):
        method = build(name, {"n_calib": CALIBRATED, **({"group": 8} if name == "gptq" else {})})
        assert isinstance(method, CalibratedMethod)
        with method.apply(model, method.calibrate(model, ctx, 0)):
            if not all(bool(answer.isfinite().all()) for answer in subject.answers()):
                raise Wrong(f"with {name} there are infinities")


def _grams(model: EncoderModel, views: list[Any], batches: list[Any], whole: bool) -> dict[str, Tensor]:
    """XᵀX of every matrix' inputs, from whole passes or block by block."""
    sums: dict[str, Tensor] = {}

    def add(view: Any, x: Tensor) -> None:
        x_NI = x.reshape(-1, x.shape[-1]).double()
        sums[view.name] = sums.get(view.name, torch.zeros(1, dtype=torch.float64)) + x_NI.T @ x_NI

    if whole:
        with observed(views, add):
            for batch in batches:
                model.supervised(batch)
    else:

        @contextmanager
        def watching(some: list[Any]) -> Any:
            with observed(some, add):
                yield lambda: None

        BlockPasses(model, views, batches).run(watching)
    return sums


def types(subject: EncoderSubject) -> None:
    """In 16 bits on a CPU, as near as the type allows."""
    for dtype, allowed in SAME_BUT_FOR_ROUNDING.items():
        model = loaded(f"hf:{subject.folder}?dtype={dtype}")
        if next(model.module.parameters()).dtype != DTYPES[dtype]:
            raise Wrong(f"{dtype} was asked for")
        for ours, theirs in zip(subject.answers(model), subject.expected(), strict=True):
            near(f"in {dtype}", ours, theirs, allowed)


ENCODER_CHECKS: dict[str, Check] = {
    "one pass": one_pass, "matrices": matrices, "calibration": calibration, "16 bits": types,
}  # fmt: skip


def encoder_classes() -> list[str]:
    """Every class that is taken and transformers has, and the encoder of each that is not."""
    import transformers

    taken = [begins + ends for begins in ENCODERS for ends in HEADS]
    return [name for name in (*taken, *(f"{begins}Model" for begins in REFUSED)) if hasattr(transformers, name)]


def examine_encoder(architecture: str, folder: Path, checks: Mapping[str, Check] | None = None) -> Findings:
    """Build a class small in an empty folder, and try every check on it."""
    checks, source = ENCODER_CHECKS if checks is None else checks, folder / "model"
    ref = f"hf:{source}"

    def make() -> EncoderSubject:
        if not architecture.startswith(ENCODERS):
            source.mkdir(parents=True)
            (source / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "bert"}))
            family_of(ref).info(ref, {})
            raise Wrong(f"{architecture} is described")
        stock = small_encoder(architecture)
        save_encoder(stock, source)
        return EncoderSubject(source, stock, loaded(ref))

    return examined(ref, checks, make)


def small_encoder(architecture: str, **changes: Any) -> Any:
    """Transformers' module of a class with small numbers and weights that attend unevenly."""
    import transformers

    cls = getattr(transformers, architecture)
    labels = {"num_labels": 1} if architecture.endswith("ForSequenceClassification") else {}
    try:
        config = small_config(cls.config_class.model_type, **SPECIAL_IDS, **labels, **changes)
        config.architectures = [architecture]
        return redrawn(cls._from_config(config))
    except NotSmall:
        raise
    except Exception as error:
        raise NotSmall(f"transformers builds no small module of it ({brief(error)})") from error


def save_encoder(stock: Any, source: Path) -> None:
    """Write a module and a tokenizer."""
    with no_progress_bars():
        stock.save_pretrained(source)
    letters(stock.config.to_dict().get("type_vocab_size", 0) > 1).save_pretrained(source)


def letters(types: bool = True) -> Any:
    """A tokenizer of letters with the special tokens of BERT.

    Args:
        types: tells the second text of a pair from the first.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate([*_SPECIAL, *_LETTERS])}
    assert len(words) <= WORDS
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    inputs = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def context() -> GivenContext:
    """Stages that need no corpus of their own."""
    return GivenContext({"english": made_up_documents()})


def loaded(ref: str) -> EncoderModel:
    """An encoder as a user would load it."""
    family = family_of(ref)
    model = family.load(family.info(ref, {}), None, context())
    if not isinstance(model, EncoderModel):
        raise TypeError(f"{type(model).__name__} is no text encoder")
    return model
