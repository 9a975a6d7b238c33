"""MQT against brute force, and what makes it elastic: prefixes, drawn budgets, one training for every token count."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.budgets import BudgetSampler
from isoflop.methods.calibration import OnModel
from isoflop.methods.visual_tokens.mqt import Mqt, Resampler, resized, sine_table
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.models.counting import flops_of
from isoflop.models.family import family_of
from isoflop.models.tiny.llava_training import CellStage
from isoflop.models.vlm import VlmModel
from isoflop.tasks.base import TASKS
from isoflop.testing import FolderContext

OPTIONS = {"steps": 30, "batch": 16, "reading_scenes": 256, "coarse_scenes": 128, "tower_steps": 8}
D, TEXT, PATCHES = 64, 24, 36


@pytest.fixture(scope="module")
def probe() -> VisualTokenProbe:
    return VisualTokenProbe()


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    return FolderContext(tmp_path_factory.mktemp("stages"))


def resampler(content: bool = False, heads: int = 4) -> Resampler:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Resampler(D, TEXT, 16, heads, content)


def features(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, PATCHES, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("content", [False, True])
@torch.no_grad()
def test_fewer_tokens_are_a_prefix_of_all_of_them(content: bool) -> None:
    module, x = resampler(content), features()
    everything = module(x, 6, 16)
    for m in (1, 2, 3, 5, 8, 15):
        torch.testing.assert_close(module(x, 6, m), everything[:, :m], atol=1e-6, rtol=0)


def test_queries_behind_the_budget_get_no_gradient() -> None:
    module = resampler()
    module(features(), 6, 5).square().sum().backward()
    gradient = module.query_MD.grad
    assert gradient is not None
    assert float(gradient[5:].abs().max()) == 0.0
    assert bool((gradient[:5].abs().amax(1) > 0).all())
    assert not module.table_MD.requires_grad


@pytest.mark.parametrize("content", [False, True])
@torch.no_grad()
def test_attention_depends_on_the_image_only_with_content_keys(content: bool) -> None:
    module = resampler(content)
    maps = []
    for seed in (1, 2):
        q, k, _ = module.attention_inputs(features(seed), 6, 7)
        maps.append((q @ k.transpose(-1, -2) / 4).softmax(-1).expand(2, -1, -1, -1))
    assert torch.equal(maps[0], maps[1]) is not content


@pytest.mark.parametrize("content", [False, True])
@torch.no_grad()
def test_equals_torch_multi_head_attention(content: bool) -> None:
    module, x = resampler(content), features()
    places = resized(module.table_MD, 6).expand(2, -1, -1)
    q = module.norm_q(module.query_MD[:5] + module.table_MD[:5]).expand(2, -1, -1)
    k = module.norm_k(x + places if content else places)
    expected = module.attention(q, k, module.norm_v(x))[0]
    torch.testing.assert_close(module(x, 6, 5), expected, atol=1e-5, rtol=1e-4)


def test_the_table_holds_sines_and_cosines_of_column_and_row() -> None:
    table = sine_table(4, 16)
    for place in range(16):
        row, column = divmod(place, 4)
        expected = []
        for coordinate in (column, row):
            angles = [coordinate / 10000 ** (i / 4) for i in range(4)]
            expected += [*np.sin(angles), *np.cos(angles)]
        np.testing.assert_allclose(table[place], expected, atol=1e-6)


def test_the_first_queries_stand_for_the_first_row_and_resizing_is_bicubic() -> None:
    table = sine_table(4, 16)
    assert torch.equal(resized(table, 4), table)
    wide = F.interpolate(table.view(4, 4, 16).permute(2, 0, 1)[None], (6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized(table, 6), wide[0].permute(1, 2, 0).reshape(36, 16))
    assert resized(table.half(), 6).dtype is torch.float16


@pytest.mark.parametrize("kind", ["uniform", "log-uniform", "full", "own"])
def test_drawn_budgets_have_the_declared_support_and_frequencies(kind: str) -> None:
    sampler = BudgetSampler(kind, 16, 3)
    drawn = Counter(sampler.draw(step, seed=0) for step in range(8000))
    assert sorted(drawn) == sampler.support()
    expected = {
        "uniform": dict.fromkeys(range(2, 17, 2), 1 / 8),
        "log-uniform": {m: np.log(1 + 1 / m) / np.log(17) for m in range(1, 17)},
        "full": {16: 1.0},
        "own": {3: 1.0},
    }[kind]
    assert drawn.keys() == expected.keys()
    for m, share in expected.items():
        assert abs(drawn[m] / 8000 - share) < 5 * np.sqrt(share * (1 - share) / 8000) + 1e-12
    assert [sampler.draw(s, 1) for s in range(50)] == [sampler.draw(s, 1) for s in range(50)]
    assert kind in ("full", "own") or [sampler.draw(s, 1) for s in range(50)] != [sampler.draw(s, 2) for s in range(50)]


@pytest.mark.parametrize("queries", [1, 9, 16, 25])
def test_every_query_is_trained(queries: int) -> None:
    """Also the last one of an odd number; the even numbers stay equally likely."""
    method = Mqt(m=1, queries=queries)
    support = sorted({*range(2, queries, 2), queries})
    assert method.sampler.support() == support
    assert {method.at_step(step, 0).m for step in range(400)} == set(support)


def test_a_step_trains_its_drawn_budget_and_a_run_uses_its_own(probe: VisualTokenProbe) -> None:
    method = Mqt(m=5)
    drawn = {method.at_step(step, 0).m for step in range(200)}
    assert drawn == set(range(2, 17, 2))
    with method.apply(probe.model, probe.prepared(method, 0)):
        assert probe.cost() == 5
        assert method.footprint(probe.model, probe.ctx)["ratio"] == PATCHES / 5


def cell(method: Mqt) -> CellStage:
    family = family_of("tiny-llava/d24")
    stage = family.weights(family.info("tiny-llava/d24", OPTIONS), (method,), 0)
    assert isinstance(stage, CellStage)
    return stage


def test_one_training_serves_every_token_count() -> None:
    for kind in ("uniform", "log-uniform", "full"):
        assert len({cell(Mqt(m=m, train_m=kind)).key for m in (1, 2, 5, 16)}) == 1
    assert len({cell(Mqt(m=m, train_m="own")).key for m in (1, 2, 5, 16)}) == 4
    assert len({cell(Mqt(m=4, train_m=kind)).key for kind in ("uniform", "log-uniform", "full", "own")}) == 4
    info = family_of("tiny-llava/d24").info("tiny-llava/d24", OPTIONS)
    sources = [OnModel.source(info, cell(Mqt(m=m)), 0, (Mqt(m=m),)) for m in (2, 8)]
    assert sources[0] == sources[1]  # weight methods calibrate once, too


def test_a_trained_cell_answers_at_every_token_count(ctx: FolderContext) -> None:
    family = family_of("tiny-llava/d24")
    info, stage = family.info("tiny-llava/d24", OPTIONS), cell(Mqt())
    model = family.load(info, stage, ctx)
    assert isinstance(model, VlmModel)
    task = TASKS.get("reading")(examples=40, shard=40)  # type: ignore[call-arg]
    dense = model.weight_bytes()
    scores = []
    for m in (1, 4, 16):
        method = build("mqt", {"m": m})
        prepared = ctx.get(method.prepare(info, stage, 0))  # type: ignore[arg-type]
        with method.apply(model, prepared):
            scores.append(next(iter(task.evaluate(model, ctx, 0))).metrics["nll"])
            costs = task.measure(model, ctx)
            own = method.footprint(model, ctx)["method_bytes"]
            projector = sum(p.numel() for p in model.module.model.multi_modal_projector.parameters())
            # W takes the place of the model's projector, which nobody needs to store
            assert costs["weight_bytes"] == dense - 2 * projector + own
            assert costs["visual_tokens"] == m
        assert model.weight_bytes() == dense
    assert not np.allclose(scores[0], scores[2])
    assert len([p for p in Path(ctx.root).iterdir() if p.name.startswith("cell-")]) == 1


@pytest.mark.parametrize("m", [1, 7, 16])
@torch.no_grad()
def test_counted_operations_are_the_papers(probe: VisualTokenProbe, m: int) -> None:
    """2·m·N·D for the attention, (2·m + 2·N)·D² for its four projections, m·D·d for W; in multiply-adds."""
    method = Mqt(m=m)
    with method.apply(probe.model, probe.prepared(method, 0)):
        batch = probe.batch([0])
        compressing, found = flops_of(lambda: probe.model.compress(batch).tokens_BVD)
        projecting, _ = flops_of(lambda: probe.model.project(found))
    assert compressing == 2 * (2 * m * PATCHES * D + (2 * m + 2 * PATCHES) * D * D)
    assert projecting == 2 * m * D * TEXT


def test_impossible_knobs_are_refused_in_one_line(probe: VisualTokenProbe) -> None:
    for knobs, message in (
        ({"m": 17}, r"m = 17 exceeds the 16 queries; allowed: 1 … 16"),
        ({"queries": 12}, r"queries = 12 is no square up to 36 patches; allowed: 1, 4, 9, 16, 25, 36"),
        ({"heads": 7}, r"heads = 7 does not divide the vision width 64"),
    ):
        with pytest.raises(Infeasible, match=message):
            build("mqt", knobs).check(probe.model.info)
