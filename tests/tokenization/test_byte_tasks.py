"""The tasks on bytes, the meter, the baselines, and which tokenizers are refused."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.methods.tokenization.byte_greedy import GreedyView
from isoflop.methods.tokenization.byte_healing import HealedView
from isoflop.methods.tokenization.byte_probs import ExactView
from isoflop.methods.tokenization.members import MembersStage, parse_members
from isoflop.methods.tokenization.probe import TokenizationProbe
from isoflop.models.byte_trees.segmentations import Segmentations
from isoflop.models.byte_trees.tree import NO_BYTE
from isoflop.models.byte_trees.vocabulary import (
    TEXT_BYTES,
    ByteSegmenter,
    ByteVocabulary,
    Segmenter,
    _byte_chars,
    completions,
)
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.byte_view import BYTE_VIEW, ByteText, TokenView
from isoflop.models.lm import LmModel
from isoflop.models.worlds.english import EnglishStage
from isoflop.tasks.base import TASKS
from isoflop.tasks.byte_completion import ByteBoundary, ByteCompletion
from isoflop.tasks.byte_meter import ByteMeter

REF = "tiny-lm/text-d64"
OPTIONS: dict[str, Any] = {"steps": 3, "batch": 2, "context": 64, "vocabulary": 400}
MEMBER = f"{REF} steps=3 batch=2 context=64 vocabulary=320"


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    """A cache whose English corpus is a few topics, so that nothing has to be collected."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    context = FolderContext(tmp_path_factory.mktemp("byte-stages"))
    context._values[EnglishStage.here().key] = {
        "train": {name: topics[name] for name in names[:8]},
        "test": {name: topics[name] for name in names[8:12]},
    }
    return context


@pytest.fixture(scope="module")
def lm(ctx: FolderContext) -> LmModel:
    family = family_of(REF)
    info = family.info(REF, OPTIONS)
    model = family.load(info, family.weights(info, (), 0), ctx)
    assert isinstance(model, LmModel)
    return model


@pytest.fixture(scope="module")
def probe() -> TokenizationProbe:
    return TokenizationProbe()


def test_a_job_with_a_member_runs_from_stages_to_costs(ctx: FolderContext, lm: LmModel) -> None:
    task = ByteCompletion(examples=4, scored=4, prompt=48, shard=3)
    method = build("byte-probs", {"members": MEMBER})
    task.check(lm.info)
    task.check_method(method, lm.info)
    family = family_of(REF)
    stage = method.prepare(lm.info, family.weights(lm.info, (), 0), 0)
    assert isinstance(stage, MembersStage)
    alone = task.measure(lm, ctx)
    with method.apply(lm, ctx.get(stage)):
        shards = list(task.evaluate(lm, ctx, seed=0))
        costs, own = task.measure(lm, ctx), method.footprint(lm, ctx)
    assert lm.occupant(BYTE_VIEW) is None
    assert sorted(np.concatenate([shard.ids for shard in shards])) == [0, 1, 2, 3]
    assert all(np.isfinite(shard.errors).all() for shard in shards)
    assert costs["flops"] > 1.5 * alone["flops"]
    assert costs["weight_bytes"] == alone["weight_bytes"] + own["method_bytes"]
    assert own["method_params"] == lm.info.n_params


@pytest.mark.parametrize("task", [ByteCompletion(examples=20), ByteBoundary(examples=20)])
def test_examples_depend_on_no_tokenizer(ctx: FolderContext, task: ByteCompletion | ByteBoundary) -> None:
    texts = task.texts(ctx)
    assert len(texts) == 20
    for text in texts:
        assert len(text.data) - text.first == task.scored
        assert text.first <= task.prompt
        before, after = chr(text.data[text.first - 1]), chr(text.data[text.first])
        assert before.isalpha()
        assert after.isalpha() if isinstance(task, ByteCompletion) else after.isspace()
    shorter = type(task)(examples=5).texts(ctx)
    assert texts[:5] == shorter


def test_tasks_refuse_what_they_cannot_score(lm: LmModel) -> None:
    with pytest.raises(Infeasible, match="prompt \\+ scored"):
        ByteCompletion(prompt=2000).check(lm.info)
    with pytest.raises(Infeasible, match="needs tokenizer"):
        TASKS.get("byte-completion")().check(family_of("tiny-lm/recall-d64").info("tiny-lm/recall-d64", {}))
    with pytest.raises(Infeasible, match="acts on the KV cache"):
        ByteCompletion().check_method(build("streaming-llm", {}), lm.info)


def test_healing_makes_the_next_token_start_with_the_last_ones_bytes(probe: TokenizationProbe) -> None:
    vocabulary = probe.segmentations.vocabulary
    data = b"so the weather"
    text = ByteText(data, 9)
    (healed_PS,) = HealedView().next_bytes(probe.model, probe.segmentations, [text])
    *_, last = vocabulary.encode(data[:9])
    start = vocabulary.bytes_of[last]
    nexts = {word[len(start)] for word in vocabulary.bytes_of.values() if word.startswith(start) and word != start}
    assert nexts  # otherwise healing has nothing to repair here
    assert np.exp(healed_PS).sum(1) == pytest.approx(1.0)
    plain_PS = TokenView().next_bytes(probe.model, probe.segmentations, [text])[0]
    assert np.abs(np.exp(healed_PS[0]) - np.exp(plain_PS[0])).max() > 1e-4


def test_greedy_is_the_token_view_of_every_prefix(probe: TokenizationProbe) -> None:
    data = b"so the weather"
    (greedy_PS,) = GreedyView().next_bytes(probe.model, probe.segmentations, [ByteText(data, 8)])
    for i, row_S in enumerate(greedy_PS):
        (token_PS,) = TokenView().next_bytes(probe.model, probe.segmentations, [ByteText(data[: 9 + i], 8 + i)])
        assert np.exp(row_S) == pytest.approx(np.exp(token_PS[0]), abs=1e-6)


def test_trees_cost_more_tokens_than_the_text_has(probe: TokenizationProbe) -> None:
    exact = ExactView()
    data = b"so the weather"
    exact.next_bytes(probe.model, probe.segmentations, [ByteText(data, 8)])
    assert exact.counts.symbols == len(data) - 8
    assert exact.counts.tokens > len(probe.segmentations.vocabulary.encode(data[:-1]))
    assert exact.counts.nodes >= exact.counts.tokens - exact.counts.context_tokens


def test_models_under_a_method_on_attention_are_refused(
    probe: TokenizationProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(probe.model._occupants, ATTENTION, object())
    with pytest.raises(Infeasible, match="KV cache or attention"):
        ExactView().next_bytes(probe.model, probe.segmentations, [ByteText(b"so the weather", 8)])


@given(st.lists(st.tuples(st.floats(0, 100), st.binary(min_size=1, max_size=9)), min_size=1, max_size=5))
def test_the_meter_gives_bits_over_bytes(parts: list[tuple[float, bytes]]) -> None:
    meter = ByteMeter(ByteSegmenter())
    for nats, scored in parts:
        meter.add(nats, scored)
    wanted = sum(nats for nats, _ in parts) / math.log(2) / sum(len(scored) for _, scored in parts)
    assert meter.total() == pytest.approx(wanted)
    assert meter.each() == pytest.approx([nats / math.log(2) / len(scored) for nats, scored in parts])


def test_the_meter_refuses_lossy_segmentations() -> None:
    class Lossy(Segmenter):
        """Loses the second byte."""

        def segment(self, data: bytes) -> list[tuple[int, int]]:
            return [(0, 1), (2, len(data))]

    with pytest.raises(ValueError, match="loses bytes"):
        ByteMeter(Lossy()).add(1.0, b"abc")
    with pytest.raises(ValueError, match="at least one byte"):
        ByteMeter().add(1.0, b"")


@given(st.text(min_size=1, max_size=12), st.integers(0, 3))
def test_segments_join_to_the_text_however_it_is_cut(text: str, less: int) -> None:
    vocabulary = PROBE.segmentations.vocabulary
    data = text.encode()[: max(1, len(text.encode()) - less)]
    assert vocabulary.lossless(data)
    assert all(completed.encode().startswith(data) for completed in completions(data))


PROBE = TokenizationProbe()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"type": "Unigram"}}, "of the type Unigram"),
        ({"model": {"byte_fallback": True}}, "SentencePiece"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "SentencePiece"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not work on bytes"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "puts a space before"),
        ({"normalizer": {"type": "Lowercase"}}, "rewrites the text"),
        ({"model": {"dropout": 0.1}}, "at random"),
        ({"model": {"vocab": {"a": 0}}}, "lacks 208 of the 209 bytes of texts"),
        ({"normalizer": {"type": "NFC"}}, ""),
    ],
)
def test_checkpoints_with_other_tokenizers_are_refused_at_plan(
    tmp_path: Path, probe: TokenizationProbe, change: dict[str, Any], words: str
) -> None:
    folder = _checkpoint(tmp_path, probe)
    stored = json.loads((folder / "tokenizer.json").read_text())
    for key, value in change.items():
        stored[key] = {**stored[key], **value} if key == "model" else value
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    info = family_of("hf:x").info(f"hf:{folder}", {})
    method, task = build("byte-probs", {}), ByteCompletion(prompt=48)
    if not words:
        method.check(info)
        task.check(info)
        return
    for refused in (method.check, task.check):
        with pytest.raises(Infeasible) as refusal:
            refused(info)
        assert words in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_bytes_of_texts_are_those_of_characters_that_have_been_assigned() -> None:
    """Newer tables of Unicode may assign more; the ranges that are left out have been empty or private ever since."""
    no_text = ("Cn", "Co", "Cs", "Cc")
    chars = (chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in no_text)
    assert frozenset("".join(["\t\n\r", *chars]).encode()) == TEXT_BYTES


SMOLLM2_LACKS = (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))


def test_bytes_that_no_text_has_may_be_missing(tmp_path: Path, probe: TokenizationProbe, ctx: FolderContext) -> None:
    """As 21 of SmolLM2's are; a text that has one of them after all is refused, and a byte of text is missed."""
    folder = _checkpoint(tmp_path, probe)
    stored = json.loads((folder / "tokenizer.json").read_text())
    chars = _byte_chars()

    def without(lacking: Iterable[int]) -> LmModel:
        gone = {chars[byte] for byte in lacking}
        vocab = {word: i for word, i in stored["model"]["vocab"].items() if word not in gone}
        (folder / "tokenizer.json").write_text(json.dumps({**stored, "model": {**stored["model"], "vocab": vocab}}))
        family = family_of("hf:x")
        info = family.info(f"hf:{folder}", {})
        build("byte-probs", {}).check(info)
        model = family.load(info, None, ctx)
        assert isinstance(model, LmModel)
        return model

    model = without(SMOLLM2_LACKS)
    segmentations = Segmentations(ByteVocabulary(model.tokenizer))
    (found_PS,) = ExactView().next_bytes(model, segmentations, [ByteText(b"so the weather", 8)])
    assert np.isneginf(found_PS[:, list(SMOLLM2_LACKS)]).all()
    assert np.allclose(np.exp(found_PS).sum(1), 1)
    with pytest.raises(UserError, match=r"no token for the byte 0x04, which stands at 3 in b'so .x04weather'; allowed"):
        ExactView().next_bytes(model, segmentations, [ByteText(b"so \x04weather", 8)])
    with pytest.raises(Infeasible, match="lacks 1 of the 209 bytes of texts in UTF-8"):
        without([*SMOLLM2_LACKS, ord("~")])


def test_a_checkpoint_gives_the_same_bytes(tmp_path: Path, probe: TokenizationProbe, ctx: FolderContext) -> None:
    family = family_of("hf:x")
    info = family.info(f"hf:{_checkpoint(tmp_path, probe)}", {})
    model = family.load(info, None, ctx)
    assert isinstance(model, LmModel)
    text = [ByteText(b"so the weather", 8)]
    (here_PS,) = ExactView().next_bytes(model, probe.segmentations, text)
    (there_PS,) = ExactView().next_bytes(probe.model, probe.segmentations, text)
    assert np.array_equal(here_PS, there_PS)
    assert here_PS.shape == (6, NO_BYTE + 1)


def _checkpoint(folder: Path, probe: TokenizationProbe) -> Path:
    from isoflop.models.lm import LmInfo

    info = probe.model.info
    assert isinstance(info, LmInfo)
    probe.model.module.save_pretrained(folder)
    probe.ctx.get(info.tokenizer).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def test_members_are_described_by_reference_and_options() -> None:
    first, second = parse_members(f"{MEMBER}; tiny-lm/text-d128", "test")
    assert dict(first.options)["vocabulary"] == 320
    assert second.ref == "tiny-lm/text-d128"
    assert parse_members("", "test") == []
