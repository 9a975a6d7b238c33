"""The task prompt-qa: questions, gate, scoring, costs; baselines; other readers; compositions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prompt_cases import DOCUMENTS, RATES, is_subsequence, mean_error, shortened, task_of, words

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import METHODS, build
from isoflop.methods.prompts.base import PromptMethod
from isoflop.methods.prompts.classifier import ClassifierStage, TokenClassifier
from isoflop.methods.prompts.selective_context import self_information
from isoflop.methods.prompts.units import words_of
from isoflop.models.counting import flops_of
from isoflop.models.family import family_of
from isoflop.models.hooks.prompt_text import PROMPT_TEXT, joined, prompt_of
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel
from isoflop.models.prompting import alike, answer_batch, tokenised
from isoflop.models.training.taught import one_per_hook
from isoflop.models.worlds import fact_world as world
from isoflop.tasks.prompt_qa import ReaderGate, answers, evidence_kept, prompts_of

FEW: dict[str, Any] = {"examples": 6, "shard": 4, "gate": 0.0}


# --- questions ------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_by_its_evidence_and_by_nothing_else() -> None:
    task = task_of()
    for number in range(40):
        question = task.question(number)
        assert question == task_of(examples=3).question(number)
        name, start, end = question.evidence
        text = next(document.text for document in question.documents if document.id == name)
        assert text[start:end] == f"{question.query} {question.answer}."
        assert joined(question.documents).count(question.query) == 1
    assert task.question(0) != task.question(1)


def test_neither_entity_nor_attribute_alone_names_the_fact() -> None:
    shared = [0, 0]
    for number in range(20):
        question = task_of().question(number)
        attribute, entity = question.query.split()[1], question.query.split()[3]
        text = joined(question.documents)
        shared[0] += text.count(f"of {entity} is") > 1
        shared[1] += text.count(f"the {attribute} of") > 1
    assert min(shared) > 10


def test_the_documents_must_fit_into_the_reader(reader: LmModel) -> None:
    with pytest.raises(Infeasible, match="facts = 32 and filler = 20"):
        task_of(facts=32, filler=20).check(reader.info)
    bare = replace(reader.info, hooks=frozenset())
    with pytest.raises(Infeasible, match="needs prompt_text"):
        task_of().check(bare)


# --- the gate -------------------------------------------------------------------------------------------------------


def test_a_reader_that_cannot_answer_with_whole_documents_fails_in_one_clear_line(
    reader: LmModel, prompt_ctx: FolderContext
) -> None:
    with pytest.raises(ReaderGate, match=r"probe/reader answers .* less than gate = 0\.95") as caught:
        mean_error(reader, prompt_ctx, build("prompt-random", {}), examples=8)
    assert "\n" not in str(caught.value)


def test_the_gate_looks_at_the_reader_not_at_the_compressor(
    reader: LmModel, prompt_ctx: FolderContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are made right wherever the whole context is shown; the compressed ones stay wrong."""
    whole = {joined(task_of().question(n).documents) for n in range(8)}
    real = answers

    def scored(lm: LmModel, prompts: Any, noted: Any = None) -> tuple[np.ndarray, np.ndarray]:
        nll_B, _ = real(lm, prompts, noted)
        texts = [lm.tokenizer.decode(prompt.context) for prompt in prompts]
        full = {lm.tokenizer.decode(lm.tokenizer(prompt_of(text, "")[0])["input_ids"]) for text in whole}
        return nll_B, np.array([float(text not in full) for text in texts])

    monkeypatch.setattr("isoflop.tasks.prompt_qa.answers", scored)
    assert mean_error(reader, prompt_ctx, build("no-context", {}), examples=8) == 1.0
    assert mean_error(reader, prompt_ctx, build("full-context", {}), examples=8) == 0.0


# --- scoring --------------------------------------------------------------------------------------------------------


def test_a_batch_padded_on_the_left_scores_as_single_prompts_do(reader: LmModel) -> None:
    questions = [task_of().question(n) for n in range(5)]
    contexts = [joined(q.documents)[: 80 * n] for n, q in enumerate(questions)]
    prompts = prompts_of(reader, questions, contexts)
    together, _ = answers(reader, prompts)
    alone = np.concatenate([answers(reader, [prompt])[0] for prompt in prompts])
    assert np.allclose(together, alone, atol=1e-5)


def test_an_answer_is_right_exactly_where_greedy_decoding_gives_it(reader: LmModel) -> None:
    """Answers of several tokens, as readers with other tokenizers have them."""
    question = task_of().question(0)
    prompt = tokenised(reader.tokenizer, joined(question.documents), question.query, "red")
    ids = torch.tensor([[*prompt.context, *prompt.question]])
    greedy = tuple(reader.greedy(ids, 3)[0].tolist())
    right = replace(prompt, answer=greedy)
    wrong = replace(prompt, answer=(*greedy[:2], (greedy[2] + 1) % 100))
    assert answers(reader, [right])[1].tolist() == [0.0]
    assert answers(reader, [wrong])[1].tolist() == [1.0]


def test_batches_hold_prompts_with_equal_tails_and_no_more_than_their_room(reader: LmModel) -> None:
    question = task_of().question(0)
    prompts = [tokenised(reader.tokenizer, "otter " * n, question.query + " red" * (n % 2), "red") for n in range(12)]
    groups = list(alike(prompts, 64))
    assert sorted(n for group in groups for n in group) == list(range(12))
    for group in groups:
        batch = answer_batch([prompts[n] for n in group])
        assert batch.ids_BT.numel() <= 64 or len(group) == 1
        assert batch.prefix == batch.ids_BT.shape[1] - len(prompts[group[0]].question)
    with pytest.raises(ValueError, match="one length"):
        answer_batch(prompts[:2])


def test_evidence_is_counted_in_characters_of_the_answering_sentence(reader: LmModel) -> None:
    question = task_of().question(0)
    for name, expected in (("full-context", 1.0), ("no-context", 0.0)):
        with build(name, {}).apply(reader, None):
            assert reader.occupant(PROMPT_TEXT) is not None
            assert (
                evidence_kept(question, reader.occupant(PROMPT_TEXT).compress(question.query, question.documents))
                == expected
            )


# --- every method of the family ---------------------------------------------------------------------------------------


def family_cases() -> list[tuple[str, dict[str, Any]]]:
    cases: list[tuple[str, dict[str, Any]]] = [("full-context", {}), ("no-context", {})]
    for name in ("prompt-random", "prompt-truncate", "selective-context", "llmlingua2"):
        cases += [(name, {"rate": rate}) for rate in (0.1, 0.5, 1.0)]
    return [*cases, ("prompt-truncate", {"side": "tail"}), ("selective-context", {"unit": "sentence"})]


@pytest.mark.parametrize(("name", "knobs"), family_cases(), ids=str)
def test_text_spans_and_counts_agree(
    name: str, knobs: dict[str, Any], reader: LmModel, classifier: TokenClassifier
) -> None:
    prepared = classifier if name == "llmlingua2" else None
    shown = shortened(reader, name, knobs, prepared)
    whole = words(joined(DOCUMENTS))
    assert is_subsequence(words(shown.text), whole)
    texts = {document.id: document.text for document in DOCUMENTS}
    pieces = [texts[document][start:end] for document, start, end in shown.kept or ()]
    assert [w for piece in pieces for w in words(piece)] == words(shown.text)
    if knobs.get("rate") == 1.0 or name == "full-context":
        assert shown.text == joined(DOCUMENTS)


@pytest.mark.parametrize("name", ["prompt-random", "prompt-truncate", "selective-context"])
def test_baselines_are_nested_and_within_their_budget(name: str, reader: LmModel) -> None:
    total = len(words(joined(DOCUMENTS)))
    kept = [set(shortened(reader, name, {"rate": rate}).kept or ()) for rate in (*RATES, 1.0)]
    assert all(few <= many for few, many in itertools.pairwise(kept))
    for rate, spans in zip(RATES, kept, strict=False):
        assert len(spans) <= rate * total + 1
        assert len(spans) >= rate * total - 2


def test_truncation_keeps_one_end(reader: LmModel) -> None:
    whole = words(joined(DOCUMENTS))
    head, tail = (
        words(shortened(reader, "prompt-truncate", {"rate": 0.25, "side": side}).text) for side in ("head", "tail")
    )
    assert head == whole[: len(head)]
    assert tail == whole[-len(tail) :]
    assert len(head) == len(whole) // 4


def test_random_words_depend_on_the_documents_alone(reader: LmModel) -> None:
    texts = {shortened(reader, "prompt-random", {"rate": 0.3}, query=query).text for query in ("a", "b")}
    assert len(texts) == 1


def test_every_method_of_the_family_is_agnostic_or_says_that_it_is_not() -> None:
    family = [METHODS.get(name) for name in METHODS if METHODS.get(name).family == "prompts"]
    assert len(family) >= 6
    assert not any(cls.query_aware for cls in family if issubclass(cls, PromptMethod))


def test_self_information_is_that_of_the_reader(reader: LmModel) -> None:
    text = prompt_of(joined(DOCUMENTS), "")[0]
    bits_T, ends = self_information(reader, text)
    ids = reader.tokenizer(text)["input_ids"]
    for t in (1, 7, len(ids) - 1):
        before = torch.tensor([ids[:t]])
        logits = reader.logits(LmBatch(before, torch.full_like(before, NOT_SCORED)))[0, -1]
        assert bits_T[t] == pytest.approx(-float(logits.log_softmax(-1)[ids[t]]) / np.log(2), rel=1e-4)
    assert bits_T[0] == 0
    assert ends[-1] == len(text)


def test_self_information_of_long_texts_is_read_in_windows(reader: LmModel) -> None:
    text = "the otter waited near the pale road. " * 60
    bits_T, _ = self_information(reader, text)
    assert len(bits_T) == 480 > reader.info.geometry["positions"]
    short = LmModel(replace(reader.info, geometry={**reader.info.geometry, "positions": 1024}), reader.module)
    short._tokenizer = reader._tokenizer
    whole_T, _ = self_information(short, "the otter waited near the pale road. " * 30)
    assert np.allclose(bits_T[:240], whole_T[:240], atol=1e-4)
    assert (bits_T[1:] > 0).all()


def test_selective_context_keeps_the_most_surprising_words(reader: LmModel) -> None:
    text = DOCUMENTS[0].text
    method = build("selective-context", {"rate": 0.25})
    with method.apply(reader, None):
        assert reader.occupant(PROMPT_TEXT) is not None
        shown = reader.occupant(PROMPT_TEXT).compress("", DOCUMENTS[:1])
    heading = prompt_of(text, "")[0]
    bits_T, _ = self_information(reader, heading)
    own = bits_T[-len(words_of(text)) :]
    expected = [w for w, b in zip(words(text), own, strict=True) if b >= np.percentile(own, 75)]
    assert words(shown.text) == expected


# --- costs ------------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_prompt_shown_and_of_the_compressor(
    reader: LmModel, prompt_ctx: FolderContext, classifier: TokenClassifier
) -> None:
    task = task_of(**FEW)
    bare = task.measure(reader, prompt_ctx)
    found: dict[str, dict[str, float]] = {}
    for name in ("full-context", "prompt-random", "selective-context", "llmlingua2"):
        prepared = classifier if name == "llmlingua2" else None
        method = build(name, {} if name == "full-context" else {"rate": 0.33})
        with method.apply(reader, prepared):
            list(task.evaluate(reader, prompt_ctx, 0))
            measured, own = task.measure(reader, prompt_ctx), method.footprint(reader, prompt_ctx)
        assert not measured.keys() & own.keys()
        assert own["ratio"] == pytest.approx(bare["text_tokens"] / measured["text_tokens"])
        assert measured["flops"] == measured["flops_llm"] + measured["flops_method"]
        assert measured["kv_bytes"] == pytest.approx(reader.dense_cache_bytes(1) * measured["text_tokens"], rel=0.1)
        found[name] = {**measured, **own}
    assert found["full-context"]["flops_llm"] == bare["flops_llm"]
    assert found["full-context"]["flops_method"] == found["prompt-random"]["flops_method"] == 0
    assert found["prompt-random"]["flops_llm"] < 0.6 * bare["flops_llm"]
    lingua = found["llmlingua2"]
    assert lingua["flops_method"] > 0
    assert lingua["compressor_tokens"] > bare["text_tokens"]
    assert lingua["method_params"] == sum(p.numel() for p in classifier.module.parameters())
    assert lingua["method_bytes"] >= 2 * lingua["method_params"]
    assert lingua["weight_bytes"] == pytest.approx(bare["weight_bytes"] + lingua["method_bytes"])
    # the reader itself reads the whole context for its surprisal
    assert 0.7 * bare["flops_llm"] < found["selective-context"]["flops_method"] <= bare["flops_llm"]


def test_the_compressors_flops_are_those_of_its_forward_pass(reader: LmModel, classifier: TokenClassifier) -> None:
    question = task_of().question(0)
    chunks = [chunk for document in question.documents for chunk in classifier.chunks(document.text)]
    expected, _ = flops_of(lambda: classifier.probabilities(chunks))
    with build("llmlingua2", {}).apply(reader, classifier):
        compressor = reader.occupant(PROMPT_TEXT)
        assert compressor is not None
        counted, _ = flops_of(lambda: compressor.fresh(question.query, question.documents))
    assert counted == expected > 0


def test_asking_twice_compresses_and_counts_once(reader: LmModel) -> None:
    method = build("prompt-random", {})
    assert isinstance(method, PromptMethod)
    with method.apply(reader, None):
        compressor = method.compressor(reader)
        first = compressor.compress("q", DOCUMENTS)
        report = compressor.report()
        assert compressor.compress("q", DOCUMENTS) is first
        assert compressor.report() == report


# --- other readers, other methods -------------------------------------------------------------------------------------


def test_a_checkpoint_with_a_tokenizer_reads_through_the_same_hook(
    reader: LmModel, prompt_ctx: FolderContext, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    reader.module.save_pretrained(folder)
    reader.tokenizer.save_pretrained(folder)
    ref = f"hf:{folder}"
    family = family_of(ref)
    info = family.info(ref, {})
    assert PROMPT_TEXT in info.hooks
    loaded = family.load(info, None, prompt_ctx)
    assert isinstance(loaded, LmModel)
    method = build("prompt-random", {"rate": 0.5})
    assert mean_error(loaded, prompt_ctx, method, **FEW) == mean_error(reader, prompt_ctx, method, **FEW)


def test_a_checkpoint_without_a_tokenizer_offers_no_such_hook(
    reader: LmModel, prompt_ctx: FolderContext, tmp_path: Path
) -> None:
    reader.module.save_pretrained(tmp_path / "bare")
    ref = f"hf:{tmp_path / 'bare'}"
    info = family_of(ref).info(ref, {})
    with pytest.raises(Infeasible, match="prompt-random needs prompt_text"):
        build("prompt-random", {}).check(info)
    loaded = family_of(ref).load(info, None, prompt_ctx)
    with pytest.raises(Infeasible, match="no tokenizer"):
        _ = loaded.tokenizer  # type: ignore[attr-defined]


def test_prompts_and_cache_are_compressed_together(reader: LmModel, prompt_ctx: FolderContext) -> None:
    task = task_of(**FEW)
    shorter, cache = build("prompt-random", {"rate": 0.5}), build("streaming-llm", {"keep": 0.5})
    with shorter.apply(reader, None):
        alone = task.measure(reader, prompt_ctx)
        with cache.apply(reader, None):
            scores = np.concatenate([s.errors for s in task.evaluate(reader, prompt_ctx, 0)])
            both = task.measure(reader, prompt_ctx)
    assert len(scores) == 6
    assert both["kv_bytes"] < 0.8 * alone["kv_bytes"] < 0.8 * alone["kv_bytes_dense"]


def test_a_trial_has_one_method_on_the_text(reader: LmModel) -> None:
    methods = (build("prompt-random", {}), build("prompt-truncate", {}))
    with pytest.raises(Infeasible, match="both take prompt_text"):
        one_per_hook(methods)
    with (
        methods[0].apply(reader, None),
        pytest.raises(Infeasible, match="a trial has one method there"),
        methods[1].apply(reader, None),
    ):
        pass
    assert reader.occupant(PROMPT_TEXT) is None


@pytest.mark.slow
def test_the_trained_reader_answers_and_the_classifier_beats_the_baselines(prompt_ctx: FolderContext) -> None:
    """The whole recipe: minutes of training."""
    ref = "tiny-lm/facts-d128"
    family = family_of(ref)
    info = family.info(ref, {})
    reader = family.load(info, family.weights(info, (), 1), prompt_ctx)
    assert isinstance(reader, LmModel)
    trained = prompt_ctx.get(ClassifierStage(64, 0.0, 0))
    errors: dict[tuple[str, float], float] = {}
    for rate in (0.2, 0.33):
        for name in ("llmlingua2", "selective-context", "prompt-random"):
            knobs: dict[str, Any] = {"rate": rate}
            if name == "llmlingua2":
                knobs["threshold_scope"] = "prompt"
            method = build(name, knobs)
            prepared = trained if name == "llmlingua2" else None
            errors[name, rate] = mean_error(reader, prompt_ctx, method, prepared, examples=128)
    assert mean_error(reader, prompt_ctx, build("full-context", {}), examples=128) < 0.03
    assert mean_error(reader, prompt_ctx, build("no-context", {}), examples=128) > 1 - 2 / world.CHOICES
    assert errors["llmlingua2", 0.33] < 0.1
    for rate in (0.2, 0.33):
        assert errors["llmlingua2", rate] < errors["prompt-random", rate] - 0.2
        assert errors["llmlingua2", rate] < errors["selective-context", rate]
