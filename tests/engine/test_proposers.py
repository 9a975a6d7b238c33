"""Spaces and proposers: valid points of conditional spaces, no doubles, an end, the same again after a restart."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.core.errors import UserError
from isoflop.search import Branch, Config, Param, Proposer, SearchSpace, Tell, Zip, make_proposer, values_key

SAMPLERS = ("grid", "random", "qmc", "tpe", "gp", "cmaes", "nsga2")

CONDITIONAL = SearchSpace(
    models=("a", "b", "c"),
    branches=(
        Branch("plain"),
        Branch(
            "knobs",
            (
                Param("knobs.mode", ("x", "y")),
                Param("knobs.n", low=1, high=5, integer=True, when=(("knobs.mode", ("y",)),), default=3),
                Param("knobs.flag", (True, False)),
            ),
        ),
    ),
    excludes=((("model", ("c",)), ("knobs.flag", (True,))),),
)
ZIPPED = SearchSpace(
    models=("a", "b", "c"),
    branches=(Branch("m", (Param("m.k", (1, 2, 4)), Param("m.j", low=0, high=4, step=2, integer=True))),),
    zips=(Zip("zip0", ((("model", "a"), ("m.k", 1)), (("model", "b"), ("m.k", 2)), (("model", "c"), ("m.k", 4)))),),
)
ENDLESS = SearchSpace(
    ("a", "b"),
    (Branch("m", (Param("m.x", low=0.1, high=10.0, log=True), Param("m.n", low=1, high=100, integer=True, log=True))),),
)

# the Gaussian process needs half a minute for the 33 points of the conditional space
FINITE = [pytest.param(s, ZIPPED, id=f"{s}-zipped") for s in SAMPLERS]
FINITE += [
    pytest.param(s, CONDITIONAL, id=f"{s}-conditional", marks=[pytest.mark.slow] if s == "gp" else []) for s in SAMPLERS
]


def error(config: Config) -> float:
    """Some deterministic objective."""
    return sum(float(v) if not isinstance(v, str) else len(v) + ord(v[0]) / 100 for v in config.values())


def play(proposer: Proposer, count: int, batch: int = 3) -> list[tuple[int, Config]]:
    """Ask and tell until ``count`` trials or the end."""
    out: list[tuple[int, Config]] = []
    while len(out) < count:
        proposals = proposer.ask(min(batch, count - len(out)))
        if not proposals:
            return out
        for p in proposals:
            out.append((p.number, p.config))
            proposer.tell(Tell(p.number, p.config, "complete", (error(p.config),)))
    return out


def test_the_grid_of_a_conditional_space_is_its_definition() -> None:
    points = list(CONDITIONAL.grid())
    expected = {values_key({"model": m, "method": "plain"}) for m in "abc"}
    for model in "abc":
        for flag in (True, False) if model != "c" else (False,):
            expected.add(
                values_key({"model": model, "method": "knobs", "knobs.mode": "x", "knobs.n": 3, "knobs.flag": flag})
            )
            expected |= {
                values_key({"model": model, "method": "knobs", "knobs.mode": "y", "knobs.n": n, "knobs.flag": flag})
                for n in range(1, 6)
            }
    assert len(points) == len(expected)
    assert {values_key(p) for p in points} == expected
    assert all(CONDITIONAL.contains(p) for p in points)
    assert CONDITIONAL.size() == len(expected) == 3 + 5 * 6


def test_zipped_parameters_move_together() -> None:
    points = list(ZIPPED.grid())
    assert len(points) == 9
    assert {(p["model"], p["m.k"]) for p in points} == {("a", 1), ("b", 2), ("c", 4)}
    assert not ZIPPED.contains({"model": "a", "method": "m", "m.k": 2, "m.j": 0})
    assert not ZIPPED.contains({"model": "a", "method": "m", "m.k": 1, "m.j": 1})  # off the step
    assert ZIPPED.contains({"model": "a", "method": "m", "m.k": 1, "m.j": 2})


@pytest.mark.parametrize("sampler, space", FINITE)
def test_every_sampler_uses_a_finite_space_up_without_doubles(sampler: str, space: SearchSpace) -> None:
    played = play(make_proposer(space, sampler, seed=1), 1000)
    assert {values_key(c) for _, c in played} == {values_key(c) for c in space.grid()}
    assert len(played) == space.size()
    assert [n for n, _ in played] == list(range(len(played)))


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "grid"])
def test_every_sampler_proposes_valid_new_points_of_an_endless_space(sampler: str) -> None:
    played = play(make_proposer(ENDLESS, sampler, seed=2), 15, batch=4)
    assert len(played) == 15 == len({values_key(c) for _, c in played})
    assert all(ENDLESS.contains(c) for _, c in played)
    assert ENDLESS.size() is None


def test_a_grid_over_real_numbers_is_an_error() -> None:
    with pytest.raises(UserError, match=r"m\.x: a grid cannot list the real numbers from 0\.1 to 10"):
        list(ENDLESS.grid())


@pytest.mark.parametrize("sampler", ["random", "qmc"])
@pytest.mark.parametrize("cuts", [(1,), (5,), (2, 3, 11), (30,)])
def test_a_restart_changes_nothing_in_what_is_proposed(sampler: str, cuts: tuple[int, ...]) -> None:
    whole = play(make_proposer(ENDLESS, sampler, seed=7), 40)
    done: list[tuple[int, Config]] = []
    for end in (*cuts, 40):
        proposer = make_proposer(ENDLESS, sampler, seed=7)
        for number, config in done:
            proposer.tell(Tell(number, config, "complete", (error(config),)))
        done += play(proposer, end - len(done))
    assert done == whole


def test_random_search_fills_the_gaps_that_a_kill_left() -> None:
    whole = dict(play(make_proposer(ENDLESS, "random", seed=7), 12))
    proposer = make_proposer(ENDLESS, "random", seed=7)
    for number in (0, 1, 4, 6):  # 2, 3 and 5 were running when the driver died; 3 left a row of one of its jobs
        proposer.tell(Tell(number, whole[number], "complete", (error(whole[number]),)))
    proposer.reserve(3, whole[3])
    assert {p.number: p.config for p in proposer.ask(8)} == {n: whole[n] for n in (2, 5, 7, 8, 9, 10, 11)} | dict(
        play(make_proposer(ENDLESS, "random", seed=7), 13)[12:]
    )


def test_a_grid_resumes_with_what_is_missing() -> None:
    whole = play(make_proposer(CONDITIONAL, "grid"), 100)
    proposer = make_proposer(CONDITIONAL, "grid")
    for number, config in whole[3:]:
        proposer.tell(Tell(number, config, "complete", (0.0,)))
    assert [(p.number, p.config) for p in proposer.ask(100)] == whole[:3]
    assert proposer.ask(1) == []


@pytest.mark.parametrize("pruner", ["none", "median"])
def test_numbers_stay_unique_when_the_grid_has_changed(pruner: str) -> None:
    old = [{"model": "b", "method": "plain"}, {"model": "c", "method": "plain"}]
    proposer = make_proposer(CONDITIONAL, "grid", pruner)
    for number, config in enumerate(old):
        proposer.tell(Tell(number, config, "complete", (0.0,)))
    numbers = [p.number for p in proposer.ask(1000)]
    assert len(numbers) == len(set(numbers)) == (CONDITIONAL.size() or 0) - 2
    assert not {0, 1} & set(numbers)


def study_of(proposer: Any) -> list[Any]:
    fields = [
        (t.state.name, t.params, t.values, t.intermediate_values, t.distributions)
        for t in proposer._study.get_trials(deepcopy=False)
    ]
    return [f for f in fields if f[0] != "FAIL" or f[3]]  # without doubles, which the proposer fails at once


@pytest.mark.parametrize("space", [CONDITIONAL, ZIPPED, ENDLESS], ids=["conditional", "zipped", "endless"])
def test_a_rebuilt_study_equals_the_original(space: SearchSpace) -> None:
    first = make_proposer(space, "random", "median", seed=3)
    told: list[Tell] = []
    for proposal in first.ask(9):
        steps = {0: error(proposal.config), 1: error(proposal.config) + 1}
        for step, value in steps.items():
            first.should_prune(proposal.number, step, value)
        outcome = ("complete", "pruned", "failed")[proposal.number % 3]
        result = Tell(
            proposal.number, proposal.config, outcome, (error(proposal.config),) if outcome == "complete" else (), steps
        )  # type: ignore[arg-type]
        told.append(result)
        first.tell(result)
    second = make_proposer(space, "random", "median", seed=3)
    for result in told:
        second.tell(result)
    assert len(study_of(second)) == 9
    for (state, params, values, steps, _), (state2, params2, values2, steps2, _) in zip(
        study_of(first), study_of(second), strict=True
    ):
        assert (state, params, steps) == (state2, params2, steps2)
        if state == "COMPLETE":
            assert values == values2


def test_points_of_an_older_yaml_do_no_harm() -> None:
    for sampler in ("grid", "random", "tpe", "nsga2"):
        proposer = make_proposer(CONDITIONAL, sampler)
        proposer.tell(Tell(0, {"model": "gone", "method": "plain"}, "complete", (1.0,)))
        proposer.tell(Tell(1, {"model": "a", "method": "gone", "gone.k": 3}, "complete", (1.0,)))
        proposer.tell(
            Tell(2, {"model": "a", "method": "knobs", "knobs.mode": "y", "knobs.n": 99, "knobs.flag": True}, "failed")
        )
        assert len(play(proposer, 100)) == CONDITIONAL.size()


def test_spaces_too_large_to_count_count_as_endless() -> None:
    space = SearchSpace(("a",), (Branch("m", (Param("m.n", low=1, high=10**12, integer=True, log=True),)),))
    assert space.size() is None
    assert len(play(make_proposer(space, "random"), 5)) == 5


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    branches = []
    for b in range(draw(st.integers(1, 3))):
        params: list[Param] = []
        for k in range(draw(st.integers(0, 3))):
            name = f"b{b}.k{k}"
            if draw(st.booleans()):
                values = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)))
                param = Param(name, values)
            else:
                low = draw(st.integers(0, 5))
                param = Param(
                    name, low=low, high=low + draw(st.integers(0, 6)), step=draw(st.integers(1, 3)), integer=True
                )
            finite = [p for p in params if p.values is not None]
            if finite and draw(st.booleans()):
                on = draw(st.sampled_from(finite))
                assert on.values is not None
                param = Param(
                    name,
                    param.values,
                    param.low,
                    param.high,
                    param.step,
                    integer=param.integer,
                    when=((on.name, on.values[:1]),),
                    default=draw(st.integers(0, 9)),
                )
            params.append(param)
        branches.append(Branch(f"b{b}", tuple(params)))
    models = tuple("abc"[: draw(st.integers(1, 3))])
    excludes = ((("model", models[:1]), ("method", ("b0",))),) if draw(st.booleans()) and len(models) > 1 else ()
    return SearchSpace(models, tuple(branches), (), excludes)


@settings(max_examples=80)
@given(spaces(), st.integers(0, 2**20))
def test_grid_walk_and_contains_agree(space: SearchSpace, seed: int) -> None:
    import random

    points = [values_key(p) for p in space.grid()]
    assert len(points) == len(set(points)) == space.size()
    assert all(space.contains(p) for p in space.grid())
    rng = random.Random(seed)
    for _ in range(20):
        point = space.walk(lambda param: rng.choice(list(param.grid())))
        assert (values_key(point) in points) == (not space.excluded(point)) == space.contains(point)
    assert not space.contains({"model": "z", "method": "b0"})
