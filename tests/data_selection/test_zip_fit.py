"""ZIP-FIT: alignments as the paper defines them, and its traps."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import zlib
from dataclasses import replace

import numpy as np
import pytest
from pool_cases import pool, target

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.data_selection.base import scored
from isoflop.methods.data_selection.compressors import COMPRESSORS, CompressedLength, ncd
from isoflop.methods.data_selection.probe import DataSelectionProbe
from isoflop.methods.data_selection.zip_fit import ZipFitScorer
from isoflop.models.worlds.text_pool import Document

TEXT = (gzip.open.__doc__ or "")[:600]
"""English prose, which repeats itself little."""


class Letters(CompressedLength):
    """C(x) = different letters of x: a compressor whose lengths can be counted by hand."""

    def __init__(self) -> None:
        super().__init__("gzip", 6)

    def __call__(self, text: str) -> int:
        return len(set(text))


def scores(documents: list[Document], examples: list[Document], scorer: ZipFitScorer | None = None) -> np.ndarray:
    """Of a scorer fitted to the examples."""
    return scored(scorer or ZipFitScorer(CompressedLength("gzip", 6)), documents, examples).scores_N


@pytest.mark.parametrize(
    ("x", "y", "distance"),
    [
        ("ab", "ab", 0.0),  # (2 - 2) / 2
        ("ab", "cd", 1.0),  # (4 - 2) / 2
        ("abc", "cd", 2 / 3),  # (4 - 2) / 3
        ("cd", "abc", 2 / 3),
        ("a", "abcd", 3 / 4),  # (4 - 1) / 4: what is contained is not near
    ],
)
def test_distances_by_hand(x: str, y: str, distance: float) -> None:
    assert ncd(Letters(), x, y) == pytest.approx(distance, abs=1e-15)


@pytest.mark.parametrize(
    ("aggregate", "align"),
    [
        ("mean", (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 0 + 0) / 7),
        ("top-5", (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5),
        ("max", 1.0),
        ("concatenated", 1 / 7),  # C(x) = 1, C(y_1 … y_7) = C(x y_1 … y_7) = 7
    ],
)
def test_alignments_by_hand(aggregate: str, align: float) -> None:
    """Of "a" with examples of 1 to 5 letters, "a" among them, and with two examples without it."""
    examples = [Document(text, "code", 1) for text in ("fg", "abcde", "abcd", "abc", "ab", "a", "g")]
    scorer = ZipFitScorer(Letters(), aggregate=aggregate)
    assert scores([Document("a", "code", 1)], examples, scorer) == pytest.approx([align], abs=1e-15)


@pytest.mark.parametrize("level", range(1, 10))
def test_align_of_a_text_with_itself_is_close_to_one_but_below_it(level: int) -> None:
    assert 0.9 < 1 - ncd(CompressedLength("gzip", level), TEXT, TEXT) < 1


def test_the_ranking_equals_a_brute_force_double_loop() -> None:
    documents, examples = pool(), target()

    def size(text: str) -> int:
        return len(gzip.compress(text.encode("utf-8"), compresslevel=6, mtime=0))

    expected = []
    for x in documents:
        total = 0.0
        for y in examples:
            a, b = size(x.text), size(y.text)
            total += 1 - (size(x.text + y.text) - min(a, b)) / max(a, b)
        expected.append(total / len(examples))
    found = scores(documents, examples)
    assert np.allclose(found, expected, rtol=0, atol=1e-12)
    assert (np.argsort(-found, kind="stable") == np.argsort(-np.round(expected, 12), kind="stable")).all()


@pytest.mark.parametrize("aggregate", ["mean", "max", "top-5", "concatenated"])
def test_scores_are_invariant_to_the_order_of_the_target(aggregate: str) -> None:
    documents, examples = pool(), target(7)
    shuffled = random.Random(0).sample(examples, len(examples))

    def scorer() -> ZipFitScorer:
        return ZipFitScorer(CompressedLength("gzip", 6), aggregate=aggregate)

    assert (scores(documents, examples, scorer()) == scores(documents, shuffled, scorer())).all()


@pytest.mark.parametrize("aggregate", ["max", "concatenated"])
@pytest.mark.parametrize("concatenation", ["document-first", "target-first", "symmetric"])
def test_an_exact_copy_of_a_target_example_comes_out_on_top(aggregate: str, concatenation: str) -> None:
    examples = target(1) if aggregate == "concatenated" else target()
    documents = [*pool(), examples[0]]
    scorer = ZipFitScorer(CompressedLength("gzip", 6), aggregate=aggregate, concatenation=concatenation)
    assert int(scores(documents, examples, scorer).argmax()) == len(documents) - 1


def test_an_exact_copy_of_the_only_example_comes_out_on_top_of_the_mean() -> None:
    examples = target(1)
    documents = [*pool(), examples[0]]
    assert int(scores(documents, examples).argmax()) == len(documents) - 1


def test_the_cache_changes_nothing() -> None:
    documents, examples = pool(), target()
    plain, cached = (ZipFitScorer(CompressedLength("gzip", 6, cache=cache)) for cache in (False, True))
    assert (scores(documents, examples, plain) == scores(documents, examples, cached)).all()
    assert cached.length.nbytes > plain.length.nbytes == 0


def test_lengths_are_those_of_the_standard_library() -> None:
    data = TEXT.encode()
    expected = {
        "gzip": len(gzip.compress(data, 9)),
        "zlib": len(zlib.compress(data, 9)),
        "bz2": len(bz2.compress(data, 9)),
        "lzma": len(lzma.compress(data, preset=9)),
    }
    assert {name: CompressedLength(name, 9)(TEXT) for name in COMPRESSORS} == expected
    assert CompressedLength("gzip", 6)("") == 20


@pytest.mark.parametrize("cache", [True, False])
def test_compressions_are_counted_as_they_are_done(cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lengths of N documents and n examples kept: N + n + N n, else three per pair."""
    done: list[int] = []
    compress = gzip.compress

    def counting(data: bytes, *given: int, **named: int) -> bytes:
        done.append(len(data))
        return compress(data, *given, **named)

    monkeypatch.setattr(gzip, "compress", counting)
    documents, examples = pool(), target()
    result = scored(ZipFitScorer(CompressedLength("gzip", 6, cache=cache)), documents, examples)
    pairs = len(documents) * len(examples)
    assert len(done) == (pairs + len(documents) + len(examples) if cache else 3 * pairs)
    assert result.work == {"compressions": len(done), "compressed_bytes": sum(done)}


def test_short_repetitive_texts_look_alike() -> None:
    """A trap that the definition has: 20 bytes of every length are the format's, not the text's."""
    assert 1 - ncd(CompressedLength("gzip", 6), "abc " * 50, "xyz " * 50) == pytest.approx(0.81, abs=0.01)


def test_a_long_document_pushes_the_example_out_of_reach() -> None:
    """DEFLATE sees 32 kB back; ``max_chars`` keeps a document and an example inside."""
    noise = "".join(random.Random(0).choices("0123456789abcdef", k=40_000))
    example = Document(TEXT, "code", 1)
    near, far = (Document(TEXT + noise[:size], "code", 1) for size in (20_000, 40_000))

    def gain(document: Document) -> float:
        """Bytes that the example saves beside the document."""
        length = CompressedLength("gzip", 6)
        return length(document.text) + length(example.text) - length(document.text + example.text)

    assert gain(near) > 0.9 * CompressedLength("gzip", 6)(TEXT)
    assert gain(far) < 0.3 * CompressedLength("gzip", 6)(TEXT)
    cut = ZipFitScorer(CompressedLength("gzip", 6), max_chars=10_000)
    assert np.ptp(scores([near, far], [example], cut)) == 0


def test_the_distance_is_not_symmetric() -> None:
    length = CompressedLength("gzip", 6)
    pairs = [(a.text, b.text) for a in pool(4) for b in target(4)]
    assert any(ncd(length, x, y) != ncd(length, y, x) for x, y in pairs)


def test_symmetric_is_the_mean_of_both_orders() -> None:
    documents, examples = pool(6), target(3)
    found = {
        name: scores(documents, examples, ZipFitScorer(CompressedLength("gzip", 6), concatenation=name))
        for name in ("document-first", "target-first", "symmetric")
    }
    assert np.allclose(found["symmetric"], (found["document-first"] + found["target-first"]) / 2)


def test_texts_are_cut_to_the_same_length() -> None:
    documents, examples = pool(), target()
    cut = [replace(d, text=d.text[:100]) for d in documents], [replace(d, text=d.text[:100]) for d in examples]
    limited = ZipFitScorer(CompressedLength("gzip", 6), max_chars=100)
    assert (scores(documents, examples, limited) == scores(*cut)).all()


@pytest.mark.parametrize("compressor", ["gzip", "zlib", "bz2"])
def test_level_zero_of_a_compressor_that_stores_is_refused(compressor: str) -> None:
    info = DataSelectionProbe().model.info
    with pytest.raises(Infeasible, match=rf"level = 0 of {compressor} stores .* allowed: 1 … 9"):
        build("zip-fit", {"compressor": compressor, "level": 0}).check(info)
    build("zip-fit", {"compressor": "lzma", "level": 0}).check(info)


def test_more_target_examples_than_there_are_is_refused() -> None:
    with pytest.raises(Infeasible, match=r"n_target = 200 exceeds the 50 target examples; allowed: 1 … 50"):
        build("zip-fit", {"n_target": 200}).check(DataSelectionProbe().model.info)


def test_stored_data_would_make_scores_a_function_of_length() -> None:
    """Why level 0 is refused: C(x) = len(x) + c, so that lengths decide and texts do not."""
    documents, examples = pool(), target()

    class Stored(CompressedLength):
        def __call__(self, text: str) -> int:
            return len(gzip.compress(text.encode(), 0, mtime=0))

    for characters in (60, 100):
        cut = [replace(d, text=d.text[:characters]) for d in documents]
        assert len(set(scores(cut, examples, ZipFitScorer(Stored("gzip", 1))))) == 1
        assert len(set(scores(cut, examples))) > 10


def test_the_domain_of_the_target_is_found(corpus: dict[str, dict[str, str]]) -> None:
    """Real text of one length: documents of the target's domain score above others far more often than by chance."""
    documents = [Document(text, name.split(" ")[1], 1) for name, text in sorted(corpus["pool"].items())]
    for domain, least in (("code", 0.75), ("prose", 0.65)):
        examples = [Document(text, domain, 1) for _, text in sorted(corpus[f"target-{domain}"].items())]
        found = scores(documents, examples)
        own = np.array([document.domain == domain for document in documents])
        above = (found[own][:, None] > found[~own][None]).mean() + (found[own][:, None] == found[~own][None]).mean() / 2
        assert above > least, f"{domain}: {above:.2f}"
