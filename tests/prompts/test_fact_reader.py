"""The reader of the fact world: tokenizer, lessons, stage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from isoflop.core.folder_context import FolderContext
from isoflop.methods.prompts.probe import untrained_reader
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.prompt_text import PROMPT_TEXT, joined, token_ids
from isoflop.models.lm import NOT_SCORED, LmInfo, LmModel
from isoflop.models.tiny.fact_reader import (
    WORD_ID,
    WORDS,
    FactLessons,
    FactRecipe,
    WordTokenizer,
    context_words,
    ids_of,
    padded,
    question_row,
    split_words,
    thinned,
)
from isoflop.models.worlds import fact_world as world

REF = "tiny-lm/facts-d64"
FEW = {"steps": 4, "batch": 2, "length": 24}


def test_lessons_and_tokenizer_cut_the_same_words(prompt_ctx: FolderContext) -> None:
    tokenizer = prompt_ctx.get(WordTokenizer())
    rng = np.random.default_rng(0)
    for _ in range(20):
        text = " ".join(s.text for s in world.draw_sentences(rng, 4, 6))
        ids = token_ids(tokenizer, text)
        assert ids == ids_of(split_words(text))
        assert WORD_ID["[UNK]"] not in ids
    assert token_ids(tokenizer, "context: \nquestion: red") == ids_of(["context", ":", "question", ":", "red"])
    assert token_ids(tokenizer, "gibberish") == [WORD_ID["[UNK]"]]
    assert len(tokenizer) == len(WORDS) == len(set(WORDS))


def test_every_question_row_asks_what_its_context_holds() -> None:
    rng, recipe = np.random.default_rng(0), FactRecipe()
    for whole in (0.0, 1.0):
        for _ in range(30):
            ids, targets = question_row(rng, recipe, 8, whole)
            assert len(ids) == len(targets)
            words = [WORDS[i] for i in ids]
            first = words.index("question") if "question" in words else len(words)
            context = " ".join(words[:first])
            for place, target in enumerate(targets):
                if target == NOT_SCORED:
                    continue
                attribute, entity = words[place - 3], words[place - 1]
                assert words[place] == "is"
                assert ids[place + 1] == target
                assert entity in context
                assert WORDS[target] in context
                assert WORDS[target] in world.VALUES[attribute]
                if whole:
                    assert f"the {attribute} of {entity} is {WORDS[target]} ." in context


def test_thinned_contexts_are_subsequences_and_of_every_density() -> None:
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(200):
        sentences = world.draw_sentences(rng, 4, 4)
        words, facts = thinned(rng, sentences)
        whole = iter(context_words(sentences))
        assert all(word in whole for word in words)
        shares.append(len(words) / len(context_words(sentences)))
        stated = [s.fact for s in sentences]
        assert all(fact in stated for fact in facts)
    assert min(shares) < 0.35
    assert max(shares) > 0.95


def test_lessons_get_harder_as_the_loss_falls() -> None:
    lessons = FactLessons(FactRecipe(steps=14, batch=2, length=24), 0)
    lengths = []
    for batch in lessons:
        lengths.append(batch.ids_BT.shape[1])
        assert (batch.targets_BT != NOT_SCORED).any()
        lessons.learned(0.01)
    assert lessons.level == 8
    assert lengths[0] == 24
    assert max(lengths[5:]) > 60
    stuck = FactLessons(FactRecipe(steps=3, batch=2, length=24), 0)
    for batch in stuck:
        assert batch.ids_BT.shape == (4, 24)
        stuck.learned(2.0)
    assert stuck.level == 0


def test_what_fills_the_end_of_a_row_changes_nothing_scored(prompt_ctx: FolderContext) -> None:
    module = untrained_reader(prompt_ctx).module
    rng, recipe = np.random.default_rng(0), FactRecipe()
    short, long = question_row(rng, recipe, 2, 1.0), question_row(rng, recipe, 8, 1.0)
    alone, together = padded([short]), padded([short, long])
    with torch.no_grad():
        scored = [module(batch.ids_BT).logits[0][batch.targets_BT[0] != NOT_SCORED] for batch in (alone, together)]
    assert torch.allclose(*scored, atol=1e-5)


def test_a_member_trains_loads_and_describes_itself(prompt_ctx: FolderContext) -> None:
    family = family_of(REF)
    info = family.info(REF, FEW)
    assert isinstance(info, LmInfo)
    assert {PROMPT_TEXT, ATTENTION, MATRICES} <= info.hooks
    assert "tokenizer" in info.offers
    model = family.load(info, family.weights(info, (), 0), prompt_ctx)
    assert isinstance(model, LmModel)
    assert sum(p.numel() for p in model.module.model.layers.parameters()) == info.n_params
    batch = next(model.calibration(prompt_ctx, 3, 0))
    assert batch.ids_BT.shape == (3, 128)
    assert batch.ids_BT.max() < len(WORDS)
    assert token_ids(model.tokenizer, "red.") == [WORD_ID["red"], WORD_ID["."]]
    assert family.info(REF, FEW | {"facts": 9}).version != info.version
    assert family.canonical_options(REF, {"facts": 8, "steps": 3}) == {"steps": 3}


def test_documents_share_the_sentences_out_in_order() -> None:
    one, four = (world.question_number(3, 5, 6, documents, "x") for documents in (1, 4))
    assert len(one.documents) == 1
    assert [d.id for d in four.documents] == ["d0", "d1", "d2", "d3"]
    assert joined(four.documents).count(".") == joined(one.documents).count(".") == 11
    assert replace(one, evidence=("", 0, 0)) == replace(world.question_number(3, 5, 6, 1, "x"), evidence=("", 0, 0))
    with pytest.raises(ValueError, match="exceed"):
        world.draw_sentences(np.random.default_rng(0), 1000, 0)
