"""A world of symbols that a small decoder can master exactly: repeated sequences, copies, key-value pairs.

It has a raw vocabulary of 128 tokens: BOS, SEP, 63 keys and 63 values. What is tested is never memorised, since every
sequence is drawn anew; only looking back into the cache answers. Lengths and gaps vary in training, because a model
trained on a fixed distance copies by distance and never learns to look up.

Shape suffixes: B batch, T tokens, P pairs, Q asked pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.models.lm import NOT_SCORED, LmBatch
from isoflop.models.worlds.calibration import CalibrationText

VOCABULARY = "recall-1"
VOCAB_SIZE = 128
BOS, SEP = 0, 1
FIRST_KEY, FIRST_VALUE = 2, 65
KEYS, VALUES = FIRST_VALUE - FIRST_KEY, VOCAB_SIZE - FIRST_VALUE
SYMBOLS = KEYS + VALUES
CALIBRATION_BATCH = 16


def repeated(rng: np.random.Generator, rows: int, period: int, length: int) -> LmBatch:
    """BOS and a random sequence of distinct symbols repeated up to ``length``; scored after the first period."""
    once_BP = distinct(rng, rows, period, FIRST_KEY, VOCAB_SIZE)
    ids_BT = np.tile(once_BP, (1, -(-length // period)))[:, :length]
    return _scored(_behind_bos(ids_BT), 1 + period)


def copying(rng: np.random.Generator, rows: int, length: int, gap: int, cue: int) -> LmBatch:
    """``BOS segment gap segment``: the gap's symbols do not occur in the segment, whose symbols are all different.

    Args:
        cue: symbols of the second segment that are given; those that follow the next one are scored.
    """
    symbols = distinct(rng, rows, length + gap, FIRST_KEY, VOCAB_SIZE)
    ids_BT = _behind_bos(np.concatenate((symbols, symbols[:, :length]), axis=1))
    return _scored(ids_BT, 1 + length + gap + cue, 1 + length + gap)


def recalling(
    rng: np.random.Generator, rows: int, pairs: int, asked: int, filler: int = 0, announced: bool = False
) -> LmBatch:
    """``BOS k v k v … filler SEP k v k v …``: the values behind the asked keys, in random order, are scored.

    Args:
        pairs: key-value pairs; the keys of a sequence are different, its values need not be.
        asked: how many of them are asked.
        filler: values without a key, behind the pairs.
        announced: the asked keys are named, in another order and ended by SEP, before they are asked; the prompt
            reaches to their end.
    """
    keys_BP = distinct(rng, rows, pairs, FIRST_KEY, FIRST_VALUE)
    values_BP = rng.integers(FIRST_VALUE, VOCAB_SIZE, (rows, pairs))
    order_BQ = distinct(rng, rows, pairs, 0, pairs)[:, :asked]
    asked_keys_BQ = np.take_along_axis(keys_BP, order_BQ, axis=1)
    asked_values_BQ = np.take_along_axis(values_BP, order_BQ, axis=1)
    separator_B1 = np.full((rows, 1), SEP)
    parts = [_interleave(keys_BP, values_BP), rng.integers(FIRST_VALUE, VOCAB_SIZE, (rows, filler)), separator_B1]
    if announced:
        parts += [rng.permuted(asked_keys_BQ, axis=1), separator_B1]
    prefix = 1 + sum(part.shape[1] for part in parts)
    ids_BT = _behind_bos(np.concatenate([*parts, _interleave(asked_keys_BQ, asked_values_BQ)], axis=1))
    targets_BT = np.full_like(ids_BT, NOT_SCORED)
    targets_BT[:, prefix::2] = asked_values_BQ
    return LmBatch(torch.from_numpy(ids_BT), torch.from_numpy(targets_BT), prefix)


def distinct(rng: np.random.Generator, rows: int, count: int, low: int, high: int) -> np.ndarray:
    """Rows of ``count`` different numbers from ``low`` to below ``high``, in random order."""
    return rng.random((rows, high - low)).argsort(axis=1)[:, :count] + low


@dataclass(frozen=True)
class RecallText(CalibrationText):
    """Half key-value recall, half copies, as in training.

    Args:
        pairs: most pairs of a sequence.
    """

    pairs: int

    def batches(self, ctx: StageContext, examples: int, seed: int) -> Iterator[Tensor]:
        """Sequences of one length per batch."""
        rng = np.random.default_rng(derive_seed("calibration", seed))
        for first in range(0, examples, CALIBRATION_BATCH):
            rows = min(CALIBRATION_BATCH, examples - first)
            if first // CALIBRATION_BATCH % 2 == 0:
                yield recalling(rng, rows, self.pairs, self.pairs, int(rng.integers(0, 9))).ids_BT
            else:
                yield copying(rng, rows, 2 * self.pairs, int(rng.integers(0, 9)), 1).ids_BT


def _behind_bos(ids_BT: np.ndarray) -> np.ndarray:
    return np.concatenate((np.full((len(ids_BT), 1), BOS), ids_BT), axis=1)


def _interleave(a_BP: np.ndarray, b_BP: np.ndarray) -> np.ndarray:
    return np.stack((a_BP, b_BP), axis=2).reshape(len(a_BP), -1)


def _scored(ids_BT: np.ndarray, first: int, prefix: int = 0) -> LmBatch:
    """Score what follows position ``first`` and all later ones."""
    targets_BT = np.full_like(ids_BT, NOT_SCORED)
    targets_BT[:, first:-1] = ids_BT[:, first + 1 :]
    return LmBatch(torch.from_numpy(ids_BT), torch.from_numpy(targets_BT), prefix)
