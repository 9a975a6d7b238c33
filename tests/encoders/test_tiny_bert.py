"""The review world, the tiny text classifiers that are trained on it, and their task."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.methods.weights.views import linear_views
from isoflop.models.family import family_of
from isoflop.models.text_classifier import TextClassifier, drawn
from isoflop.models.tiny.bert_training import LENGTH, SIZES, VOCABULARY
from isoflop.models.worlds import reviews as world
from isoflop.tasks.base import TASKS
from isoflop.tasks.text_classification import TextClassification
from isoflop.testing.model_probes import untrained

STRENGTH_OF = {word: strength for strength, words in world.ADJECTIVES.items() for word in words}
READ = {  # what a reader makes of a sentence; written down here once more, from the world's description
    r"the \w+ was (\w+)": 1,
    r"the \w+ was very (\w+)": 2,
    r"the \w+ was not (\w+)": -1,
    r"nobody found the \w+ (\w+)": -1,
    r"we had hoped for a (\w+) \w+": 0,
}


def stars_of(text: str) -> int:
    """A review's class, read from its text."""
    total = 0
    for sentence in text.rstrip(".").split(". "):
        (found,) = [(m, worth) for form, worth in READ.items() if (m := re.fullmatch(form, sentence))]
        total += found[1] * STRENGTH_OF[found[0][1]]
    return 0 if total <= -3 else 1 if total < 0 else 2 if total == 0 else 3 if total < 3 else 4


def test_labels_are_what_a_reader_finds() -> None:
    reviews = [world.review_number(number, "reader") for number in range(400)]
    assert [stars_of(review.text) for review in reviews] == [review.label for review in reviews]
    assert [review.label for review in reviews] == [number % 5 for number in range(400)]


def test_reviews_are_the_same_on_every_machine() -> None:
    texts = "\n".join(world.review_number(number, "machine").text for number in range(50))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "2fef3d137a60df64"
    assert world.review_number(7, "machine") != world.review_number(7, "other")


def test_sentences_are_drawn_as_often_as_their_forms() -> None:
    rng = np.random.default_rng(0)
    text = " ".join(review.text for review in drawn(rng, 1500))
    total = text.count(".")
    for form, share in ((" very ", 0.2), (" not ", 0.1), ("nobody", 0.1), ("hoped", 0.1)):
        assert text.count(form) / total == pytest.approx(
            share, abs=0.03
        )  # four standard errors of classes drawn evenly


def test_every_word_is_a_token_and_no_review_is_cut() -> None:
    model = untrained("tiny-bert/d32")
    assert isinstance(model, TextClassifier)
    longest = max((world.review_number(n, "long") for n in range(300)), key=lambda review: len(review.text.split()))
    most = max(len(world.TEXTS[form].replace(".", " .").split()) for form in world.FORMS) * world.SENTENCES[1] + 2
    assert len(longest.text.replace(".", " .").split()) + 2 <= most <= LENGTH
    batch = model.labelled([world.Review("the soup was very good.", 4), longest])
    words = model.tokenizer.convert_ids_to_tokens(batch.ids_BT[0])
    assert words[:8] == ["[CLS]", "the", "soup", "was", "very", "good", ".", "[SEP]"]
    assert set(words[8:]) == {"[PAD]"}
    assert batch.mask_BT[0].tolist() == [1] * 8 + [0] * (len(words) - 8)
    assert model.tokenizer.unk_token_id not in batch.ids_BT
    assert len(model.tokenizer) == VOCABULARY


def test_padding_changes_nothing() -> None:
    model = untrained("tiny-bert/d32")
    assert isinstance(model, TextClassifier)
    reviews = [world.review_number(number, "padding") for number in range(6)]
    together_BK = model.classify(model.labelled(reviews))
    alone_BK = torch.cat([model.classify(model.labelled([review])) for review in reviews])
    assert torch.allclose(together_BK, alone_BK, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_n_counts_the_blocks(size: str) -> None:
    """12 d² + 13 d a block: four matrices of attention and two of the MLP, with biases and two norms."""
    model = untrained(f"tiny-bert/{size}")
    width, layers = SIZES[size].width, SIZES[size].layers
    assert model.info.n_params == layers * (12 * width**2 + 13 * width)
    views = linear_views(model)
    assert len(views) == 6 * layers
    assert not [view.name for view in views if "pooler" in view.name or "classifier" in view.name]


def test_calibration_is_seeded_and_holds_no_test_review(encoder_ctx: FolderContext) -> None:
    model = untrained("tiny-bert/d32")
    assert isinstance(model, TextClassifier)
    first, again, other = (list(model.calibration(encoder_ctx, 40, seed)) for seed in (0, 0, 1))
    assert [len(batch.ids_BT) for batch in first] == [16, 16, 8]
    assert all(torch.equal(a.ids_BT, b.ids_BT) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].ids_BT[:, :8], other[0].ids_BT[:, :8])
    logits_BK, _ = model.supervised(first[0])
    assert logits_BK.shape == (16, 5)
    tested = {TextClassification().review(number).text for number in range(1000)}
    long = {review.text for review in drawn(np.random.default_rng(1), 500) if review.text.count(".") > 2}
    assert not tested & long  # reviews of two sentences may meet by chance


def test_other_tasks_and_texts_are_refused() -> None:
    task = TASKS.get("text-classification")()
    with pytest.raises(Infeasible, match=r"text-classification needs labelled-texts"):
        task.check(family_of("tiny-lm/text-d32").info("tiny-lm/text-d32", {}))
    info = family_of("tiny-bert/d32").info("tiny-bert/d32", {})
    task.check(info)
    text = family_of("tiny-lm/text-d32").info("tiny-lm/text-d32", {}).text  # type: ignore[attr-defined]
    with pytest.raises(Infeasible, match=r"calibrated on has no labels"):
        replace(info, text=text).check_loss("method x")  # type: ignore[call-arg]
    with pytest.raises(Infeasible, match="retrieval needs embeddings"):
        TASKS.get("retrieval")(corpus="x", queries="y").check(info)  # type: ignore[call-arg]


def test_a_short_training_learns_and_is_compressed(tiny_bert: TextClassifier, encoder_ctx: FolderContext) -> None:
    """Errors of 1000 reviews after these 300 steps, by seed: 0.57, 0.58, 0.58; chance is 0.80, and 0.025 is a standard error of 400."""
    task = TextClassification(examples=400, shard=400)
    (shard,) = task.evaluate(tiny_bert, encoder_ctx, 0)
    assert shard.errors.mean() < 0.68
    texts = [task.review(number) for number in shard.ids.tolist()[:5]]
    logits_BK = tiny_bert.classify(tiny_bert.labelled(texts)).double()
    wanted = -logits_BK.log_softmax(-1)[torch.arange(5), torch.tensor([review.label for review in texts])]
    assert shard.metrics["nll"][:5] == pytest.approx(wanted.numpy(), rel=1e-4)
    info = tiny_bert.info
    method = build("gptq", {"bits": 3, "n_calib": 32})
    stage = method.prepare(info, family_of(info.ref).weights(info, (), 0), 0)
    assert stage is not None
    with method.apply(tiny_bert, encoder_ctx.get(stage)):
        assert method.footprint(tiny_bert, encoder_ctx)["bits"] == pytest.approx(3 + 1)


def test_operations_of_a_review_are_those_of_its_tokens() -> None:
    """2·T·12d² for the matrices of a block, 2·2·T²·d for its attention, 2·(d² + 5d) for pooler and head."""
    model = untrained("tiny-bert/d32")
    task = TextClassification()
    assert isinstance(model, TextClassifier)
    tokens = [model.labelled([task.review(number)]).tokens for number in range(10)]
    d, layers = 32, 2
    wanted = [layers * (24 * t * d * d + 4 * t * t * d) + 2 * (d * d + 5 * d) for t in tokens]
    found = task.measure(model, FolderContext.temporary())
    assert found["flops"] == pytest.approx(np.mean(wanted))
    assert found["text_tokens"] == np.mean(tokens)
