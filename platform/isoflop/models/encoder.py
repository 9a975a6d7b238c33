"""Text encoders of the BERT class: what is known of one, and the loaded model.

Every token attends to all others, so there is no cache and nothing is generated. An encoder embeds texts, ranks pairs of texts, fills
masks, or chooses among options, as its head can.

Shape suffixes: B rows, T tokens (padding behind them), O options, S scored positions, d width, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.models.base import Model
from isoflop.models.budget import pass_bytes
from isoflop.models.heads import head_logits
from isoflop.models.lm import NOT_SCORED
from isoflop.models.reading import TextInfo
from isoflop.models.sentence import Sentence

EMBEDDING, MASKED_LM, MULTIPLE_CHOICE, RERANKER = "embedding", "masked-lm", "multiple-choice", "reranker"
EMBEDS, FILLS, CHOOSES, RANKS = "embeddings", "masked-tokens", "chosen-options", "ranked-pairs"
"""Offers of encoders."""
OFFERS: dict[str, frozenset[str]] = {
    EMBEDDING: frozenset({EMBEDS}),
    MASKED_LM: frozenset({EMBEDS, FILLS}),
    MULTIPLE_CHOICE: frozenset({CHOOSES}),
    RERANKER: frozenset({RANKS}),
}
"""By head."""
MASKED = 0.15
"""Share of the tokens of calibration text that a masked language model has to fill, as it was trained."""
SPECIAL = 2
"""Tokens around a text: one before it, one behind it."""
_WIDTHS = 24
"""Numbers that a pass holds of each token at its widest place, in widths; see ``budget``."""


@dataclass(frozen=True, kw_only=True)
class EncoderInfo(TextInfo):
    """What is known of an encoder without loading its weights.

    ``n_params`` (N) counts the transformer blocks; embeddings, pooler and head are left out.

    Attributes:
        head: one of ``OFFERS``.
        sentence: how its states become an embedding.
        tokens_at_most: to which texts are cut before they are embedded or ranked.

    ``geometry`` holds ``width``, ``layers``, ``heads``, ``vocab_size``, ``positions`` and ``matrices``.
    """

    head: str
    sentence: Sentence
    tokens_at_most: int

    @property
    def window_at_most(self) -> int:
        """What it embeds or ranks of a text, without the special tokens around."""
        return self.tokens_at_most - SPECIAL

    @property
    def has_loss(self) -> bool:
        """Whether it fills masks."""
        return self.head == MASKED_LM


@dataclass(frozen=True)
class EncoderBatch:
    """Texts, or pairs of texts, in tokens.

    Attributes:
        ids_BT: tokens.
        mask_BT: 1 for tokens, 0 for the padding behind them.
        types_BT: 1 for the second text of a pair, for encoders that tell them apart; else None.
        targets_BT: what stands where a token was masked, NOT_SCORED elsewhere; None where nothing is asked.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    types_BT: Tensor | None = None
    targets_BT: Tensor | None = field(default=None, kw_only=True)

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """As Hugging Face's modules take them."""
        found = {"input_ids": self.ids_BT, "attention_mask": self.mask_BT}
        found |= {} if self.types_BT is None else {"token_type_ids": self.types_BT}
        return {name: tensor.to(device) for name, tensor in found.items()}

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int(self.mask_BT.sum())


class EncoderModel(Model):
    """A loaded Hugging Face encoder.

    Args:
        tokenizer: gives the tokenizer, which is read when text is handed to the model.
    """

    info: EncoderInfo

    def __init__(self, info: EncoderInfo, module: nn.Module, tokenizer: Callable[[], Any]) -> None:
        self.info = info
        self.module: Any = module
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face fast tokenizer."""
        return self._tokenizer()

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.module.parameters()).device

    @property
    def encoder(self) -> Any:
        """The module without its head."""
        return self.module.base_model

    def batch(self, rows: Sequence[Any]) -> EncoderBatch:
        """Rows of a tokenizer's output (``input_ids`` and, where it gives them, ``token_type_ids``), padded to one length."""
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        types = [torch.as_tensor(row["token_type_ids"]) for row in rows] if "token_type_ids" in rows[0] else None
        padding = self.tokenizer.pad_token_id or 0
        return EncoderBatch(
            pad_sequence(ids, batch_first=True, padding_value=padding),
            pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            None if types is None else pad_sequence(types, batch_first=True),
        )

    def tokens(self, text: str, second: str | None = None, cut: bool = True, **options: Any) -> Any:
        """A text, or a pair, in tokens with special ones around; cut to what the model embeds or ranks.

        Raises:
            Infeasible: it is longer than the model's room, and must not be cut.
        """
        limit = self.info.tokens_at_most
        found = self.tokenizer(
            text, second, truncation=cut, max_length=limit if cut else None, verbose=False, **options
        )
        room = self.info.geometry["positions"]
        if len(found["input_ids"]) > room:
            raise Infeasible(
                f"a text of {len(found['input_ids'])} tokens is longer than the {room} that model {self.info.ref} has room for"
            )
        return found

    def states(self, batch: EncoderBatch) -> Tensor:
        """Hidden states (B, T, d) of the last block, behind the final norm."""
        found: Tensor = self.encoder(**batch.inputs(self.device)).last_hidden_state
        return found

    def embed(self, batch: EncoderBatch) -> Tensor:
        """Embeddings (B, d) in float32."""
        states_BTd = self.states(batch)
        pooled_Bd = self.info.sentence.pooled(states_BTd, batch.mask_BT.to(self.device))
        dense = getattr(self.module, "sentence_dense", None)
        if dense is not None:
            pooled_Bd = dense(pooled_Bd.to(states_BTd.dtype)).float()
        return self.info.sentence.finished(pooled_Bd)

    def embed_all(self, texts: Sequence[str], query: bool) -> Tensor:
        """Embeddings (B, d) of many texts, those of similar length together.

        Args:
            query: with what the checkpoint puts before a query, and not before a document.
        """
        rows = [self.tokens(self.info.sentence.given(text, query)) for text in texts]
        parts, order = [], []
        for numbers in self.batches([len(row["input_ids"]) for row in rows]):
            parts.append(self.embed(self.batch([rows[n] for n in numbers])))
            order += numbers
        found_Bd = torch.cat(parts)
        return torch.empty_like(found_Bd).index_copy(0, torch.tensor(order, device=found_Bd.device), found_Bd)

    def rank(self, batch: EncoderBatch) -> Tensor:
        """A score (B,) of every pair: the one logit of a reranker."""
        found: Tensor = self.module(**batch.inputs(self.device)).logits[:, 0]
        return found.float()

    def choose(self, batch: EncoderBatch) -> Tensor:
        """Logits (O,) of the options of one question, a pair for each."""
        inputs = {name: tensor[None] for name, tensor in batch.inputs(self.device).items()}
        found: Tensor = self.module(**inputs).logits[0]
        return found.float()

    def fill(self, batch: EncoderBatch) -> tuple[Tensor, Tensor]:
        """Logits (S, W) of the masked positions, and their targets (S,); the head runs on nothing else."""
        assert batch.targets_BT is not None
        targets_BT = batch.targets_BT.to(self.device)
        output = self.encoder(**batch.inputs(self.device))
        scored_BT = targets_BT != NOT_SCORED
        states_Sd = output.last_hidden_state[scored_BT]
        return head_logits(self.module, self.encoder, output, states_Sd), targets_BT[scored_BT]

    def supervised(self, batch: EncoderBatch) -> tuple[Tensor, Tensor]:
        """Of a masked language model, logits (S, W) of masked positions and targets (S,); of others, states without targets.

        Methods that measure a loss ask ``ModelInfo.check_loss`` first.
        """
        if self.info.head == MASKED_LM and batch.targets_BT is not None:
            scored_BT = (batch.targets_BT != NOT_SCORED).to(self.device)
            logits_BTW = self.module(**batch.inputs(self.device)).logits
            return logits_BTW[scored_BT], batch.targets_BT.to(self.device)[scored_BT]
        states_Sd = self.states(batch).flatten(0, 1)
        return states_Sd, torch.full((len(states_Sd),), NOT_SCORED, device=self.device)

    def calibration(self, ctx: StageContext, examples: int, seed: int) -> Iterator[EncoderBatch]:
        """Batches of training text between special tokens; a masked language model has some tokens to fill.

        Raises:
            Infeasible: there is no text.
        """
        if self.info.text is None:
            raise Infeasible(f"model {self.info.ref} has no text to calibrate with")
        tokenizer = self.tokenizer
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        first = first if first is not None else tokenizer.bos_token_id
        last = last if last is not None else tokenizer.eos_token_id
        around = [[] if token is None else [token] for token in (first, last)]
        rng = torch.Generator().manual_seed(derive_seed("masks", seed))
        for ids_BT in self.info.text.batches(ctx, examples, seed):
            rows = [[*around[0], *row, *around[1]] for row in ids_BT.tolist()]
            whole_BT = torch.tensor(rows)
            types_BT = torch.zeros_like(whole_BT) if "token_type_ids" in tokenizer.model_input_names else None
            targets_BT = None
            if self.info.head == MASKED_LM:
                chosen_BT = torch.rand(whole_BT.shape, generator=rng) < MASKED
                chosen_BT[:, : len(around[0])] = False
                chosen_BT[:, whole_BT.shape[1] - len(around[1]) :] = False
                chosen_BT[:, len(around[0])] |= ~chosen_BT.any(1)
                targets_BT = torch.where(chosen_BT, whole_BT, NOT_SCORED)
                whole_BT = torch.where(chosen_BT, tokenizer.mask_token_id, whole_BT)
            yield EncoderBatch(whole_BT, torch.ones_like(whole_BT), types_BT, targets_BT=targets_BT)

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of rows of similar length, as many as a pass has memory for."""
        shape, batch = self.info.geometry, list[int]()
        for number in sorted(range(len(lengths)), key=lengths.__getitem__):
            row = 4 * lengths[number] * (_WIDTHS * shape["width"] + shape["heads"] * lengths[number])
            if batch and (len(batch) + 1) * row > pass_bytes(self.device):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch
