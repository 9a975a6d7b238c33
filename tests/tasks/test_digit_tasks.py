"""The two tasks on an untrained model: examples, order, shards, and the measured footprint against formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from isoflop.methods.base import build
from isoflop.methods.visual_tokens.probe import untrained_model
from isoflop.models.features import Vision
from isoflop.models.live_bytes import LiveBytes
from isoflop.models.vlm import VlmModel
from isoflop.models.worlds import digit_world as world
from isoflop.tasks import digit_scenes
from isoflop.tasks.base import TASKS
from isoflop.tasks.digit_scenes import DigitSceneTask
from isoflop.testing import FolderContext

NAMES = ("reading", "visual-reasoning")


def make(name: str, **options: float) -> DigitSceneTask:
    return TASKS.get(name)(**options)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def model() -> VlmModel:
    return untrained_model("d32")


class Context(FolderContext):
    """Features come from the untrained model's own tower instead of a trained one."""

    def __init__(self, root: Path, vision: Vision) -> None:
        super().__init__(root)
        self._vision = vision

    def get(self, stage: object) -> object:
        return self._vision if getattr(stage, "kind", "") == "tower" else super().get(stage)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ctx(model: VlmModel, tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(tmp_path_factory.mktemp("stages"), model.vision)


@pytest.mark.parametrize("name", NAMES)
def test_a_shorter_suite_is_a_prefix(name: str) -> None:
    short, long = make(name, examples=300).suite(), make(name, examples=700).suite()
    assert np.array_equal(short.questions_NQ, long.questions_NQ[:300])
    assert np.array_equal(short.answers_N, long.answers_N[:300])


def test_answers_are_right() -> None:
    reading = make("reading", examples=500)
    classes = world.SceneSet("test", 500, reading.mix, reading.scenes_seed).classes()
    places = reading.suite().questions_NQ[:, 1] - world.FIRST_PLACE
    assert np.array_equal(reading.suite().answers_N, world.FIRST_DIGIT + classes[np.arange(500), places])


@pytest.mark.parametrize("name", NAMES)
def test_chance_is_what_the_best_blind_answerer_gets_wrong(name: str) -> None:
    """For an entity the answer of most classes, for a place any digit; within four standard errors."""
    task = make(name, examples=20_000)
    suite = task.suite()
    best = {}
    if name == "visual-reasoning":
        facts = world.FIRST_ANSWER + world.fact_table()
        best = {world.FIRST_ENTITY + e: int(np.bincount(row).argmax()) for e, row in enumerate(facts)}
    said = np.array([best.get(int(subject), world.FIRST_DIGIT) for subject in suite.questions_NQ[:, 1]])
    wrong = said != suite.answers_N
    assert task.chance == pytest.approx(wrong.mean(), abs=4 * wrong.std() / len(wrong) ** 0.5)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.05, 100), (0.15, 300), (1.0, 2000)])
def test_the_share_of_fine_reading_is_met(share: float, expected: int) -> None:
    task = make("visual-reasoning", fine_share=share)
    reading = task.suite().questions_NQ[:, 0] == world.READ
    assert abs(int(reading.sum()) - expected) <= 2
    assert set(task.suite().answers_N[reading]) <= set(range(world.FIRST_DIGIT, world.FIRST_ANSWER))
    assert set(task.suite().answers_N[~reading]) <= set(range(world.FIRST_ANSWER, world.FIRST_PLACE))


@pytest.mark.parametrize("name", NAMES)
def test_shards_cover_the_suite_in_an_order_of_the_seed(name: str, model: VlmModel, ctx: Context) -> None:
    task = make(name, examples=70, shard=30)
    runs = {seed: list(task.evaluate(model, ctx, seed)) for seed in (0, 1)}
    assert [len(s.ids) for s in runs[0]] == [30, 30, 10]
    orders = {seed: np.concatenate([s.ids for s in run]) for seed, run in runs.items()}
    assert sorted(orders[0]) == list(range(70))
    assert not np.array_equal(orders[0], orders[1])
    for shard in runs[0]:
        assert set(np.unique(shard.errors)) <= {0.0, 1.0}
        assert np.isfinite(shard.metrics["nll"]).all()
    by_id = {
        seed: np.concatenate([s.metrics["nll"] for s in run])[np.argsort(orders[seed])] for seed, run in runs.items()
    }
    np.testing.assert_allclose(by_id[0], by_id[1], atol=1e-5)
    again = list(task.evaluate(model, ctx, 0))
    assert all(np.array_equal(a.metrics["nll"], b.metrics["nll"]) for a, b in zip(again, runs[0], strict=True))


@pytest.mark.parametrize("name", ["avgpool", "random", "quecc", "none"])
def test_one_example_at_a_time_gives_the_same_scores(
    name: str, model: VlmModel, ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, task = build(name, {}), make("reading", examples=30)
    with method.apply(model, method.untrained(model.info, 0)):  # type: ignore[attr-defined]
        many = np.concatenate([s.metrics["nll"] for s in task.evaluate(model, ctx, 0)])
        monkeypatch.setattr(digit_scenes, "BATCH", 1)
        one = np.concatenate([s.metrics["nll"] for s in task.evaluate(model, ctx, 0)])
    np.testing.assert_allclose(one, many, atol=1e-4, rtol=1e-4)


def test_random_tokens_differ_between_seeds_of_the_job(model: VlmModel, ctx: Context) -> None:
    task = make("reading", examples=30)
    with build("random", {"tokens": 4}).apply(model, None):
        scores = [np.concatenate([s.metrics["nll"] for s in task.evaluate(model, ctx, seed)]) for seed in (0, 1)]
    assert not np.allclose(np.sort(scores[0]), np.sort(scores[1]))


@pytest.mark.parametrize("tokens", [1, 9, 36])
def test_footprint_agrees_with_the_formulas(tokens: int, model: VlmModel, ctx: Context) -> None:
    task = make("reading", examples=4)
    with build("avgpool", {"tokens": tokens}).apply(model, None):
        cost = task.measure(model, ctx)
    g = model.info.geometry
    length, d = tokens + world.QUESTION_TOKENS, g["width"]
    norms = g["layers"] * 2 * d
    attention = g["layers"] * 4 * length * length * d
    assert cost["visual_tokens"] == tokens
    assert cost["text_tokens"] == 2
    assert cost["flops_llm"] == pytest.approx(
        2 * (model.info.n_params - norms) * length + attention + 2 * d * g["vocab_size"], rel=0.01
    )
    assert cost["flops_projector"] == 2 * tokens * (g["vision_width"] * d + d * d)
    assert cost["flops_method"] == 0
    vision = 2 * 36 * 3 * 64 * 64 + 2 * 37 * (4 * 64 * 64 + 2 * 64 * 128) + 4 * 37 * 37 * 64
    assert cost["flops_vision"] == vision
    assert cost["flops"] == sum(cost[f"flops_{part}"] for part in ("vision", "method", "projector", "llm"))
    assert cost["kv_bytes"] == g["layers"] * 2 * length * d * 2
    numel = sum(t.numel() for t in model.module.parameters())
    assert 2 * numel <= cost["weight_bytes"] <= 2 * numel + 1024  # 16 bits per weight, and the position-id buffers
    assert cost["peak_bytes"] > cost["weight_bytes"]
    assert cost["seconds"] > 0


def test_the_text_pass_of_quecc_is_charged(model: VlmModel, ctx: Context) -> None:
    """flops_method holds the question's run through the decoder; it goes away without the text."""
    task, costs, extra = make("reading", examples=4), {}, {}
    for source in ("llm_last", "none"):
        method = build("quecc", {"k": 6, "text_source": source})
        with method.apply(model, method.untrained(model.info, 0)):  # type: ignore[attr-defined]
            costs[source], extra[source] = task.measure(model, ctx), method.footprint(model, ctx)
    g = model.info.geometry
    d, q = g["width"], world.QUESTION_TOKENS
    text = 2 * (model.info.n_params - g["layers"] * 2 * d) * q + g["layers"] * 4 * q * q * d + 2 * d * 64
    assert costs["llm_last"]["flops_method"] - costs["none"]["flops_method"] == text
    width, patches, layers = 64, 36, 2
    mlps = 2 * patches * (2 * width * width + 2 * (layers * width * width + width * width))
    attention = 2 * (2 * width * width + 2 * patches * width * width) + 4 * patches * width
    assert costs["none"]["flops_method"] == mlps + 2 * patches * width + attention
    assert costs["none"]["visual_tokens"] == 1
    assert extra["none"]["ratio"] == 36
    assert extra["llm_last"]["method_params"] - extra["none"]["method_params"] == d * 64 + 3 * 64
    assert costs["none"]["weight_bytes"] == model.weight_bytes() + extra["none"]["method_bytes"]


def test_peak_bytes_of_a_known_computation() -> None:
    x = torch.ones(1000)
    with LiveBytes() as alive:
        y = x + 1  # 4,000 bytes
        z = y.view(10, 100) * 2  # 4,000 more; the view costs nothing
        del y
        w = z + 1  # in place of y
        del z, w
    assert alive.peak == 8000
    assert alive.now == 0
