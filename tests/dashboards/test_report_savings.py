"""What the report claims to be saved, and why it says that a section is missing; on made-up outcomes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import pytest
from report_sweeps import EXAMPLES, store_of

from isoflop.dashboards.report import methods, report_data
from isoflop.dashboards.report.savings import Pairing, against_uncompressed, enough
from isoflop.jobs import Job, Outcome, ResolvedJob
from isoflop.sweep.configs import Config, read_configs
from isoflop.sweep.results import usable

if TYPE_CHECKING:
    from conftest import Reported

    from isoflop.sweep.api import SweepResults

Scores = Callable[[Job, float], np.ndarray]  # of a job with so many tokens


def swept(folder: Path, scores: Scores, ratio: float | None = None, **spec: Any) -> SweepResults:
    """A sweep with these scores, which costs parameters times tokens; ``ratio``: instead of the ratio of tokens."""

    def outcome(job: Job) -> Outcome:
        tokens = float(job.knobs().get("tokens", 36))
        size = ResolvedJob.of(job).info.n_params
        axes = {"N": size, "V": tokens, "Q": 2.0, "ratio": 36 / tokens if ratio is None else ratio}
        errors = scores(job, tokens).tolist()
        footprint = {"flops": 2.0 * size * tokens}
        return Outcome("ok", errors=errors, shard_sizes=[len(errors)], axes=axes, footprint=footprint, seconds=1.0)

    whole: Mapping[str, Any] = {"name": "s", "models": ["tiny-llava/d24"], "tasks": ["reading"], **spec}
    return store_of(folder, whole, outcome)


POOLED: dict[str, Any] = {"methods": ["none", {"avgpool": {"tokens": [9]}}], "repeats": 2}


def examples(job: Job, error: float) -> np.ndarray:
    """Scores of the examples of a job's repeat, whoever answers them; their mean is exact."""
    noise = np.random.default_rng(job.repeat).uniform(-0.1, 0.1, EXAMPLES)
    return error + noise - noise.mean()


def worse_by(step: float) -> Scores:
    """0.20 and 0.22 in two repeats; methods that drop tokens are worse on every example."""
    return lambda job, tokens: examples(job, 0.2 + 0.02 * job.repeat) + step * (tokens < 36)


def slider_texts(data: Mapping[str, Any]) -> list[str]:
    frontier = next(s for s in data["sections"] if s["id"] == "frontier")
    return [state["text"] for state in frontier["groups"][0]["panels"][0]["slider"]["states"]]


def test_what_is_worse_on_every_example_saves_nothing(tmp_path: Path) -> None:
    data = report_data(swept(tmp_path, worse_by(0.1), **POOLED))
    assert data["headline"][0].endswith("it is uncompressed")  # Student's t over two repeats would hold 0.31, too
    assert "cheaper" not in " ".join([*data["headline"], *slider_texts(data)])
    assert "no saving at equal error: uncompressed tiny-llava/d24 at 4 × the cost is better" in slider_texts(data)[0]
    assert "difference to it 0.1 " in slider_texts(data)[0]


def test_what_is_as_good_on_the_same_examples_saves_the_ratio_of_costs(tmp_path: Path) -> None:
    def scores(job: Job, tokens: float) -> np.ndarray:
        turned = np.random.default_rng(7 + job.repeat).normal(0, 0.05, EXAMPLES) * (tokens < 36)
        gap = (-0.002, 0.006)[job.repeat]  # one repeat says better, the other one worse
        return examples(job, 0.2 + 0.02 * job.repeat) + turned - turned.mean() + gap * (tokens < 36)

    data = report_data(swept(tmp_path, scores, **POOLED))
    (headline,) = data["headline"]
    assert "avgpool on tiny-llava/d24" in headline
    assert "; 4 × cheaper than the cheapest uncompressed model that is as good (tiny-llava/d24, error 0.21;" in headline
    assert "difference to it 0.002 (95 %:" in headline


def test_between_two_uncompressed_models_the_lesser_is_what_is_saved_against(tmp_path: Path) -> None:
    """Better than the small one, for less; worse than the large one: the ratio to the large one is no saving."""
    errors = {("tiny-llava/d24", 36): 0.5, ("tiny-llava/d96", 36): 0.1, ("tiny-llava/d24", 9): 0.4}

    def scores(job: Job, tokens: float) -> np.ndarray:
        return examples(job, errors.get((job.model, int(tokens)), 0.6))

    spec = {**POOLED, "models": ["tiny-llava/d24", "tiny-llava/d96"]}
    text = slider_texts(report_data(swept(tmp_path, scores, **spec)))[0]
    assert "; 4 × cheaper than uncompressed tiny-llava/d24, which is worse, error 0.5; " in text
    assert "uncompressed tiny-llava/d96 at 63.7 × the cost is better, error 0.1" in text


def flops(config: Config) -> float | None:
    return config.costs.get("flops")


@pytest.mark.parametrize(
    ("step", "said"), [(0.01, "no saving at equal error"), (0.0, "4 × cheaper"), (-0.01, "no uncompressed model")]
)
def test_without_shared_examples_means_decide(tmp_path: Path, step: float, said: str) -> None:
    table = usable(swept(tmp_path, lambda job, tokens: examples(job, 0.2 + step * (tokens < 36)), **POOLED).results())
    dense = pc.and_(pc.equal(table["method"], "none"), pc.equal(table["repeat"], 0))
    other = pc.and_(pc.equal(table["method"], "avgpool"), pc.equal(table["repeat"], 1))
    apart = table.filter(pc.or_(dense, other))
    configs = [config if config.uncompressed else rounded(config) for config in read_configs(apart)]
    none, pooled = sorted(map(rounded, configs), key=lambda c: c.method != "none")
    pairing = Pairing(apart)
    gap = pairing.gap(pooled, none)
    assert (gap.difference, gap.low) == (pytest.approx(step), None)
    assert said in against_uncompressed(pooled, [none, pooled], flops, pairing).text
    assert enough([none, pooled], "flops", pairing) is (none if step > 0 else pooled)


def rounded(config: Config) -> Config:
    return Config(**{**vars(config), "error": round(config.error, 9)})


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_plain_differences_need_no_resampling_and_end_the_same(repeats: int, tmp_path: Path) -> None:
    """Steps from far below to far above the noise of a repeat's examples, and of the repeats."""

    def scores(job: Job, tokens: float) -> np.ndarray:
        noise = np.random.default_rng((job.repeat, int(tokens))).normal(0, 0.05, EXAMPLES)
        return examples(job, 0.2) + noise + {1: 0.3, 4: 0.02, 9: 0.008, 36: 0.0}[int(tokens)]

    spec = {"methods": ["none", {"avgpool": {"tokens": [1, 4, 9]}}], "repeats": repeats}
    table = usable(swept(tmp_path, scores, **spec).results())
    pairing, configs = Pairing(table), read_configs(table)
    decided = []
    for a, b in itertools.permutations(configs, 2):
        assert pairing.worse(a, b) == pairing.gap(a, b).worse
        assert pairing.gap(b, a).difference == pytest.approx(-pairing.gap(a, b).difference)
        decided.append(pairing._plain(pairing._shared(a, b)))
    assert (set(decided) == {True, False, None}) if repeats == 1 else (set(decided) == {None})
    assert {pairing.worse(a, b) for a, b in itertools.permutations(configs, 2)} == {True, False}


@pytest.mark.parametrize(("seeds", "better"), [((0.1, 0.2), "is probably better"), ((0.15, 0.15), "is better")])
def test_paired_examples_of_two_repeats_are_evidence(seeds: tuple[float, float], better: str, tmp_path: Path) -> None:
    """Worse on every example of both repeats; Student's interval over two of them would hold 0."""
    data = report_data(
        swept(tmp_path, lambda job, tokens: examples(job, 0.2) + seeds[job.repeat] * (tokens < 36), **POOLED)
    )
    assert data["headline"][0].endswith("it is uncompressed")
    text = slider_texts(data)[0]
    assert f"no saving at equal error: uncompressed tiny-llava/d24 at 4 × the cost {better}, error 0.2 " in text
    assert f"over {EXAMPLES} paired examples in each of 2 repeats, worse with probability " in text


def left_out(data: Mapping[str, Any], title: str) -> str:
    return next(line for line in data["left_out"] if line.startswith(title))


def test_methods_of_unknown_ratios_are_compared_on_the_same_model(tmp_path: Path) -> None:
    spec = {"methods": [{"avgpool": {"tokens": [9]}}, {"random": {"tokens": [9]}}]}
    data = report_data(swept(tmp_path, lambda job, tokens: examples(job, 0.2), ratio=math.nan, **spec))
    section = next(s for s in data["sections"] if s["id"] == "methods")
    assert [g["name"] for g in section["groups"]] == ["paired differences"]
    assert "ratios that are not known" in section["groups"][0]["panels"][0]["text"]


def test_methods_that_share_nothing_are_left_out_for_that(tmp_path: Path) -> None:
    spec = {"methods": [{"avgpool": {"tokens": [9]}}, {"random": {"tokens": [1]}}]}
    data = report_data(swept(tmp_path, lambda job, tokens: examples(job, 0.2), **spec))
    section = next((s for s in data["sections"] if s["id"] == "methods"), None)
    assert section is not None  # error along the ratio
    assert section["notes"] == [
        "No paired differences of reading: nothing agrees with the rows of avgpool in model, repeat and ratio."
    ]
    one = {"methods": [{"avgpool": {"tokens": [1]}}, {"random": {"tokens": [1]}}]}
    data = report_data(swept(tmp_path / "one", lambda job, tokens: examples(job, 0.2), **one))
    assert not any(line.startswith("Methods compared") for line in data["left_out"])


def test_large_sweeps_say_that_they_are_not_paired(compared: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "MOST_ROWS", 10)
    section = next(s for s in report_data(compared.sweep)["sections"] if s["id"] == "methods")
    assert [g["name"] for g in section["groups"]] == ["error along the ratio"]
    assert section["notes"] == ["No paired differences of reading: 29 rows, scores are compared for up to 10."]


def test_large_sweeps_of_unknown_ratios_leave_the_section_out_for_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "MOST_ROWS", 1)
    spec = {"methods": [{"avgpool": {"tokens": [9]}}, {"random": {"tokens": [9]}}]}
    data = report_data(swept(tmp_path, lambda job, tokens: examples(job, 0.2), ratio=math.nan, **spec))
    why = "reading: 2 rows, scores are compared for up to 1; no model was measured at two known ratios"
    assert left_out(data, "Methods") == f"Methods compared: {why}"


def test_importance_of_equal_errors_is_left_out_for_that(tmp_path: Path) -> None:
    spec = {
        "models": ["tiny-llava/d24", "tiny-llava/d32", "tiny-llava/d48", "tiny-llava/d96"],
        "methods": [{"avgpool": {"tokens": [1, 4, 9]}}],
    }
    data = report_data(swept(tmp_path, lambda job, tokens: np.ones(EXAMPLES), **spec))
    assert left_out(data, "Importance") == (
        "Importance of settings: all errors are equal (reading: model and method, reading: avgpool)"
    )


def test_importance_names_every_reason(compared: Reported) -> None:
    why = left_out(compared.data, "Importance")
    assert "fewer than two settings that vary and that every configuration has (reading: model and method)" in why
    assert "fewer than 8 configurations (reading: none, reading: avgpool, reading: uniform-grid, 1 more)" in why
