"""VTC-CLS and the even lattice: scores against brute force, and what the selection may depend on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.selection import top_places
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.methods.visual_tokens.select import lattice
from isoflop.methods.visual_tokens.vtc_cls import VtcCls
from isoflop.models.family import family_of
from isoflop.models.features import Vision, attention_in
from isoflop.models.vlm import expand_placeholders, places_kept
from isoflop.models.worlds import digit_world as world

ROWS = range(4)


@pytest.fixture(scope="module")
def probe() -> VisualTokenProbe:
    found = VisualTokenProbe(tower="cls")
    with torch.no_grad():  # an untrained tower attends almost evenly
        for layer in found.model.vision.tower.encoder.layers:  # type: ignore[union-attr]
            layer.self_attn.q_proj.weight.mul_(10)
            layer.self_attn.k_proj.weight.mul_(10)
    return found


def kept(probe: VisualTokenProbe, method: VtcCls) -> tuple[Tensor, Tensor]:
    """Kept places (B, V) and the tokens themselves."""
    with method.apply(probe.model, None), torch.no_grad():
        found = probe.model.compress(probe.batch(ROWS))
    assert found.kept_BV is not None
    return found.kept_BV, found.tokens_BVD


def eager_attention(probe: VisualTokenProbe) -> list[Tensor]:
    tower = probe.model.vision.tower
    before = tower.config._attn_implementation  # type: ignore[union-attr]
    tower.set_attn_implementation("eager")  # type: ignore[operator]
    pixels = probe.model.vision.preprocess(probe._images[list(ROWS)])
    with torch.no_grad():
        weights = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation(before)  # type: ignore[operator]
    return list(weights)


def test_keeping_every_patch_changes_no_logit(probe: VisualTokenProbe) -> None:
    bare = probe.outputs(ROWS)
    for positions in ("contiguous", "original"):
        with VtcCls(keep=36, keep_positions=positions).apply(probe.model, None):
            assert torch.equal(probe.outputs(ROWS), bare)


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("reduce", ["sum", "max", "min"])
def test_scores_equal_a_loop_over_layers_heads_and_patches(probe: VisualTokenProbe, start: int, reduce: str) -> None:
    """Four layers, features of the third: the rows of layers ``start`` … 2 count, the last layer's never."""
    weights = eager_attention(probe)
    places, _ = kept(probe, VtcCls(keep=7, start_layer=start, reduce=reduce))
    for row in ROWS:
        scores = []
        for patch in range(36):
            per_layer = []
            for layer in range(start, 3):
                per_layer.append(sum(float(weights[layer][row, head, 0, 1 + patch]) for head in range(4)) / 4)
            scores.append({"sum": sum, "max": max, "min": min}[reduce](per_layer))  # type: ignore[operator]
        assert places[row].tolist() == sorted(np.argsort(scores)[-7:].tolist())


def test_output_is_a_subsequence_of_the_features(probe: VisualTokenProbe) -> None:
    places, tokens = kept(probe, VtcCls(keep=9))
    x = probe.model.look(probe._images[list(ROWS)])[probe.model.info.feature_layer]
    assert bool((places[:, 1:] > places[:, :-1]).all())
    for row in ROWS:
        assert torch.equal(tokens[row], x[row, places[row]])


def test_the_question_never_changes_the_kept_set(probe: VisualTokenProbe) -> None:
    method = VtcCls(keep=5)
    with method.apply(probe.model, None), torch.no_grad():
        batch = probe.batch(ROWS)
        assert batch.question_BQ is not None
        other = dataclasses.replace(batch, question_BQ=batch.question_BQ.flip(0) + 1)
        first, second = (probe.model.compress(b).kept_BV for b in (batch, other))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_attention_of_layers_that_do_not_count_never_changes_the_kept_set(probe: VisualTokenProbe) -> None:
    method = VtcCls(keep=5, start_layer=1)
    before, _ = kept(probe, method)
    last = probe.model.vision.tower.encoder.layers[3].self_attn  # type: ignore[union-attr]
    with torch.no_grad():
        last.q_proj.weight.neg_()
        after, _ = kept(probe, method)
        last.q_proj.weight.neg_()
    assert torch.equal(before, after)
    assert method.layers(probe.model.info) == (attention_in(1), attention_in(2))  # nothing else is even read


def test_rows_of_other_layers_in_a_batch_never_change_the_kept_set(probe: VisualTokenProbe) -> None:
    method, rows = VtcCls(keep=5, start_layer=2), list(ROWS)
    with method.apply(probe.model, None), torch.no_grad():
        batch = probe.batch(ROWS)
        before = probe.model.compress(batch).kept_BV
        more = probe.model.vision.read(probe._images[rows], [attention_in(n) for n in range(4)])
        more[attention_in(0)] = torch.eye(36)[: len(rows)] * 100  # would win wherever it counted
        wide = dataclasses.replace(batch, hidden={**more, **batch.hidden})
        after = probe.model.compress(wide).kept_BV
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_the_attention_comes_before_the_features_also_on_a_tower_with_one_layer() -> None:
    info = VisualTokenProbe().model.info
    assert VtcCls().layers(info) == (attention_in(0),)
    with pytest.raises(Infeasible, match=r"start_layer = 1 is none of the 1 vision layers .* allowed: 0 … 0"):
        VtcCls(start_layer=1).check(info)
    with pytest.raises(Infeasible, match=r"keep = 37 exceeds the 36 patches"):
        VtcCls(keep=37).check(info)


def test_a_tower_without_a_class_token_falls_back_and_says_so(probe: VisualTokenProbe) -> None:
    method, own = VtcCls(keep=4), probe.model.vision
    with method.apply(probe.model, None):
        assert method.footprint(probe.model, probe.ctx)["scored_by_cls"] == 1.0
        probe.model.side.vision = Vision(own.tower, own.image_size, own.mean, own.std, prefix=0)
        try:
            assert method.footprint(probe.model, probe.ctx)["scored_by_cls"] == 0.0
            assert probe.model.look(probe._images[:2])[attention_in(0)].shape == (2, 37)
        finally:
            probe.model.side.vision = own


def test_training_free_methods_share_the_model_that_saw_all_tokens() -> None:
    family = family_of("tiny-llava/d24")
    info = family.info("tiny-llava/d24", {"tower": "cls", "joint": False})
    stages = {
        m: family.weights(info, (build(m, {}),), 0) for m in ("none", "vtc-cls", "random", "avgpool", "uniform-grid")
    }
    assert len({s.key for s in stages.values() if s is not None}) == 1
    for name, stage in stages.items():
        assert build(name, {}).prepare(info, stage, 0) is None
    joint = family.info("tiny-llava/d24", {"tower": "cls"})
    assert joint.version != info.version
    keys = {m: family.weights(joint, (build(m, {}),), 0).key for m in ("none", "vtc-cls", "random")}  # type: ignore[union-attr]
    assert keys["none"] == keys["vtc-cls"] != keys["random"]


@pytest.mark.parametrize("name", ["random", "uniform-grid", "vtc-cls"])
def test_positions_act_at_inference_only(name: str) -> None:
    """No training for each choice; a model trained with the selection in place has not seen the other positions."""
    methods = [build(name, {"keep_positions": p}) for p in ("contiguous", "original")]
    assert methods[0].as_trained() == methods[1].as_trained()
    family = family_of("tiny-llava/d24")
    apart = family.info("tiny-llava/d24", {"joint": False})
    assert len({family.weights(apart, (m,), 0).key for m in methods}) == 1  # type: ignore[union-attr]
    joint = family.info("tiny-llava/d24", {})
    if name == "vtc-cls":  # never trained with
        assert len({family.weights(joint, (m,), 0).key for m in methods}) == 1  # type: ignore[union-attr]
        return
    methods[0].check(joint)
    for refuse in (methods[1].check, lambda info: family.weights(info, (methods[1],), 0)):
        with pytest.raises(Infeasible, match=rf"method {name}: keep_positions = original .* joint: false"):
            refuse(joint)


@torch.no_grad()
def test_original_positions_are_those_of_the_kept_patches(probe: VisualTokenProbe) -> None:
    """The same as the stock forward with the positions written out."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    method = VtcCls(keep=5, keep_positions="original")
    batch = probe.batch(ROWS)
    with method.apply(probe.model, None):
        batch = dataclasses.replace(batch, hidden=probe.model.look(probe._images[list(ROWS)]))
        found = probe.model.compress(batch)
        logits = probe.model.answer_logits(batch)
    assert found.kept_BV is not None
    ids, _, _ = expand_placeholders(batch.prompt_BT, None, world.IMAGE, torch.full((5,), world.IMAGE))
    positions = torch.cat((found.kept_BV, torch.tensor([[36, 37]]).expand(len(ids), -1)), dim=1)
    image = BaseModelOutputWithPooling(pooler_output=list(probe.model.project(found.tokens_BVD)))
    stock = probe.model.module(input_ids=ids, position_ids=positions, mm_encoder_outputs={"image": image}).logits[:, -1]
    torch.testing.assert_close(logits, stock, atol=1e-6, rtol=1e-5)
    with VtcCls(keep=5).apply(probe.model, None):
        assert not torch.allclose(probe.model.answer_logits(batch), logits, atol=1e-4)


def test_places_are_kept_behind_padding() -> None:
    positions = torch.tensor([[0, 0, 1, 2, 3, 4]])
    image = torch.tensor([[False, False, True, True, False, False]])
    assert places_kept(positions, image, torch.tensor([[3, 7]]), patches=9).tolist() == [[0, 0, 4, 8, 10, 11]]


def test_equal_scores_go_to_the_earlier_place() -> None:
    assert top_places(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 2).tolist() == [[0, 1]]


def test_the_lattice_is_even() -> None:
    assert lattice(6, 1).tolist() == [21]
    assert lattice(6, 2).tolist() == [7, 10, 25, 28]
    assert lattice(6, 3).tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    assert lattice(6, 6).tolist() == list(range(36))
    with pytest.raises(Infeasible, match=r"tokens = 5 is no square lattice .* allowed: 1, 4, 9, 16, 25, 36"):
        build("uniform-grid", {"tokens": 5}).check(VisualTokenProbe().model.info)
