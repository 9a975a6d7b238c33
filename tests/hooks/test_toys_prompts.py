"""Toy methods on a vision-language model: one that acts in three places at once, one that fuses the question's embeddings.

Each is compared with a loop over blocks and layers written by hand, and with decoding step by step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from test_toys_attention import MergePairs
from torch import Tensor, nn
from vlm_cases import LAYERS, WORDS, close, grouped_model

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.jobs.job import Job, MethodSpec, ResolvedJob
from isoflop.methods.base import METHODS, build
from isoflop.methods.decoder_tokens.fastv import FastV
from isoflop.methods.kv_cache.base import KvCacheMethod, empty_recent, whole_prompt
from isoflop.methods.kv_cache.full_cache import FullCache
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.base import Model
from isoflop.models.hooks.attention import ATTENTION, AttentionCall
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS, LayerChange, LayerTokens, TokenPolicy, kept_of
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, BlockRun, Signals, TokenReduction, TokenState
from isoflop.models.hooks.visual_tokens import CompressedTokens, VisualInput
from isoflop.models.segments import DenseSegment, LayerStore
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch
from isoflop.tasks.footprint import measure_answer

IN_TOWER, IN_DECODER, IN_CACHE = 18, 9, 2


def best(norms_BN: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest of each row."""
    return torch.zeros_like(norms_BN, dtype=torch.bool).scatter(1, norms_BN.topk(count, dim=1).indices, True)


class Norms:
    """What the three places know together: norms behind the tower's first block of the patches that are left, (B, V)."""

    in_tower: Tensor
    in_decoder: Tensor


@dataclass
class InTower(TokenReduction):
    known: Norms

    def after_block(self, state: TokenState, signals: Signals, block: int) -> TokenState:
        if block:
            return state
        norms = state.x_BNC[:, state.prefix :].norm(dim=-1)
        stays = best(norms, IN_TOWER)
        self.known.in_tower = norms[stays].view(-1, IN_TOWER)
        stays = torch.cat((torch.ones_like(stays[:, : state.prefix]), stays), dim=1)
        return replace(state, x_BNC=state.x_BNC[stays].view(len(stays), -1, state.x_BNC.shape[-1]))


class InDecoder(TokenPolicy):
    def __init__(self, model: Any, known: Norms) -> None:
        super().__init__(model)
        self.known = known

    def change(self, tokens: LayerTokens) -> LayerChange | None:
        if tokens.layer != 1:
            return None
        chosen = best(self.known.in_tower, IN_DECODER)
        self.known.in_decoder = self.known.in_tower[chosen].view(-1, IN_DECODER)
        image = tokens.layout.image_BL
        return LayerChange(kept_of((~image).masked_scatter(image, chosen)))


@dataclass(frozen=True)
class Everywhere(KvCacheMethod):
    """Patches of small norms leave the tower, then the decoder, then the cache; the norms are taken once."""

    name: ClassVar[str] = "toy-everywhere"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (VISION_BLOCKS, DECODER_LAYERS, ATTENTION)

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        norms = prepared.in_tower if prompt.layer < 1 else prepared.in_decoder
        whole = whole_prompt(prompt)
        front = whole.tokens - norms.shape[1]  # padding before the image
        places = front + best(norms, IN_CACHE).nonzero()[:, 1].view(-1, 1, IN_CACHE)
        index = places.expand(-1, whole.k_BGND.shape[1], -1)
        positions = whole.positions_BGN.expand(len(places), -1, -1).gather(2, index)
        wide = index[..., None].expand(-1, -1, -1, whole.k_BGND.shape[-1])
        kept = DenseSegment(positions, None, whole.k_BGND.gather(2, wide), whole.v_BGND.gather(2, wide))
        return LayerStore([kept], empty_recent(prompt))

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        assert isinstance(model, VlmModel)
        known = Norms()
        return {
            VISION_BLOCKS: BlockRun(InTower(known), model.vision.prefix),
            DECODER_LAYERS: InDecoder(model, known),
            **super().occupants(model, known),
        }


@dataclass(frozen=True)
class Fused(VisualTokenMethod):
    """One visual token, and a question into which the image is mixed: each embedding plus the mean of all patches."""

    name: ClassVar[str] = "toy-fused"
    trains_model: ClassVar[bool] = False

    def tokens_left(self, grid: int) -> int:
        return 1

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        assert view.question_BQ is not None
        mean_BD = view.x_BPD.mean(1)
        question_BQd = view.embed_text(view.question_BQ) + mean_BD.mean(-1)[:, None, None]
        return CompressedTokens(mean_BD[:, None], question_BQd=question_BQd)


@pytest.fixture(scope="module")
def model() -> VlmModel:
    return grouped_model("cls")


def batch_of(model: VlmModel, pads: int = 0) -> VlmBatch:
    """Two images with questions of three tokens; ``pads`` of padding in front of the first row's prompt."""
    rng = torch.Generator().manual_seed(4)
    images, question = torch.rand(2, 3, 48, 48, generator=rng), torch.randint(0, WORDS, (2, 3), generator=rng)
    image = torch.full((2, 1), model.info.geometry["image_token"])
    prompt = torch.cat((torch.zeros(2, pads, dtype=torch.long), image, question), dim=1)
    mask = torch.ones_like(prompt)
    mask[:, :pads] = 0
    return VlmBatch(model.look(images), prompt, question, torch.arange(2), mask if pads else None)


def layers_by_hand(model: VlmModel, x: Tensor, images: list[Tensor], sees: list[Tensor]) -> Tensor:
    """Hidden states behind the decoder, (B, T, d); in each layer visual tokens ``images`` stay, and masks say who sees whom."""
    decoder, positions = model.decoder, torch.arange(x.shape[1]).expand(len(x), -1)
    for block, stays, sees_BTT in zip(decoder.layers, images, sees, strict=True):
        x = x[stays].view(len(x), -1, x.shape[-1])
        positions = positions[stays].view(len(x), -1)
        rope = decoder.rotary_emb(x, positions)
        x = block(x, attention_mask=sees_BTT[:, None], position_embeddings=rope, position_ids=positions)
    return decoder.norm(x)


@torch.no_grad()
def everywhere_by_hand(model: VlmModel, answer: Tensor) -> Tensor:
    """Logits behind the prompts and each token of the answers, (B, 1 + S, W)."""
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(4))
    body: Any = getattr(model.vision.tower, "vision_model", model.vision.tower)
    x = body.pre_layrnorm(body.embeddings(model.vision.preprocess(images)))
    for number, block in enumerate(body.encoder.layers[: model.info.feature_layer]):
        x = block(x, attention_mask=None)
        if number == 0:
            norms = x[:, 1:].norm(dim=-1)
            stays = best(norms, IN_TOWER)
            norms = norms[stays].view(2, -1)
            x = torch.cat((x[:, :1], x[:, 1:][stays].view(2, IN_TOWER, -1)), dim=1)
    text = torch.cat((batch_of(model).prompt_BT[:, 1:], answer), dim=1)
    x = torch.cat((model.project(x[:, 1:]), model.embed_text(text)), dim=1)
    later = torch.ones(2, text.shape[1], dtype=torch.bool)
    first, second = best(norms, IN_DECODER), None
    masks = []
    for layer in range(LAYERS):
        here = norms if layer < 1 else norms[first].view(2, -1)
        count, length = here.shape[1], here.shape[1] + text.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1)
        mask[:, count:, :count] = best(here, IN_CACHE)[:, None]
        masks.append(mask)
    second = torch.cat((first, later), dim=1)
    every = [torch.ones(2, mask.shape[1], dtype=torch.bool) for mask in masks]
    return model.head(layers_by_hand(model, x, [every[0], second, *every[2:]], masks)[:, -1 - answer.shape[1] :])


@torch.no_grad()
def test_one_method_in_the_tower_between_layers_and_in_the_cache(model: VlmModel) -> None:
    answer = torch.randint(0, WORDS, (2, 4), generator=torch.Generator().manual_seed(3))
    bare = model.answer_logits(batch_of(model))
    expected = everywhere_by_hand(model, answer)
    with Everywhere().apply(model, None):
        assert model.live_vision
        batch = batch_of(model)
        assert batch.hidden[model.info.feature_layer].shape[1] == IN_TOWER
        prompt = model.prompt_of(batch)
        close(model.answer_logits(batch), expected[:, 0])
        policy = model.occupant(DECODER_LAYERS)
        assert isinstance(policy, InDecoder)
        assert policy.per_layer == [IN_TOWER, *[IN_DECODER] * (LAYERS - 1)]
        cache = model.occupant(ATTENTION)
        assert cache is not None
        assert cache.report().prompt_stored == LAYERS * IN_CACHE * 2 * 2 * 16 * 2  # K and V of 2 heads of 16, 16 bits
        whole = prompt.followed_by(model.embed_text(answer))
        asked = whole.of({"answer"})
        asked[:, prompt.length - 1] = True
        close(model.run(whole, asked).view(2, 5, -1), expected)
        close(model.stepwise(prompt, answer), expected)
        padded = batch_of(model, pads=2)
        close(model.answer_logits(padded), expected[:, 0])
    assert (bare - expected[:, 0]).abs().max() > 1e-2 * bare.abs().max()
    assert torch.equal(model.answer_logits(batch_of(model)), bare)
    assert model.occupied == ()


@torch.no_grad()
def test_the_image_is_fused_into_the_question(model: VlmModel) -> None:
    batch = batch_of(model)
    bare = model.answer_logits(batch)
    mean = batch.hidden[model.info.feature_layer].mean(1)
    assert batch.question_BQ is not None
    question = model.embed_text(batch.question_BQ) + mean.mean(-1)[:, None, None]
    x = torch.cat((model.project(mean[:, None]), question), dim=1)
    plain = torch.cat((x[:, :1], model.embed_text(batch.question_BQ)), dim=1)
    causal = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, -1, -1)
    every = torch.ones(2, 4, dtype=torch.bool)
    expected, unfused = (model.head(layers_by_hand(model, y, [every] * LAYERS, [causal] * LAYERS)[:, -1]) for y in (x, plain))  # fmt: skip
    assert (expected - unfused).abs().max() > 1e-2 * expected.abs().max()
    answer = torch.randint(0, WORDS, (2, 3), generator=torch.Generator().manual_seed(3))
    method = Fused()
    with method.apply(model, None):
        close(model.answer_logits(batch), expected)
        close(model.run(model.prompt_of(batch)), expected)
        close(model.stepwise(model.prompt_of(batch), answer)[:, 0], expected)
        padded = batch_of(model, pads=2)
        wide = torch.nn.functional.pad(batch.question_BQ, (1, 0), value=9)
        mask = torch.ones_like(wide)
        mask[:, 0] = 0
        close(model.answer_logits(replace(padded, question_BQ=wide, question_mask_BQ=mask)), expected)
        with FullCache().apply(model, None):
            close(model.answer_logits(batch), expected)
            image = torch.rand(1, 3, 48, 48)
            costs = measure_answer(model, image, lambda hidden: replace(batch, hidden=hidden, prompt_BT=batch.prompt_BT[:1], question_BQ=batch.question_BQ[:1], ids_B=batch.ids_B[:1]))  # fmt: skip
        assert costs["visual_tokens"] == 1
    assert torch.equal(model.answer_logits(batch), bare)
    assert model.occupied == ()


@pytest.mark.parametrize("later", [False, True])
@torch.no_grad()
def test_a_cache_that_spans_layers_runs_the_image_before_the_question(model: VlmModel, later: bool) -> None:
    """Against the stock cache, overwritten by the means of pairs after the image, or after every token."""
    batch, answer = batch_of(model), torch.randint(0, WORDS, (2, 2), generator=torch.Generator().manual_seed(3))
    bare, prompt = model.answer_logits(batch), model.prompt_of(batch)
    embeds = torch.cat((prompt.embeds_BLd, model.embed_text(answer)), dim=1)
    cache = model.decoder(inputs_embeds=embeds[:, :36], use_cache=True).past_key_values
    expected = []
    for place in range(36, embeds.shape[1]):
        for a, b in zip(cache.layers[::2], cache.layers[1::2], strict=True):
            count = place if later else 36
            for name in ("keys", "values") if later or place == 36 else ():
                x, y = getattr(a, name), getattr(b, name)
                a_mean = (x[:, :, :count] + y[:, :, :count]) / 2
                setattr(a, name, a_mean)
                setattr(b, name, a_mean.clone())
        step = model.decoder(inputs_embeds=embeds[:, place : place + 1], past_key_values=cache)
        expected.append(model.head(step.last_hidden_state[:, -1]))
    with MergePairs(later=later).apply(model, None):
        close(model.answer_logits(batch), expected[2])
        close(model.answer_logits(batch_of(model, pads=2)), expected[2])
        close(model.stepwise(prompt, answer), torch.stack(expected[2:], dim=1))
    assert (bare - expected[2]).abs().max() > 1e-2 * bare.abs().max()
    assert torch.equal(model.answer_logits(batch), bare)


@pytest.fixture
def registered() -> Iterator[None]:
    for toy in (Everywhere, MergePairs):
        METHODS.register(toy.name)(toy)
    yield
    for toy in (Everywhere, MergePairs):
        METHODS._entries.pop(toy.name)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("methods", "message"),
    [
        *(((name, "toy-everywhere"), rf"method {name} needs every patch .* toy-everywhere .*allowed beside it: none") for name in ("avgpool", "quecc", "mqt", "random")),
        (("toy-everywhere", "avgpool"), "method avgpool needs every patch"),
        (("toy-merge-pairs", "fastv"), "method toy-merge-pairs runs the prompt .* method fastv needs both"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_work_are_refused_when_planned(methods: tuple[str, ...], message: str) -> None:
    job = Job("tiny-llava/d128", tuple(MethodSpec(name) for name in methods), "reading", 0, 0)
    with pytest.raises(Infeasible, match=message) as error:
        ResolvedJob.of(job)
    assert "\n" not in str(error.value)


def test_what_takes_any_number_of_patches_is_allowed_beside() -> None:
    info = grouped_model().info
    build("none", {}).check_beside([Everywhere()], info)
    Everywhere().check_beside([build("none", {})], info)
    MergePairs().check_beside([build("none", {})], info)
    FullCache().check_beside([FastV()], info)


def test_toys_are_short() -> None:
    for toys in ((Everywhere, InTower, InDecoder, Norms), (Fused,)):
        assert sum(len(inspect.getsource(toy).splitlines()) for toy in toys) <= 60
