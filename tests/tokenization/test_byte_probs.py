"""Exact byte probabilities against enumeration of all token sequences."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from byte_cases import (
    GPT2,
    LLAMA3,
    TWO_LETTERS,
    BruteForce,
    double_model,
    possible,
    segmentations_of_letters,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.tokenization.byte_probs import ByteProbs, ExactView
from isoflop.methods.tokenization.members import Member, parse_members
from isoflop.methods.tokenization.probe import TokenizationProbe, untrained_reader
from isoflop.models.byte_trees.segmentations import Tail, folded
from isoflop.models.byte_trees.starts import boundary_start
from isoflop.models.byte_trees.tree import (
    EVERY,
    MASKED,
    MASSES,
    NO_BYTE,
    RENORMALISED,
    CoveringTree,
    log_likelihood,
)
from isoflop.models.hooks.byte_view import ByteText, TokenView

AB = segmentations_of_letters("ab", TWO_LETTERS)
MODEL = double_model(7)
SPACED = segmentations_of_letters("ab ", [*TWO_LETTERS, (" ", "a")], GPT2)
SPACED_MODEL = double_model(9)


@pytest.mark.parametrize("mass", [RENORMALISED, EVERY])
@pytest.mark.parametrize("text", [b"aab", b"bbaa", b"aabaab"])
def test_chain_rule_and_equality_with_enumeration(mass: str, text: bytes) -> None:
    brute = BruteForce(MODEL, AB.vocabulary, mass)
    (logs_PS,) = CoveringTree(MODEL, AB, mass).next_bytes([whole(text, AB.vocabulary)])
    for i, row_S in enumerate(np.exp(logs_PS)):
        here = brute.starts_with(text[:i])
        assert row_S.sum() == pytest.approx(1.0, abs=1e-10)
        for byte in b"ab":
            assert row_S[byte] * here == pytest.approx(brute.starts_with(text[:i] + bytes((byte,))), abs=1e-10)
        assert row_S[NO_BYTE] * here == pytest.approx(brute.is_text(text[:i]), abs=1e-10)
        together = sum(brute.starts_with(text[:i] + bytes((byte,))) for byte in b"ab") + brute.is_text(text[:i])
        assert together == pytest.approx(here, abs=1e-10)


def test_masking_without_renormalising_is_a_third_distribution() -> None:
    text = b"aaba"
    brute = BruteForce(MODEL, AB.vocabulary, MASKED)
    (masked_PS,) = CoveringTree(MODEL, AB, MASKED).next_bytes([whole(text, AB.vocabulary)])
    for i, row_S in enumerate(np.exp(masked_PS)):
        parts = [brute.starts_with(text[:i] + bytes((byte,))) for byte in b"ab"] + [brute.is_text(text[:i])]
        assert row_S[[*b"ab", NO_BYTE]] == pytest.approx(np.array(parts) / sum(parts), abs=1e-10)
    found = [CoveringTree(MODEL, AB, mass).next_bytes([whole(text, AB.vocabulary)])[0] for mass in MASSES]
    ends = [np.exp(logs_PS[1, NO_BYTE]) for logs_PS in found]
    assert len({round(float(end), 6) for end in ends}) == 3


def test_of_many_segmentations_one_is_canonical() -> None:
    words = set(AB.vocabulary.bytes_of.values())

    def ways(data: bytes) -> int:
        return 1 if not data else sum(ways(data[len(word) :]) for word in words if data.startswith(word))

    assert ways(b"aabaab") > 1
    sequences = [ids for ids in possible(AB, 6) if b"".join(AB.vocabulary.bytes_of[i] for i in ids) == b"aabaab"]
    assert sequences == [tuple(AB.vocabulary.encode(b"aabaab"))]


def test_product_over_bytes_is_that_over_canonical_tokens() -> None:
    text = b"aababaa"
    brute = BruteForce(MODEL, AB.vocabulary, RENORMALISED)  # no mass on other sequences
    (logs_PS,) = CoveringTree(MODEL, AB).next_bytes([whole(text + b"a", AB.vocabulary)])
    ids = tuple(AB.vocabulary.encode(text))
    tokens = np.prod([brute.next_token(ids[:i])[token] for i, token in enumerate(ids)])
    by_bytes = np.exp(log_likelihood(logs_PS, text + b"a")[:-1].sum() + logs_PS[-1, NO_BYTE])
    assert by_bytes == pytest.approx(tokens * brute.next_token(ids)[brute.end], rel=1e-10)


@settings(max_examples=10, deadline=None)
@given(st.text("ab ", min_size=4, max_size=14), st.integers(1, 10))
def test_incremental_covers_equal_covers_from_scratch(text: str, first: int) -> None:
    data = text.encode()
    first = min(first, len(data) - 1)
    (once_PS,) = CoveringTree(SPACED_MODEL, SPACED).next_bytes([boundary_start(SPACED, data, 0)])
    (later_PS,) = CoveringTree(SPACED_MODEL, SPACED).next_bytes([boundary_start(SPACED, data, first)])
    assert np.exp(once_PS[first:]) == pytest.approx(np.exp(later_PS), abs=1e-10)


def test_a_byte_vocabulary_returns_itself() -> None:
    segmentations = segmentations_of_letters("abc ", [], GPT2)
    model, data = double_model(5), b"ab c ab"
    brute = BruteForce(model, segmentations.vocabulary, EVERY)
    (logs_PS,) = CoveringTree(model, segmentations).next_bytes([whole(data, segmentations.vocabulary)])
    for i, row_S in enumerate(np.exp(logs_PS)):
        token_V = brute.next_token(tuple(segmentations.vocabulary.encode(data[:i])))
        by_byte = {word[0]: token_V[i] for i, word in segmentations.vocabulary.bytes_of.items()}
        assert {byte: row_S[byte] for byte in by_byte} == pytest.approx(by_byte, abs=1e-10)
        assert row_S[NO_BYTE] == pytest.approx(token_V[brute.end], abs=1e-10)


@pytest.mark.parametrize(
    ("merges", "pattern"),
    [
        (["a a", "_ a", "_ _", "_ aa", "l l", "1 1", "a l"], GPT2),
        (["' l", "l l", "_ _", "_ \n", "a a", "_ 1", "__ __"], GPT2),
        (["' l", "l l", "_ _", "_ \n", "a a", "1 1", "11 1", "_ a", "\n \n"], LLAMA3),
    ],
)
def test_possible_sequences_are_the_beginnings_of_tokenised_texts(merges: list[str], pattern: str) -> None:
    """Spaces and apostrophes make a pattern look ahead, so that prefixes of canonical sequences need not be canonical."""
    alphabet, longest = "a 'l1\n", 3
    pairs = [tuple(part.replace("_", " ") for part in merge.split(" ")) for merge in merges]
    segmentations = segmentations_of_letters(alphabet, pairs, pattern)  # type: ignore[arg-type]
    vocabulary = segmentations.vocabulary
    beginnings: set[tuple[int, ...]] = set()
    for length in range(1, longest + 3):
        for text in product(alphabet, repeat=length):
            ids = tuple(vocabulary.encode("".join(text).encode()))
            beginnings.update(ids[:k] for k in range(1, len(ids) + 1))
    short = {ids for ids in beginnings if sum(len(vocabulary.bytes_of[i]) for i in ids) <= longest}
    assert possible(segmentations, longest) == short


def test_merges_leave_a_sequence_exactly_when_they_leave_its_pairs() -> None:
    vocabulary = AB.vocabulary
    for ids in product(vocabulary.bytes_of, repeat=3):
        word = b"".join(vocabulary.bytes_of[i] for i in ids)
        pairs = all(vocabulary.joins(a)[vocabulary.rank[b]] for a, b in pairwise(ids))
        alone = bool(vocabulary.alone_W[vocabulary.rank[ids[0]]])
        assert (vocabulary.merged(word) == ids) == (pairs and alone)


def test_forms_keep_what_patterns_look_at() -> None:
    assert folded(b" Hello12, it's")[0] == b" Aaaa11, aa's"
    form, places = folded(b"abcdef gh")
    assert form == b"aaa aa"
    assert places[6] == 3
    assert 4 not in places


def test_a_text_ends_where_its_tokens_are_those_of_the_whole() -> None:
    segmentations = segmentations_of_letters("a ", [(" ", " ")], GPT2)
    text = b"a  a"  # cut before the last space when a word follows, behind it at the end of the text
    model = double_model(4)
    (logs_PS,) = CoveringTree(model, segmentations).next_bytes([whole(text, segmentations.vocabulary)])
    assert 0 < np.exp(logs_PS[3, NO_BYTE]) < 1
    assert segmentations.may_end(Tail(b"  ", (), (), segmentations.vocabulary.encode(b"  ")[0]))
    assert not segmentations.may_end(Tail(b"  ", (1,), (False,), segmentations.vocabulary.encode(b" ")[0]))
    assert not segmentations.may_end(Tail(b"\xc3", (), (), 0))


@pytest.fixture(scope="module")
def probe() -> TokenizationProbe:
    return TokenizationProbe()


def test_at_an_immovable_cut_the_bytes_are_the_models_own(probe: TokenizationProbe) -> None:
    text = ByteText(b"where is it's the", 13)
    (exact_PS,) = ExactView().next_bytes(probe.model, probe.segmentations, [text])
    (token_PS,) = TokenView().next_bytes(probe.model, probe.segmentations, [text])
    assert np.exp(exact_PS) == pytest.approx(np.exp(token_PS), abs=1e-7)
    inside = ByteText(text.data, 15)
    (exact_PS,), (token_PS,) = (
        view.next_bytes(probe.model, probe.segmentations, [inside]) for view in (ExactView(), TokenView())
    )
    assert np.abs(np.exp(exact_PS) - np.exp(token_PS)).max() > 1e-3


def test_a_prompt_may_end_inside_a_character(probe: TokenizationProbe) -> None:
    data = "a café the".encode()
    cut = data.index(b"\xa9")
    (logs_PS,) = ExactView().next_bytes(probe.model, probe.segmentations, [ByteText(data, cut)])
    allowed = np.flatnonzero(np.exp(logs_PS[0]) > 0)
    assert set(allowed) <= set(range(0x80, 0xC0))
    (before_PS,) = ExactView().next_bytes(probe.model, probe.segmentations, [ByteText(data, cut - 3)])
    assert np.exp(before_PS[3]) == pytest.approx(np.exp(logs_PS[0]), abs=1e-6)


def test_the_ensemble_is_the_mean_of_its_members(probe: TokenizationProbe) -> None:
    other = TokenizationProbe(vocabulary=300)
    texts = [ByteText(b"so the weather", 10), ByteText(b"or there", 4)]
    member = Member(untrained_reader(300, seed=1), other.segmentations)
    both = ByteProbs(members="tiny-lm/text-d64 vocabulary=300").view((member,))
    mixed = both.next_bytes(probe.model, probe.segmentations, texts)
    for i, text in enumerate(texts):
        a = ExactView().next_bytes(probe.model, probe.segmentations, [text])[0]
        b = ExactView().next_bytes(member.model, member.segmentations, [text])[0]
        assert np.exp(mixed[i]) == pytest.approx((np.exp(a) + np.exp(b)) / 2, abs=1e-6)
    assert both.members == (member.model,)
    assert both.counts.tokens == sum(both.counts.per_model)


def test_a_beam_bounds_what_is_followed(probe: TokenizationProbe) -> None:
    text = [ByteText(b"so the weather", 8)]
    wide = ExactView(EVERY, beam=8)
    (logs_PS,) = wide.next_bytes(probe.model, probe.segmentations, text)
    assert wide.counts.widest == 8
    assert np.exp(logs_PS).sum(1) == pytest.approx(1.0)


def test_temperature_flattens(probe: TokenizationProbe) -> None:
    text = [ByteText(b"so the weather", 8)]
    (warm_PS,) = ByteProbs(temperature=2.0).view(None).next_bytes(probe.model, probe.segmentations, text)
    (plain_PS,) = ByteProbs().view(None).next_bytes(probe.model, probe.segmentations, text)
    square_PS = np.exp(warm_PS) ** 2
    assert square_PS / square_PS.sum(1, keepdims=True) == pytest.approx(np.exp(plain_PS), abs=1e-9)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"members": "tiny-lm/text-d65"}, ["members", "text-d64"]),
        ({"members": "tiny-lm/text-d64 vocabulary=12"}, ["members", "vocabulary = 12"]),
        ({"members": "tiny-lm/text-d64 vocabulary"}, ["members", "name=value"]),
        ({"members": "tiny-lm/recall-d64"}, ["members", "needs a tokenizer"]),
        ({"members": "tiny-lm/text-d64"}, ["members", "itself"]),
    ],
)
def test_impossible_configurations_are_refused_at_plan(knobs: dict[str, str], words: list[str]) -> None:
    (info,) = parse_members("tiny-lm/text-d64", "test")
    with pytest.raises(Infeasible) as refusal:
        build("byte-probs", knobs).check(info)
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
