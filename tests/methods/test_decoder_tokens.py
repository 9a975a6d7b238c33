"""FastV: what is dropped equals brute force, and the pass that is left equals a hand-written one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.costs.flops import prefill_flops
from isoflop.costs.shapes import DecoderShape
from isoflop.methods.base import build
from isoflop.methods.decoder_tokens.base import Candidates, DecoderTokenMethod, Dropping
from isoflop.methods.decoder_tokens.fastv import DropRandom, FastV
from isoflop.methods.decoder_tokens.probe import DecoderTokenProbe
from isoflop.methods.kv_cache.full_cache import FullCache
from isoflop.models.counting import flops_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS
from isoflop.models.vlm import expand_placeholders
from isoflop.models.vlm_info import VlmBatch
from isoflop.models.worlds import digit_world as world
from isoflop.tasks.footprint import decoder_cache

ROWS = range(3)
V, TEXT = 36, 2


@pytest.fixture(scope="module")
def probe() -> DecoderTokenProbe:
    found = DecoderTokenProbe()
    for layer in found.model.decoder.layers:  # far from even attention
        layer.self_attn.q_proj.weight.data.mul_(3)
    return found


def embedded(probe: DecoderTokenProbe) -> Tensor:
    """Inputs of the decoder, (B, L, d)."""
    batch = probe.batch(ROWS)
    visual = probe.model.project(probe.model.compress(batch).tokens_BVD)
    return torch.cat((visual, probe.model.embed_text(batch.prompt_BT[:, 1:])), dim=1)


def kept_columns(probe: DecoderTokenProbe, layer: int, count: int) -> Tensor:
    """Columns that stay, by eager attention weights."""
    decoder = probe.model.decoder
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    weights = decoder(inputs_embeds=embedded(probe), use_cache=False, output_attentions=True).attentions[layer - 1]
    decoder.set_attn_implementation(before)
    received = weights.mean(1)[:, -1, :V]
    best = received.topk(count, dim=-1).indices.sort(-1).values
    return torch.cat((best, torch.tensor([[V, V + 1]]).expand(len(best), -1)), dim=1)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("drop", [0.25, 0.75, 0.99])
@torch.no_grad()
def test_equals_a_hand_written_loop_with_explicit_positions(probe: DecoderTokenProbe, layer: int, drop: float) -> None:
    decoder, module = probe.model.decoder, probe.model.module
    count = V - int(V * drop)
    columns = kept_columns(probe, layer, count)
    x = embedded(probe)
    positions = torch.arange(x.shape[1]).expand(len(x), -1)
    for number, block in enumerate(decoder.layers):
        if number == layer:
            x = x.gather(1, columns[:, :, None].expand(-1, -1, x.shape[-1]))
            positions = positions.gather(1, columns)
        rope = decoder.rotary_emb(x, positions)
        x = block(x, attention_mask=None, position_embeddings=rope, position_ids=positions)
    expected = module.lm_head(decoder.norm(x[:, -1]))
    with FastV(layer=layer, drop=drop).apply(probe.model, None):
        found = probe.outputs(ROWS)
        dropping = probe.model.occupant(DECODER_LAYERS)
        assert isinstance(dropping, Dropping)
        assert dropping.per_layer == [V] * layer + [count] * (3 - layer)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, probe.outputs(ROWS), atol=1e-4)


@torch.no_grad()
def test_dropping_nothing_is_bit_identical(probe: DecoderTokenProbe) -> None:
    bare = probe.outputs(ROWS)
    for layer in (1, 2):
        with FastV(layer=layer, drop=0.0).apply(probe.model, None):
            assert torch.equal(probe.outputs(ROWS), bare)


@torch.no_grad()
def test_left_padding_changes_nothing(probe: DecoderTokenProbe) -> None:
    batch = probe.batch(ROWS)
    assert batch.question_BQ is not None
    pads = torch.full((3, 2), world.PAD)
    mask = torch.cat((torch.zeros(3, 2), torch.ones(batch.prompt_BT.shape)), dim=1).long()
    wide = VlmBatch(batch.hidden, torch.cat((pads, batch.prompt_BT), dim=1), None, batch.ids_B, prompt_mask_BT=mask)
    with FastV(layer=1, drop=0.5).apply(probe.model, None):
        torch.testing.assert_close(
            probe.model.answer_logits(wide), probe.model.answer_logits(batch), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(("method", "same"), [(FastV(layer=2, drop=0.5), False), (DropRandom(layer=2, drop=0.5), True)])
@torch.no_grad()
def test_the_question_decides_what_goes_and_the_control_ignores_it(
    probe: DecoderTokenProbe, monkeypatch: pytest.MonkeyPatch, method: DecoderTokenMethod, same: bool
) -> None:
    batch = probe.batch(ROWS)
    other = dataclasses.replace(batch, prompt_BT=batch.prompt_BT.clone())
    other.prompt_BT[:, -1] = world.FIRST_PLACE + 35
    kept: list[Tensor] = []
    cls = type(method)
    choose = cls.kept

    def noted(self: DecoderTokenMethod, candidates: Candidates, count: int) -> Tensor:
        kept.append(choose(self, candidates, count))  # type: ignore[arg-type]
        return kept[-1]

    monkeypatch.setattr(cls, "kept", noted)
    with method.apply(probe.model, None):
        for prompts in (batch, other):
            probe.model.answer_logits(prompts)
    assert torch.equal(kept[0], kept[1]) is same


@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_flops_fall_as_counted_by_layer(probe: DecoderTokenProbe, layer: int) -> None:
    """The decoder's cost is the formula's for the tokens of each layer; the tap adds one row of scores."""
    shape = DecoderShape.from_config(probe.model.module.config)
    batch = probe.batch([0])
    visual = probe.model.project(probe.model.compress(batch).tokens_BVD)
    dense, _ = flops_of(lambda: probe.model.prefill(visual, batch))
    assert dense == prefill_flops(shape, V + TEXT)
    method = FastV(layer=layer, drop=0.5)
    with method.apply(probe.model, None):
        found, _ = flops_of(lambda: probe.model.prefill(visual, batch))
        ratio = method.footprint(probe.model, probe.ctx)["ratio"]
    tokens = [V + TEXT] * layer + [V // 2 + TEXT] * (3 - layer)
    row = 2 * shape.heads * (V + TEXT) * shape.head_dim
    assert found == prefill_flops(shape, tokens) + row
    assert ratio == pytest.approx(3 * V / (layer * V + (3 - layer) * V / 2))


@torch.no_grad()
def test_works_together_with_a_policy_on_the_cache(probe: DecoderTokenProbe) -> None:
    """Later layers' prompts are shorter; the whole cache changes nothing else, and its bytes are those of what is left."""
    method = FastV(layer=1, drop=0.5)
    batch = probe.batch([0])
    visual = probe.model.project(probe.model.compress(batch).tokens_BVD)
    with method.apply(probe.model, None):
        alone = probe.outputs(ROWS)
        with FullCache().apply(probe.model, None):
            together = probe.outputs(ROWS)
            policy = probe.model.occupant(ATTENTION)
            assert policy is not None
            assert policy.prefix is None
            report = decoder_cache(probe.model, lambda: probe.model.prefill(visual, batch))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    row = 2 * 128 * probe.model.info.dense_bits / 8  # keys and values of one token in one layer
    assert report.stored == row * (V + 2 * V / 2 + 3 * TEXT)
    assert report.prompt_stored == row * (V + 2 * V / 2)


@torch.no_grad()
def test_passes_over_text_alone_are_left_as_they_are(probe: DecoderTokenProbe) -> None:
    text = torch.tensor([[world.READ, world.FIRST_PLACE]])
    bare = probe.model.encode_text(text)
    with FastV(layer=1, drop=0.99).apply(probe.model, None):
        assert torch.equal(probe.model.encode_text(text), bare)


@torch.no_grad()
def test_the_answer_can_be_continued_step_by_step(probe: DecoderTokenProbe) -> None:
    """Layers hold caches of their own lengths; the next token takes the place behind the whole prompt."""
    batch = probe.batch([0])
    visual = probe.model.project(probe.model.compress(batch).tokens_BVD)
    with FastV(layer=1, drop=0.5).apply(probe.model, None):
        cache = probe.model.prefill(visual, batch, use_cache=True).past_key_values
        lengths = [cache.get_seq_length(n) for n in range(3)]
        found = probe.model.module(input_ids=torch.tensor([[world.FIRST_DIGIT]]), past_key_values=cache).logits[:, -1]
    assert lengths == [V + TEXT, V // 2 + TEXT, V // 2 + TEXT]
    columns = torch.cat((kept_columns(probe, 1, V // 2)[:1], torch.tensor([[V + TEXT]])), dim=1)
    x = torch.cat((embedded(probe)[:1], probe.model.embed_text(torch.tensor([[world.FIRST_DIGIT]]))), dim=1)
    positions = torch.arange(x.shape[1])[None]
    decoder = probe.model.decoder
    for number, block in enumerate(decoder.layers):
        if number == 1:
            x, positions = x.gather(1, columns[:, :, None].expand(-1, -1, x.shape[-1])), positions.gather(1, columns)
        x = block(x, attention_mask=None, position_embeddings=decoder.rotary_emb(x, positions), position_ids=positions)
    torch.testing.assert_close(found, probe.model.module.lm_head(decoder.norm(x[:, -1])), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["fastv", "drop-random"])
def test_a_share_that_leaves_nothing_is_refused_and_one_that_drops_nothing_is_the_identity(
    probe: DecoderTokenProbe, name: str
) -> None:
    info, bare = probe.model.info, probe.outputs(ROWS)
    with pytest.raises(Infeasible, match=rf"method {name}: drop = 1 leaves none of the 36 .* every share below 1"):
        build(name, {"layer": 1, "drop": 1.0}).check(info)
    method = build(name, {"layer": 1, "drop": 0.9999})
    method.check(info)
    assert method.tokens_left(V) == method.tokens_left(1) == 1  # type: ignore[attr-defined]
    with build(name, {"layer": 1, "drop": 0.02}).apply(probe.model, None):
        assert torch.equal(probe.outputs(ROWS), bare)


def test_impossible_layers_are_refused_in_one_line(probe: DecoderTokenProbe) -> None:
    with pytest.raises(Infeasible, match=r"fastv: layer = 3 is not inside the 3 decoder layers of .*; allowed: 1 … 2"):
        build("fastv", {"layer": 3}).check(probe.model.info)
    with (
        FastV().apply(probe.model, None),
        pytest.raises(Infeasible, match="decoder_layers is taken already"),
        DropRandom().apply(probe.model, None),
    ):
        pass
    assert probe.model.occupant(DECODER_LAYERS) is None


def test_placeholders_stand_before_the_question(probe: DecoderTokenProbe) -> None:
    ids, _, _ = expand_placeholders(probe.batch([0]).prompt_BT, None, world.IMAGE, torch.full((V,), world.IMAGE))
    assert ids[0, :V].tolist() == [world.IMAGE] * V
