"""The conformance suite's model for methods on the tokenizer's side: an untrained decoder with a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.core.knobs import KnobValue
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method, build
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.methods.tokenization.base import TokenizationMethod
from isoflop.methods.tokenization.byte_probs import ByteProbs
from isoflop.methods.tokenization.members import Member, parse_members
from isoflop.methods.untrained import untrained_llama
from isoflop.models.byte_trees.segmentations import Segmentations
from isoflop.models.byte_trees.tree import EVERY
from isoflop.models.counting import flops_of
from isoflop.models.hooks.byte_view import BYTE_VIEW, ByteText, SegmentationsStage, TokenView
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.lm import LmInfo, LmModel
from isoflop.models.worlds.lm_text import TokenizerSource, read_tokenizer

TEXT = "it's the other weather; whether they're there, or where the others were, it's the same thing then"
PROMPTS = (b"where is it's", b"\xc3\xa9 they're", b"so the weat", b"or t", b"a caf\xc3", b"who is  ")
CONTINUATIONS = (b" other", b" there", b"her, o", b"here's", b"\xa9 them", b"where ")
ALIGNED = (0, 1)
"""Prompts that end where every continuation cuts."""
INSIDE = 2
"""A prompt that ends inside a word."""


@dataclass(frozen=True)
class ProbeTokenizer(TokenizerSource):
    """A byte-level BPE tokenizer trained on one sentence."""

    kind: ClassVar[str] = "probe-tokenizer"

    vocabulary: int

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train and save."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([TEXT] * 4, trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)

    def load(self, ctx: StageContext, folder: Path) -> Any:
        """The tokenizer."""
        return read_tokenizer(folder)


def untrained_reader(vocabulary: int, seed: int = 0) -> LmModel:
    """A Llama of width 32 with weights large enough to prefer some tokens."""
    module, n_params, geometry = untrained_llama(
        vocabulary, width=32, mlp=48, layers=2, heads=2, kv_heads=1, positions=128, spread=0.3, seed=seed
    )
    info = LmInfo(
        ref="probe/bytes",
        family="probe",
        version="1",
        n_params=n_params,
        hooks=frozenset({MATRICES, BYTE_VIEW}),
        offers=frozenset({"tokenizer"}),
        geometry=geometry,
        text=None,
        tokenizer=ProbeTokenizer(vocabulary),
    )  # fmt: skip
    return LmModel(info, module)


class TokenizationProbe(Probe):
    """Probabilities of bytes behind prompts that end at a cut, inside a word, inside a character, and after spaces.

    The cost is FLOPs of scoring one of them.
    """

    def __init__(self, vocabulary: int = 290) -> None:
        self.model: LmModel = untrained_reader(vocabulary)
        self.ctx = FolderContext.temporary()
        self.examples = len(PROMPTS)
        self.exact = False
        self.segmentations = self._segmentations(vocabulary)
        self._members: dict[int, Member] = {}
        self._texts = [ByteText(a + b, len(a)) for a, b in zip(PROMPTS, CONTINUATIONS, strict=True)]

    def prepared(self, method: Method, seed: int) -> Any:
        """For members, untrained models with as many tokens as they would have."""
        if not isinstance(method, ByteProbs):
            return None
        infos = parse_members(method.members, method.name)
        return tuple(self._member(int(info.geometry["vocab_size"])) for info in infos)

    def settings(self, knob: str) -> Sequence[Mapping[str, KnobValue]]:
        """Members are named in free text; a beam bounds the sum over all segmentations."""
        if knob == "beam":
            return [{"mass": EVERY, "beam": beam} for beam in (1, 4)]
        return ({}, {"members": "tiny-lm/text-d64 vocabulary=300"}) if knob == "members" else ()

    def untouched(self, method: Method) -> Sequence[int]:
        """Prompts that end at a cut, for methods that are exact."""
        return ALIGNED if isinstance(method, TokenizationMethod) and method.exact_at_cuts else ()

    def verify(self, method: Method, prepared: Any) -> None:
        """Probabilities of the next byte, and of no byte, sum to one at every position."""
        total_RP = self.outputs(range(self.examples)).view(self.examples, -1, 257).sum(-1)
        assert bool(((total_RP - 1).abs() < 1e-9).all()), f"{method}: byte probabilities sum to {total_RP.flatten()}"
        view = self.model.occupant(BYTE_VIEW) or TokenView()
        for text in self._texts:  # the last byte comes after everything that is predicted
            other = ByteText(text.data[:-1] + (b"q" if text.data[-1:] != b"q" else b"z"), text.first)
            (seen,), (changed,) = (view.next_bytes(self.model, self.segmentations, [t]) for t in (text, other))
            assert np.allclose(np.exp(seen), np.exp(changed), atol=1e-6), f"{method}: it looks at the byte it predicts"

    def absolute(self) -> Sequence[AbsoluteCost]:
        """Cutting the text anew for each of 6 bytes: 6 rows of N tokens, the most of them, in one pass.

        2 layers of width 32 with keys of 16 and an MLP of 48 take 2·(2·32² + 2·32·16 + 3·32·48) FLOPs a token in matrices and
        4·N²·32 a row in attention; the head 2·32·W at the last token of a row. Padding is computed, and not counted as tokens.
        """
        text = self._texts[INSIDE]
        lengths = [
            len(self.segmentations.vocabulary.encode(text.data[:end])) for end in range(text.first, len(text.data))
        ]
        most, rows = max(lengths), len(lengths)
        matrices = 2 * rows * most * 2 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 48)
        attention, head = 2 * rows * 4 * most**2 * 32, rows * 2 * 32 * self.model.info.geometry["vocab_size"]
        method = build("byte-greedy", {})
        return (
            AbsoluteCost(method, "cost", matrices + attention + head),
            AbsoluteCost(method, "tokens_per_byte", sum(lengths) / rows),
        )

    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Probabilities of all symbols at the scored positions, (B, positions · 257)."""
        view = self.model.occupant(BYTE_VIEW) or TokenView()
        logs = view.next_bytes(self.model, self.segmentations, [self._texts[row] for row in rows])
        return torch.from_numpy(np.exp(np.stack(logs))).flatten(1)

    def cost(self) -> float:
        """FLOPs of the example inside a word."""
        return float(flops_of(lambda: self.outputs([INSIDE]))[0])

    def _segmentations(self, vocabulary: int) -> Segmentations:
        found: Segmentations = self.ctx.get(SegmentationsStage(ProbeTokenizer(vocabulary)))
        return found

    def _member(self, vocabulary: int) -> Member:
        if vocabulary not in self._members:
            reader = untrained_reader(vocabulary, seed=1)
            self._members[vocabulary] = Member(reader, self._segmentations(vocabulary))
        return self._members[vocabulary]
