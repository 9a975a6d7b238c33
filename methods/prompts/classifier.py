"""A token classifier that says of every word whether it can be spared, and its training.

A small encoder, ``BertForTokenClassification`` from Hugging Face, with a tokenizer of its own: words fall into
several pieces, and the reader's tokenizer takes no part. It sees documents in chunks and never a query.

Shape suffixes: B chunks, T pieces.
"""

from __future__ import annotations

import json
import logging
import string
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.prompts.labels import Labelled, draw_chunks, well_labelled
from isoflop.methods.prompts.units import Span, places_of, words_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.training.loop import fit, record_training
from isoflop.models.worlds.lm_text import read_tokenizer

log = logging.getLogger(__name__)
CHUNK_ENDS = (".", "\n")
"""Pieces behind which a document may be cut."""
LAYERS, ROOM, PIECES = 2, 128, 200
"""Layers of the encoder, pieces of a chunk with its two special ones, size of its vocabulary."""
VALIDATION = 0.2
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
NOT_LABELLED = -100


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    Attributes:
        ids: of its pieces, special ones not included.
        offsets: start and end of each piece in the document.
    """

    ids: tuple[int, ...]
    offsets: tuple[Span, ...]


@dataclass(frozen=True)
class TokenClassifier:
    """A trained classifier with its tokenizer.

    Attributes:
        module: ``BertForTokenClassification`` with the labels drop and keep.
        tokenizer: a fast tokenizer.
        log: figures of the training, for people.
    """

    module: Any
    tokenizer: Any
    log: dict[str, float] = field(default_factory=dict, compare=False)

    def chunks(self, text: str) -> list[Chunk]:
        """A document cut greedily into chunks that fit, each back to the last sentence end in it where there is one."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
        ends = [text[start:end] in CHUNK_ENDS for start, end in offsets]
        room = int(self.module.config.max_position_embeddings) - 2
        found, start = [], 0
        while start < len(ids):
            stop = min(len(ids), start + room)
            if stop < len(ids):
                stop = next((i + 1 for i in range(stop - 1, start - 1, -1) if ends[i]), stop)
            found.append(Chunk(tuple(ids[start:stop]), tuple(offsets[start:stop])))
            start = stop
        return found

    @torch.no_grad()
    def probabilities(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """The probability that a piece is kept, for every piece of every chunk, from one forward pass."""
        if not chunks:
            return []
        ids_BT, seen_BT = batch_of([chunk.ids for chunk in chunks], self.tokenizer)
        device = next(self.module.parameters()).device
        logits_BT2 = self.module(input_ids=ids_BT.to(device), attention_mask=seen_BT.to(device)).logits
        keep_BT = logits_BT2.double().softmax(-1)[..., 1].cpu().numpy()
        return [row[1 : 1 + len(chunk.ids)] for row, chunk in zip(keep_BT, chunks, strict=True)]


def batch_of(rows: Sequence[Sequence[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Ids (B, T) between [CLS] and [SEP], padded on the right, and the attention mask (B, T)."""
    length = max(len(row) for row in rows) + 2
    ids_BT = torch.full((len(rows), length), tokenizer.pad_token_id)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row) + 2] = torch.tensor([tokenizer.cls_token_id, *row, tokenizer.sep_token_id])
    return ids_BT, (ids_BT != tokenizer.pad_token_id).long()


def piece_labels(chunk: Labelled, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Piece ids of a chunk, and each word's label copied to all of its pieces."""
    encoded = tokenizer(chunk.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = places_of([start for start, _ in encoded["offset_mapping"]], words_of(chunk.text))
    return encoded["input_ids"], [NOT_LABELLED if p is None else int(chunk.labels[p]) for p in places]


@dataclass(frozen=True)
class ClassifierStage(Stage):
    """A token classifier trained on the teacher's labels, in ``save_pretrained`` form with its tokenizer.

    It knows nothing of any reader, so that one training serves all readers of a seed. Trained on the CPU.

    Args:
        width: of the encoder.
        noise: of the teacher.
        chunks: training documents, a fifth of which choose the best epoch.
    """

    kind: ClassVar[str] = "prompt-classifier"
    version: ClassVar[str] = "2"

    width: int
    noise: float
    seed: int
    chunks: int = 2000
    epochs: int = 8
    batch: int = 32
    lr: float = 2e-3
    warmup: float = 0.1
    final: float = 0.05
    clip: float = 1.0

    @property
    def steps(self) -> int:
        """Optimiser steps, at most: what the schedule of the learning rate spans."""
        return self.epochs * -(-self.chunks // self.batch)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Label, train, keep the epoch of the best token accuracy on the held-out fifth."""
        started = time.process_time()
        rng = np.random.default_rng(derive_seed("prompt classifier", self.seed))
        chunks = draw_chunks(self.chunks, self.noise, rng)
        kept = well_labelled(chunks)
        held = round(VALIDATION * len(kept))
        tokenizer = train_pieces([chunk.text for chunk in kept[held:]])
        module = untrained_classifier(self.width, len(tokenizer), derive_seed("classifier weights", self.seed))
        rows = [piece_labels(chunk, tokenizer) for chunk in kept]
        losses, figures = self._train(module, tokenizer, rows[held:], rows[:held], rng)
        tokenizer.save_pretrained(folder)
        with no_progress_bars():
            module.save_pretrained(folder)
        figures["chunks_dropped"] = float(len(chunks) - len(kept))
        log.info("trained a classifier: %s", record_training(folder, losses, started, figures))

    def load(self, ctx: StageContext, folder: Path) -> TokenClassifier:
        """The classifier on the worker's device in evaluation mode."""
        from transformers import BertForTokenClassification

        with no_progress_bars():
            module = BertForTokenClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        record = json.loads((folder / "training.json").read_text())
        return TokenClassifier(module.to(ctx.device).eval().requires_grad_(False), read_tokenizer(folder), record)

    def _train(
        self, module: Any, tokenizer: Any, train: list[Any], held: list[Any], rng: np.random.Generator
    ) -> tuple[list[float], dict[str, float]]:
        best: dict[str, Any] = {"token_accuracy": -1.0}

        def batches() -> Iterator[list[Any]]:
            for epoch in range(self.epochs):
                order = rng.permutation(len(train))
                for first in range(0, len(order), self.batch):
                    yield [train[i] for i in order[first : first + self.batch]]
                module.eval()
                accuracy = token_accuracy(module, tokenizer, held or train)
                module.train()
                if accuracy > best["token_accuracy"]:
                    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
                    best.update(token_accuracy=accuracy, best_epoch=float(epoch + 1), state=state)

        module.train()
        losses = fit(
            module.parameters(),
            self,
            batches(),
            lambda rows: loss_of(module, tokenizer, rows),
            lr=self.lr,
            fused=False,
        )
        module.eval()
        module.load_state_dict(best.pop("state"))
        return losses, best


def loss_of(module: Any, tokenizer: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Cross-entropy over the labelled pieces; special pieces and padding have no label."""
    logits_BT2, labels_BT = _scored(module, tokenizer, rows)
    return F.cross_entropy(logits_BT2.transpose(1, 2), labels_BT, ignore_index=NOT_LABELLED)


@torch.no_grad()
def token_accuracy(module: Any, tokenizer: Any, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """Share of the labelled pieces with the right label."""
    right, total = 0, 0
    for first in range(0, len(rows), 64):
        logits_BT2, labels_BT = _scored(module, tokenizer, rows[first : first + 64])
        labelled_BT = labels_BT != NOT_LABELLED
        right += int(((logits_BT2.argmax(-1) == labels_BT) & labelled_BT).sum())
        total += int(labelled_BT.sum())
    return right / total


def _scored(module: Any, tokenizer: Any, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    ids_BT, seen_BT = batch_of([ids for ids, _ in rows], tokenizer)
    labels_BT = torch.full_like(ids_BT, NOT_LABELLED)
    for place, (_, labels) in enumerate(rows):
        labels_BT[place, 1 : 1 + len(labels)] = torch.tensor(labels)
    return module(input_ids=ids_BT, attention_mask=seen_BT).logits, labels_BT


def train_pieces(texts: Sequence[str]) -> Any:
    """A BPE tokenizer with few pieces, so that most words take several; every ASCII letter and digit is known.

    Words are told from the offsets of their pieces, so that no mark is needed where one begins. (WordPiece's marked
    pieces get their numbers from the order of a hash table, another one in every process.)
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=list(SPECIAL),
        initial_alphabet=[*string.ascii_letters, *string.digits],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def untrained_classifier(width: int, vocabulary: int, seed: int) -> Any:
    """An encoder with initial weights drawn from ``seed``."""
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, width // 32),
        intermediate_size=2 * width,
        max_position_embeddings=ROOM,
        type_vocab_size=1,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5 * width**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForTokenClassification(config)
