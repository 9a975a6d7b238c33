"""EvoPress: the search against brute force, exact budgets, elitism, and its levels against the plain compressors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weight_cases import TOKENS, Bare, context, gpt2, mixtral, seeded, trained_decoder

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import Method, build
from isoflop.methods.kv_cache.probe import untrained_decoder
from isoflop.methods.weights.evolution import SelectionStep, distinct, evolve, selections
from isoflop.methods.weights.evopress import EvoPress, EvoPressSparse
from isoflop.methods.weights.fitness import FITNESSES, Fitness, rows_of, size_of
from isoflop.methods.weights.gptq import Gptq
from isoflop.methods.weights.magnitude import Magnitude
from isoflop.methods.weights.payloads import BitmapPayload
from isoflop.methods.weights.rtn import RoundToNearest
from isoflop.methods.weights.search_base import Found, SearchStage
from isoflop.methods.weights.space import Levels, LevelSpace
from isoflop.methods.weights.sparsegpt import SparseGpt
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.methods.weights.wanda import Wanda
from isoflop.models.base import Model
from isoflop.models.family import family_of
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel

SMALL: dict[str, Any] = {"generations": 6, "offspring": 6, "survivors": 4, "n_search": 8, "examples": 1, "n_calib": 16}


class Separable:
    """A fitness that adds up over units; on fewer examples it is noisy. Counts what it is asked."""

    def __init__(self, costs: Sequence[dict[int, float]], noise: float = 0.0, whole: int = 64) -> None:
        self.costs, self.noise, self.whole = costs, noise, whole
        self.tokens = 0
        self.asked: list[list[Levels]] = []

    def scores(self, candidates: Sequence[Levels], examples: int, rng: np.random.Generator) -> list[float]:
        self.asked.append(list(candidates))
        self.tokens += examples * len(candidates)
        noise = self.noise * rng.standard_normal(len(candidates)) * (examples < self.whole)
        exact = [sum(c[level] for c, level in zip(self.costs, levels, strict=True)) for levels in candidates]
        return (np.array(exact) + noise).tolist()


def line(units: int, low: int = 0, high: int = 4) -> LevelSpace:
    """Units that all exchange levels."""
    return LevelSpace((low,) * units, (high,) * units, (tuple(range(units)),))


def run(space: LevelSpace, start: Levels, judge: Any, generations: int = 60, seed: int = 0, offspring: int = 8) -> Any:
    plan = selections(3, 4, 4, 4)
    return evolve([start], space.mutate, judge, plan, generations, offspring, np.random.default_rng(seed))


# the search


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 3))
def test_totals_are_identical_for_parent_and_all_offspring(seed: int, units: int, groups: int) -> None:
    """(a): whatever is switched, every group keeps its sum and every unit its bounds."""
    rng = np.random.default_rng(seed)
    low = tuple(rng.integers(-3, 1, units).tolist())
    high = tuple(int(bound + extra) for bound, extra in zip(low, rng.integers(0, 5, units), strict=True))
    start = tuple(int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
    member = rng.integers(0, groups, units)
    space = LevelSpace(low, high, tuple(tuple(np.flatnonzero(member == g).tolist()) for g in range(groups)))
    for levels in [*distinct(start, space.mutate, 5, rng), space.shuffle(start, rng)]:
        assert all(a <= level <= b for a, level, b in zip(low, levels, high, strict=True))
        for group in space.groups:
            assert sum(levels[i] for i in group) == sum(start[i] for i in group)


def test_offspring_are_distinct_and_a_space_of_one_has_none() -> None:
    rng = np.random.default_rng(0)
    space = line(6)
    found = distinct((2,) * 6, space.mutate, 40, rng)
    assert len(found) == len(set(found)) == 40
    assert (2,) * 6 not in found
    assert all(sum(abs(level - 2) for level in levels) in (2, 4, 6) for levels in found)
    assert distinct((4, 4), line(2).mutate, 8, rng) == []
    assert distinct((1, 3), LevelSpace((0, 0), (4, 4), ((0,), (1,))).mutate, 8, rng) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_separable_fitness_is_brought_to_the_brute_force_optimum(seed: int) -> None:
    """(d), with returns that diminish, and noise on fewer examples than the last selection's."""
    rng = np.random.default_rng(seed)
    units = [(rng.random(), rng.uniform(0.2, 0.8)) for _ in range(6)]
    costs = [{level: float(size * rate**level) for level in range(4)} for size, rate in units]
    judge = Separable(costs, noise=0.05)
    found = run(line(6, 0, 3), (1,) * 6, judge, generations=120, seed=seed, offspring=16)
    best = min(
        sum(c[level] for c, level in zip(costs, levels, strict=True))
        for levels in product(range(4), repeat=6)
        if sum(levels) == 6
    )
    assert found.fitness[-1] == pytest.approx(best)


def test_the_best_never_worsens_when_the_last_selection_sees_the_whole_set() -> None:
    """(b), for a fitness that is noisy on less than the whole set."""
    rng = np.random.default_rng(1)
    costs = [{level: float(rng.random()) for level in range(5)} for _ in range(10)]
    found = run(line(10), (2,) * 10, Separable(costs, noise=2.0, whole=64))
    assert all(after <= before for before, after in pairwise(found.fitness))
    assert found.fitness[-1] < found.fitness[0]


def test_the_parent_joins_the_last_selection_only_and_is_scored_on_the_same_examples() -> None:
    judge = Separable([dict.fromkeys(range(5), 0.0) for _ in range(8)])
    start = (2,) * 8
    run(line(8), start, judge, generations=1)
    first, second, third = judge.asked[1:]
    assert [len(first), len(second), len(third)] == [8, 4, 2]
    assert start not in first
    assert start not in second
    assert third[-1] == start


def test_all_offspring_worse_keep_the_parent() -> None:
    costs = [{level: abs(level - 2) for level in range(5)} for _ in range(8)]
    found = run(line(8), (2,) * 8, Separable(costs), generations=5)
    assert found.levels == (2,) * 8
    assert found.moved == [0.0] * 6


def test_steps_of_selection_are_the_papers() -> None:
    assert selections(3, 16, 2048, 8) == (SelectionStep(16, 2048), SelectionStep(4, 16_384), SelectionStep(1, 131_072))
    assert [s.survivors for s in selections(3, 8, 1, 1)] == [8, 2, 1]
    assert selections(2, 2, 2048, 16) == (SelectionStep(2, 2048), SelectionStep(1, 32_768))
    assert selections(1, 8, 5, 4) == (SelectionStep(1, 5),)


def test_the_same_seed_gives_the_same_trajectory_and_another_another() -> None:
    """(f), on the search alone."""
    rng = np.random.default_rng(2)
    costs = [{level: float(rng.random()) for level in range(5)} for _ in range(12)]
    asked = []
    for seed in (0, 0, 1):
        judge = Separable(costs, noise=1.0)
        run(line(12), (2,) * 12, judge, generations=10, seed=seed)
        asked.append(judge.asked)
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


# fitness


def judge_of(model: Model, kind: str, serve: Any = lambda levels: None, examples: int = 6) -> Fitness:
    return Fitness(model, list(model.calibration(context(), examples, 0)), kind, serve)


@pytest.mark.parametrize("kind", FITNESSES)
def test_the_uncompressed_model_has_no_divergence(kind: str) -> None:
    """(e): KL(dense ‖ dense) = 0; the loss is the model's own."""
    model = trained_decoder()
    judge = judge_of(model, kind)
    (score,) = judge.scores([()], 100, np.random.default_rng(0))
    if kind == "loss":
        from isoflop.methods.weights.level_bank import calibration_loss

        assert score == pytest.approx(calibration_loss(model, list(model.calibration(context(), 6, 0))), rel=1e-5)
    else:
        assert abs(score) < 1e-6
    assert judge.tokens == 6 * 47


def test_divergence_is_that_of_the_definition_and_grows_with_damage() -> None:
    model = trained_decoder()
    batches = list(model.calibration(context(), 6, 0))
    view = linear_views(model)[0]
    from isoflop.methods.weights.views import replaceable

    with replaceable(model, [view.parameter]):
        whole = view.weight().clone()
        judge = Fitness(model, batches, "kl", lambda levels: view.write(whole * (1 - levels[0] / 4)))
        small, large = judge.scores([(1,), (3,)], 6, np.random.default_rng(0))
        view.write(whole)
        with torch.no_grad():
            p = torch.cat([model.supervised(b)[0] for b in batches]).double().softmax(-1)
            view.write(whole * 0.75)
            q = torch.cat([model.supervised(b)[0] for b in batches]).double().softmax(-1)
        assert small == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
        assert 0 < small < large
        # with all logits among the largest, sparse and full divergence are the same thing
        sparse = Fitness(model, batches, "sparse-kl", lambda levels: None)
        assert sparse.scores([(1,)], 6, np.random.default_rng(0))[0] == pytest.approx(0, abs=1e-6)


def test_candidates_are_judged_on_the_same_examples_drawn_without_replacement() -> None:
    model = trained_decoder()
    judge = judge_of(model, "loss", examples=8)
    first, again = judge.scores([(), ()], 3, np.random.default_rng(0))
    assert first == again
    assert judge.tokens == 2 * 3 * 47
    others = {judge.scores([()], 3, np.random.default_rng(seed))[0] for seed in range(4)}
    assert len(others) > 1
    assert judge.scores([()], 8, np.random.default_rng(0)) == judge.scores([()], 8, np.random.default_rng(1))


def test_rows_of_batches() -> None:
    ids_BT = torch.arange(12).view(4, 3)
    batch = LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED), 1)
    assert size_of(batch) == 4
    some = rows_of(batch, [2, 0])
    assert torch.equal(some.ids_BT, ids_BT[[2, 0]])
    assert (some.prefix, some.valid_BT) == (1, None)
    assert torch.equal(rows_of({"x": ids_BT}, [1])["x"], ids_BT[[1]])


# levels of matrices


def sparse(name: str = "sparsegpt", sparsity: float = 0.6, **knobs: Any) -> EvoPressSparse:
    return EvoPressSparse(sparsity=sparsity, compressor=name, levels=3, n_calib=8, **knobs)


def wide() -> Model:
    """A Llama whose widest matrix takes SparseGPT two blocks of columns."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=176, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, **TOKENS,
    )  # fmt: skip
    return Bare(seeded(lambda: LlamaForCausalLM(config)))


@pytest.mark.parametrize(
    "build_model", [trained_decoder, wide, gpt2, mixtral], ids=["llama", "wide", "gpt2", "mixtral"]
)
@pytest.mark.parametrize("name", ["sparsegpt", "wanda", "magnitude"])
def test_every_level_has_exactly_as_many_zeros_more(build_model: Any, name: str) -> None:
    """(a), measured on what is stored: a step is the same number of zeros in matrices of every size."""
    model = build_model()
    method = sparse(name)
    views = linear_views(model)
    step, space = method.step(views), method.space(views)
    database = method.compute_parts(model, context(), 0)
    for view, low, high in zip(views, space.low, space.high, strict=True):
        zeros = {}
        for level in range(low, high + 1):
            payload = database.payload(view, level)
            assert isinstance(payload, BitmapPayload)
            zeros[level] = view.numel - payload.kept.numel()
        assert zeros == {level: zeros[0] + level * step for level in zeros}
        assert low < 0 < high


@pytest.mark.parametrize("name", ["sparsegpt", "wanda", "magnitude"])
def test_uniform_sparsity_is_level_0_and_the_plain_pruner(name: str) -> None:
    """(c)"""
    plain = {
        "sparsegpt": SparseGpt(sparsity=0.6, n_calib=8),
        "wanda": Wanda(sparsity=0.6, n_calib=8, compare="matrix"),
        "magnitude": Magnitude(sparsity=0.6),
    }[name]
    model = trained_decoder()
    found = served(replace(sparse(name), **{**SMALL, "n_calib": 8}, allocation="uniform"), model)
    assert set(found[0].levels.values()) == {0}
    assert_same_matrices(found, served(plain, model))


@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_uniform_bits_are_the_plain_quantiser(name: str) -> None:
    """(c)"""
    plain = Gptq(bits=3, n_calib=16) if name == "gptq" else RoundToNearest(bits=3)
    model = trained_decoder()
    found = served(EvoPress(bits=3, compressor=name, allocation="uniform", **SMALL), model)
    assert set(found[0].levels.values()) == {3}
    assert_same_matrices(found, served(plain, model))


def served(method: Any, model: Model) -> tuple[Any, dict[str, torch.Tensor], dict[str, float]]:
    """What was prepared, the matrices served, and the footprint."""
    prepared = method.calibrate(model, context(), 0) if hasattr(method, "calibrate") else None
    with method.apply(model, prepared):
        matrices = {view.name: view.weight().clone() for view in linear_views(model)}
        return prepared, matrices, method.footprint(model, context())


def assert_same_matrices(one: Any, other: Any) -> None:
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert one[2] == other[2]


@lru_cache
def uneven() -> LmModel:
    """Two layers of which the second hardly changes what the first has left: bits are wasted on it."""
    model = untrained_decoder(layers=2)
    for view in linear_views(model):
        if view.layer == 1 and view.role in ("o_proj", "down_proj"):
            view.write(view.weight() * 0.02)
    return model


@pytest.mark.parametrize("exchange", ["size", "any"])
@pytest.mark.parametrize("allocation", ["evolution", "random", "dp"])
def test_every_allocation_stores_the_same_bytes(allocation: str, exchange: str) -> None:
    model = uneven()
    uniform = served(EvoPress(bits=3, allocation="uniform", **SMALL), model)
    other = served(EvoPress(bits=3, allocation=allocation, exchange=exchange, **SMALL), model)
    assert other[2] == uniform[2]
    if allocation == "evolution":
        assert other[0].levels != uniform[0].levels
        assert other[0].trace["fitness"][-1] < uniform[0].trace["fitness"][-1]


@pytest.mark.parametrize("bits", [2.25, 2.5, 3.0])
def test_the_budget_in_measured_bytes_is_bits_and_overhead(bits: float) -> None:
    """As many bits as the seven matrices can have within the budget, a scale and a zero of 16 bits for 32 weights."""
    model = trained_decoder()
    views = linear_views(model)
    total = sum(view.numel for view in views)
    most = max(used for levels in product((2, 3), repeat=len(views)) if (used := stored(levels, views)) <= bits * total)
    assert served(EvoPress(bits=bits, **SMALL), model)[2]["bits"] == pytest.approx(most / total + 32 / 32)


def stored(levels: Sequence[int], views: Sequence[LinearView]) -> int:
    return sum(view.numel * level for view, level in zip(views, levels, strict=True))


@pytest.mark.parametrize("exchange", ["size", "any"])
def test_errors_that_add_up_are_allocated_exactly(exchange: str) -> None:
    """The baseline is the least sum of output errors of all configurations that the search may visit, by brute force."""
    model = trained_decoder()
    method = EvoPress(bits=2.5, lowest=2, highest=3, allocation="dp", exchange=exchange, **SMALL)
    views = linear_views(model)
    found = method.calibrate(model, context(), 0)
    errors, groups = found.parts.errors, method.space(views).groups
    start = method.starts(views, 1, np.random.default_rng(0))[0]

    def totals(levels: Levels) -> list[int]:
        return [stored([levels[i] for i in group], [views[i] for i in group]) for group in groups]

    best = min(
        sum(errors[view.name][level] for view, level in zip(views, levels, strict=True))
        for levels in product((2, 3), repeat=len(views))
        if totals(levels) == totals(start)
    )
    assert sum(errors[name][level] for name, level in found.levels.items()) == pytest.approx(best)


def test_output_errors_are_those_of_the_outputs() -> None:
    from isoflop.methods.weights.evopress import output_error
    from isoflop.methods.weights.statistics import ViewStats

    generator = torch.Generator().manual_seed(0)
    x_NI, weight_OI, other_OI = (torch.randn(shape, generator=generator) for shape in ((50, 6), (4, 6), (4, 6)))
    stats = ViewStats(50, 2 / 50 * x_NI.T @ x_NI, x_NI.norm(dim=0), x_NI.norm(dim=0))
    expected = (x_NI @ (weight_OI - other_OI).T).square().sum() / (x_NI @ weight_OI.T).square().sum()
    assert output_error(weight_OI, other_OI, stats) == pytest.approx(float(expected), rel=1e-5)


# on a model


def search(bits: float = 2.5, allocation: str = "evolution", seed: int = 0) -> Found:
    method = EvoPress(bits=bits, allocation=allocation, generations=12, offspring=8, survivors=4, n_search=16, examples=1, n_calib=32)  # fmt: skip
    return method.calibrate(uneven(), context(), seed)


searched = lru_cache(search)


def test_the_best_never_worsens_on_the_whole_calibration_set() -> None:
    """(b), on a model, re-evaluated afterwards."""
    found = searched()
    fitness = found.trace["fitness"]
    assert len(fitness) == 13
    assert all(after <= before for before, after in pairwise(fitness))
    assert fitness[-1] < fitness[0]
    model = uneven()
    method = EvoPress(bits=2.5, n_search=16, examples=1)
    again = replace(method, generations=0).search(model, context(), found.parts, 0)
    assert len(again.trace["fitness"]) == 1
    problem = method.problem(model, found.parts)
    from isoflop.core.hashing import derive_seed

    batches = list(model.calibration(context(), 16, derive_seed("evopress examples", 0)))
    with problem.serving() as serve:
        judge = Fitness(model, batches, "kl", serve)
        levels = tuple(found.levels[view.name] for view in linear_views(model))
        assert judge.scores([levels], 16, np.random.default_rng(9))[0] == pytest.approx(fitness[-1], rel=1e-4)


def test_the_same_seed_gives_the_same_search_on_a_model() -> None:
    """(f): one stage in one process, whatever the number of workers, and nothing of torch's global random state."""
    first = searched()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        again = search()
    assert (again.levels, again.trace) == (first.levels, first.trace)


def test_the_search_leaves_the_model_as_it_was_and_is_served_from_its_payloads() -> None:
    model = uneven()
    dense = {view.name: view.weight().clone() for view in linear_views(model)}
    found = search(seed=1)
    assert all(torch.equal(view.weight(), dense[view.name]) for view in linear_views(model))
    with EvoPress(bits=2.5).apply(model, found):
        for view in linear_views(model):
            assert torch.equal(view.weight(), found.parts.payload(view, found.levels[view.name]).decode())


def test_the_search_beats_random_and_additive_allocation_where_layers_matter_unevenly() -> None:
    """Errors of single matrices do not tell that the second layer hardly matters; the search finds out."""
    evolution, random, additive = (searched(allocation=name) for name in ("evolution", "random", "dp"))
    assert evolution.trace["tokens"] == random.trace["tokens"]
    assert evolution.trace["fitness"][-1] < random.trace["fitness"][-1]
    assert evolution.trace["fitness"][-1] < additive.trace["fitness"][-1]
    bits = [
        np.mean([level for name, level in evolution.levels.items() if f"layers.{layer}." in name]) for layer in (0, 1)
    ]
    assert bits[0] > bits[1]


def test_the_trace_is_that_of_the_search() -> None:
    found = searched()
    trace = EvoPress(bits=2.5).trace(found)
    assert set(trace) == {"fitness", "tokens", "moved"}
    # starts on 1 example, first parent on 16; 8 offspring on 1, 4 on 4, 1 and the parent on 16
    per_generation = 47 * (8 * 1 + 4 * 4 + 2 * 16)
    assert np.diff(trace["tokens"]).tolist() == [per_generation] * 12
    assert trace["tokens"][0] == 47 * (8 + 16)
    assert trace["moved"][0] == 0
    assert EvoPress().trace(None) == {}


# stages and errors


def test_stages_are_shared_between_budgets_and_survive_the_disk(tmp_path: Path) -> None:
    family = family_of("tiny-lm/text-d64")
    info = family.info("tiny-lm/text-d64", {"steps": 3, "batch": 2, "context": 64, "vocabulary": 400})
    weights = family.weights(info, (), 0)
    methods = [EvoPress(bits=bits, **SMALL) for bits in (2.5, 3.0)]
    stages = [method.prepare(info, weights, 0) for method in methods]
    assert all(isinstance(stage, SearchStage) for stage in stages)
    assert stages[0].key != stages[1].key  # type: ignore[union-attr]
    assert stages[0].parts.key == stages[1].parts.key  # type: ignore[union-attr]
    ctx = FolderContext(tmp_path)
    model = family.load(info, weights, ctx)
    found = ctx.get(stages[0])  # type: ignore[arg-type]
    again = FolderContext(tmp_path).get(stages[0])  # type: ignore[arg-type]
    assert again == replace(found, parts=again.parts)
    direct = methods[0].calibrate(model, ctx, 0)
    assert (direct.levels, direct.trace) == (found.levels, found.trace)
    assert direct.parts.errors == found.parts.errors
    with methods[0].apply(model, again):
        for view in linear_views(model):
            assert torch.equal(view.weight(), direct.parts.payload(view, found.levels[view.name]).decode())


def test_knobs_of_the_search_do_not_search_again_where_nothing_is_searched() -> None:
    info = family_of("tiny-lm/text-d64").info("tiny-lm/text-d64", {})
    for method in (EvoPress(allocation="dp"), EvoPress(allocation="uniform"), EvoPressSparse(sparsity=0.0)):
        stages = [replace(method, generations=n, offspring=n).prepare(info, None, 0) for n in (3, 4)]
        assert stages[0].key == stages[1].key  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bits": 1.5}, "bits = 1.5 lies outside of lowest = 2"),
        ({"bits": 7.0}, "highest = 6"),
        ({"bits": 2.5, "allocation": "uniform"}, "with allocation = uniform allowed: whole bits"),
    ],
)
def test_impossible_budgets_are_refused_in_one_line(knobs: dict[str, Any], message: str) -> None:
    method: Method = build("evopress", knobs)
    with pytest.raises(Infeasible, match=message):
        method.check(trained_decoder().info)


def test_random_search_does_not_stay_near_its_parent() -> None:
    """Levels are drawn anew, whatever the parent's, and every group keeps its sum."""
    space = LevelSpace((-8,) * 12, (8,) * 12, (tuple(range(8)), tuple(range(8, 12))))
    parent = (8,) * 4 + (-8,) * 4 + (8, 8, -8, -8)
    rng = np.random.default_rng(0)
    found = np.array([space.shuffle(parent, rng) for _ in range(400)])
    assert (found[:, :8].sum(1) == 0).all()
    assert (found[:, 8:].sum(1) == 0).all()
    assert found.min() >= -8
    assert found.max() <= 8
    assert np.abs(found.mean(0)).max() < 1.0
    assert len({tuple(row) for row in found.tolist()}) == 400
