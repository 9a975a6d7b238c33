"""The corpus of three domains, and models that train on what is selected of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pool_cases import OPTIONS, REF

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.jobs.job import Job, MethodSpec, ResolvedJob
from isoflop.methods.base import Method, build
from isoflop.models.family import family_of
from isoflop.models.lm import LmInfo, LmModel
from isoflop.models.worlds.text_domains import DOMAINS, REPEATED, DomainsStage, _shingles, domain_of


def stage_of(methods: tuple[Method, ...], seed: int = 0, **options: object) -> Any:
    """The stage that trains the tiny model with the methods."""
    family = family_of(REF)
    return family.weights(family.info(REF, {**OPTIONS, **options}), methods, seed)


def loaded(ctx: FolderContext, methods: tuple[Method, ...]) -> LmModel:
    """The tiny model trained with the methods."""
    family = family_of(REF)
    info = family.info(REF, OPTIONS)
    model = family.load(info, family.weights(info, methods, 0), ctx)
    assert isinstance(model, LmModel)
    return model


def test_domains_are_balanced_and_pieces_of_one_length(corpus: dict[str, dict[str, str]]) -> None:
    for domain in DOMAINS:
        assert sum(domain_of(name) == domain for name in corpus["pool"]) == 40
        assert {domain_of(name) for name in corpus[f"target-{domain}"]} == {domain}
        assert len(corpus[f"target-{domain}"]) == 20
        assert sum(map(len, corpus[f"test-{domain}"].values())) > 30_000
    assert {len(text) for text in corpus["pool"].values()} == {600}


def test_no_piece_of_the_pool_repeats_held_out_text_or_another_piece(corpus: dict[str, dict[str, str]]) -> None:
    for domain in DOMAINS:
        held_out = [*corpus[f"test-{domain}"].values(), *corpus[f"target-{domain}"].values()]
        seen = {shingle for text in held_out for shingle in _shingles(text)}
        pieces = [text for name, text in sorted(corpus["pool"].items()) if domain_of(name) == domain]
        for number, text in enumerate(pieces):
            others = {shingle for other in pieces[:number] for shingle in _shingles(other)}
            shingles = set(_shingles(text))
            assert len(shingles & seen) <= REPEATED * len(shingles)
            assert len(shingles & others) <= REPEATED * len(shingles)


def test_a_module_gives_its_source_or_its_docstrings(corpus: dict[str, dict[str, str]]) -> None:
    modules: dict[str, set[str]] = {domain: set() for domain in DOMAINS}
    for name in corpus["pool"]:
        modules[domain_of(name)].add(name.split(" ", 2)[2].partition("#")[0])
    assert not modules["code"] & modules["docstrings"]


def test_pieces_may_differ_in_length_by_an_option() -> None:
    stage = DomainsStage.here(4, 2, 100, 0.5)
    lengths = [len(piece.text) for piece in stage._cut("section", "x" * 4000)]
    assert min(lengths) < 80
    assert max(lengths) > 120
    assert all(50 <= n <= 150 for n in lengths)


def test_trainings_are_shared_where_a_knob_or_the_target_does_not_matter() -> None:
    whole = stage_of(())
    assert stage_of((build("data-random", {"keep": 1.0}),)) == whole
    assert stage_of((build("zip-fit", {"keep": 1.0}),)) == whole
    half = build("data-random", {"keep": 0.5})
    assert stage_of((half,), target="prose") == stage_of((half,), target="code")
    aligned = build("zip-fit", {"keep": 0.5})
    assert stage_of((aligned,), target="prose") != stage_of((aligned,), target="code")
    assert stage_of((aligned,), target="prose").first == stage_of((aligned,), target="code").first
    scores = [
        stage_of((build("zip-fit", {"keep": keep}),), seed).selection.scores for keep, seed in ((0.5, 0), (0.2, 1))
    ]
    assert scores[0] == scores[1]


def test_the_model_is_trained_on_what_is_kept(pool_ctx: FolderContext) -> None:
    methods = [build(name, {"keep": 0.25}) for name in ("data-random", "data-oracle", "zip-fit")]
    weights = [loaded(pool_ctx, (method,)).module.lm_head.weight for method in methods]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_job_scores_held_out_text_of_the_target_and_tells_what_was_kept(pool_ctx: FolderContext) -> None:
    specs = (MethodSpec.of("data-oracle", build("data-oracle", {"keep": 0.25}).knobs()),)
    options = tuple(sorted({"tokens": 32, "prefix": 0.0, "examples": 3}.items()))
    job = Job(REF, specs, "bits-per-byte", 0, 0, tuple(sorted(OPTIONS.items())), options)
    resolved = ResolvedJob.of(job)
    assert isinstance(resolved.info, LmInfo)
    assert resolved.info.test is not None
    assert resolved.info.test.split == "test-code"
    assert resolved.info.test.key in {stage.key for stage in resolved.stages()}
    model = resolved.family.load(resolved.info, resolved.weights, pool_ctx)
    method, prepared = resolved.in_order[0]
    assert prepared is not None
    with method.apply(model, pool_ctx.get(prepared)):
        errors = np.concatenate([shard.errors for shard in resolved.task.evaluate(model, pool_ctx, 0)])
        costs = method.footprint(model, pool_ctx)
    assert np.isfinite(errors).all()
    tokens = pool_ctx.get(resolved.info.pool.tokens)  # type: ignore[union-attr]
    lengths = np.diff(tokens.starts)
    kept = pool_ctx.get(prepared).kept_K
    assert costs["kept_tokens"] == lengths[kept].sum()
    assert costs["ratio"] == pytest.approx(lengths.sum() / lengths[kept].sum())
    assert costs["target_share"] == 1.0
    trained = pool_ctx.get(resolved.weights).log  # type: ignore[arg-type]
    assert trained["kept_tokens"] == costs["kept_tokens"]


@pytest.mark.parametrize(
    ("name", "knobs", "work"),
    [
        ("zip-fit", {"n_target": 20}, "selection_compressions"),
        ("data-random-length", {"matched": "dsir"}, "selection_ngrams"),
    ],
)
def test_rows_tell_what_the_selection_cost(
    name: str, knobs: dict[str, Any], work: str, pool_ctx: FolderContext
) -> None:
    method = build(name, {"keep": 0.25, **knobs})
    model = loaded(pool_ctx, (method,))
    prepared = method.prepare(model.info, None, 0)
    assert prepared is not None
    with method.apply(model, pool_ctx.get(prepared)):
        costs = method.footprint(model, pool_ctx)
    assert costs["selection_seconds"] > 0
    assert costs["method_bytes"] > 0
    expected = 120 + 20 + 120 * 20  # every text of the pool and of the target, and every pair
    assert costs[work] == expected if name == "zip-fit" else costs[work] > 120


def test_a_weight_method_is_applied_to_the_model_that_the_selection_trained(pool_ctx: FolderContext) -> None:
    names = {"data-oracle": {"keep": 0.25}, "gptq": {"bits": 4, "n_calib": 2}}
    specs = tuple(MethodSpec.of(name, build(name, knobs).knobs()) for name, knobs in names.items())
    job = Job(REF, specs, "bits-per-byte", 0, 0, tuple(sorted(OPTIONS.items())), (("prefix", 0.0), ("tokens", 32)))
    resolved = ResolvedJob.of(job)
    stages = {stage.key for stage in resolved.stages()}
    assert resolved.prepared[0] is not None
    assert {resolved.weights.key, resolved.prepared[0].key} < stages  # type: ignore[union-attr]
    prepared = resolved.prepared[1]
    assert prepared is not None
    assert pool_ctx.get(prepared)


@pytest.mark.parametrize(
    ("ref", "options", "method", "message"),
    [
        ("tiny-lm/text-d64", {}, build("zip-fit", {}), "method zip-fit needs documents"),
        (REF, OPTIONS, build("data-random", {"keep": 0.02}), r"keep = 0.02 of 120 documents leaves less than 4"),
        (REF, {**OPTIONS, "examples": 5}, build("data-random-length", {}), r"matched = zip-fit: .*n_target = 50"),
    ],
)
def test_impossible_selections_are_refused_at_plan_time(
    ref: str, options: dict[str, object], method: Method, message: str
) -> None:
    with pytest.raises(Infeasible, match=message):
        method.check(family_of(ref).info(ref, options))


def test_two_selections_are_refused() -> None:
    both = tuple(MethodSpec.of(name, build(name, {}).knobs()) for name in ("data-random", "data-oracle"))
    job = Job(REF, both, "bits-per-byte", 0, 0, tuple(sorted(OPTIONS.items())))
    with pytest.raises(Infeasible, match="both take documents"):
        ResolvedJob.of(job)
