"""Prompts of segments: what stands where, and that running them equals running each row alone, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from vlm_cases import WORDS, by_hand, close, grouped_model, rows_of_parts

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build as method
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS, LayerChange, LayerTokens, TokenPolicy, kept_of
from isoflop.models.hooks.residual import RESIDUAL, ResidualPolicy
from isoflop.models.prefix import KINDS, NOT_LABELLED, Part, SegmentedPrompt, Span, build, replace_question
from isoflop.models.vlm import VlmModel

SIDES: list[Literal["left", "right"]] = ["left", "right"]
CACHES: list[tuple[str, dict[str, Any]]] = [
    ("full-cache", {}),
    ("h2o", {"keep": 0.6}),
    ("streaming-llm", {"keep": 0.6, "sinks": 1, "rolling": False}),
    ("zipcache", {}),
]


@pytest.fixture(scope="module")
def model() -> VlmModel:
    return grouped_model()


class Adaptive(TokenPolicy):
    """Before layers 1 and 3 the visual tokens stay whose norm is above the row's mean: another number in every row."""

    def change(self, tokens: LayerTokens) -> LayerChange | None:
        if tokens.layer not in (1, 3):
            return None
        rows = zip(tokens.hidden_BKd, tokens.layout.image_BL, strict=True)
        return LayerChange(kept_of(torch.stack([self.stays(tokens.layer, x, image) for x, image in rows])))

    @staticmethod
    def stays(layer: int, x_Td: Tensor, image_T: Tensor) -> Tensor:
        if layer not in (1, 3) or not bool(image_T.any()):
            return torch.ones_like(image_T)
        norms = x_Td.norm(dim=-1)
        return ~image_T | (norms >= norms[image_T].mean())


class Halved(ResidualPolicy):
    """Every layer adds half of what it would add."""

    def update(self, layer: int, before_BTd: Tensor, after_BTd: Tensor) -> Tensor:
        return (before_BTd + after_BTd) / 2


@contextmanager
def applied(model: VlmModel, dropping: bool, cache: tuple[str, dict[str, Any]] | None) -> Iterator[None]:
    with ExitStack() as stack:
        if dropping:
            stack.enter_context(model.occupy(DECODER_LAYERS, Adaptive(model)))
        if cache is not None:
            stack.enter_context(method(*cache).apply(model, None))
        yield


def test_every_column_says_what_it_is() -> None:
    embed = torch.nn.Embedding(9, 2)
    rows = [
        [Part("system", torch.tensor([4])), Part("image", embeds_Td=torch.ones(2, 2), room=4, places_T=torch.tensor([1, 3])),
         Part("question", torch.tensor([5, 6])), Part("answer", torch.tensor([7]))],
        [Part("frame", embeds_Td=torch.ones(1, 2), room=3), Part("frame", embeds_Td=torch.ones(1, 2), room=3), Part("question", torch.tensor([8]))],
    ]  # fmt: skip
    right = build(rows, embed, padding="right", labelled={"answer"})
    assert right.valid_BL.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert right.positions_BL.tolist() == [[0, 2, 4, 5, 6, 7], [0, 3, 6, 0, 0, 0]]
    assert right.next_B.tolist() == [8, 7]
    assert right.parts_BL.tolist() == [[0, 1, 1, 2, 2, 3], [0, 1, 2, -1, -1, -1]]
    assert right.labels_BL is not None
    assert right.labels_BL.tolist() == [[NOT_LABELLED] * 5 + [7], [NOT_LABELLED] * 6]
    assert right.spans() == [
        [Span("system", 0, 1), Span("image", 1, 3), Span("question", 3, 5), Span("answer", 5, 6)],
        [Span("frame", 0, 1), Span("frame", 1, 2), Span("question", 2, 3)],
    ]
    left = build(rows, embed, padding="left", labelled={"answer"})
    again, order_BL = right.aligned()
    for name in ("embeds_BLd", "positions_BL", "kinds_BL", "parts_BL", "labels_BL", "next_B"):
        assert torch.equal(getattr(again, name), getattr(left, name)), name
    assert order_BL.tolist() == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2]]
    torch.testing.assert_close(left.embeds_BLd[1, 5], embed.weight[8])
    assert left.spans()[1][-1] == Span("question", 5, 6)
    plain = build(rows, embed, positions="contiguous")
    assert plain.positions_BL.tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]]
    assert plain.next_B.tolist() == [6, 3]
    layout = left.layout()
    assert layout.image_BL.tolist() == [[False, True, True, False, False, False], [False] * 3 + [True, True, False]]
    assert layout.prompt_BL is not None
    assert layout.prompt_BL[0].tolist() == [True] * 5 + [False]
    assert [KINDS[k] for k in left.kinds_BL[0]] == ["system", "image", "image", "question", "question", "answer"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Part("picture", torch.tensor([1])), "allowed: system, image"),
        (lambda: Part("image"), "either ids or embeddings"),
        (lambda: Part("image", embeds_Td=torch.ones(3, 2), room=2), "room for 2 tokens has one at place 2"),
        (lambda: build([], torch.nn.Embedding(2, 2)), "at least one row"),
        (lambda: build([[]], torch.nn.Embedding(2, 2)), "at least one token"),
        (lambda: build([[Part("answer", embeds_Td=torch.ones(1, 2))]], torch.nn.Embedding(2, 2), labelled={"answer"}), "cannot be labelled"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_says_why(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("positions", ["keep", "contiguous"])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("halved", [False, True])
@torch.no_grad()
def test_rows_of_a_batch_equal_each_row_alone(
    model: VlmModel, side: Any, positions: Any, dropping: bool, halved: bool
) -> None:
    """Unequal lengths, padding on either side, several images, tokens that leave at two layers, a changed residual."""
    prompt = build(rows_of_parts(), model.embed_text, positions=positions, padding=side)
    with ExitStack() as stack:
        if halved:
            stack.enter_context(model.occupy(RESIDUAL, Halved()))
        expected = [by_hand(model, prompt, row, Adaptive.stays if dropping else None) for row in range(3)]
        stack.enter_context(applied(model, dropping, None))
        last = model.run(prompt)
        asked = prompt.of({"question", "system"})
        found = model.run(prompt, asked)
    close(last, model.head(torch.stack([x[-1] for x in expected])))
    texts = [prompt.of({"question", "system"})[row][prompt.valid_BL[row]] for row in range(3)]
    if not dropping:
        close(found, model.head(torch.cat([x[text] for x, text in zip(expected, texts, strict=True)])))
    else:  # no text is ever dropped, so that it comes last but for what stayed of the images
        counts = [int(text[-2:].sum()) for text in texts]
        assert counts == [2, 2, 2]
        rows = found.split([int(text.sum()) for text in texts])
        close(torch.cat([r[-2:] for r in rows]), model.head(torch.cat([x[-2:] for x in expected])))
    assert model.occupied == ()


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("cache", [None, *CACHES], ids=lambda c: "none" if c is None else c[0])
@torch.no_grad()
def test_decoding_token_by_token_equals_one_pass(
    model: VlmModel, dropping: bool, cache: tuple[str, dict[str, Any]] | None
) -> None:
    """The answer behind the prompts in one pass, and step by step over caches whose layers and rows differ in length."""
    prompt = build(rows_of_parts(), model.embed_text)
    answer = torch.randint(0, WORDS, (3, 5), generator=torch.Generator().manual_seed(3))
    whole = prompt.followed_by(model.embed_text(answer))
    asked = whole.of({"answer"})
    asked[:, prompt.length - 1] = True
    bare = model.run(whole, asked)
    with applied(model, dropping, cache):
        together = model.run(whole, asked).view(3, 6, -1)
        policy = model.occupant(ATTENTION)
        report = None if policy is None else policy.report()
        alone = model.stepwise(prompt, answer)
        if policy is not None:
            assert policy.report() == report
            assert policy.prefix is None
    close(alone, together)
    if dropping or cache not in (None, CACHES[0]):
        assert (together.flatten(0, 1) - bare).abs().max() > 1e-3 * bare.abs().max()
    else:
        close(together.flatten(0, 1), bare)
    assert torch.equal(model.run(whole, asked), bare)
    assert model.occupied == ()


@pytest.mark.parametrize("cache", [None, CACHES[1]], ids=["none", "h2o"])
@torch.no_grad()
def test_what_looks_at_the_last_token_of_the_prompt_does_not_see_the_answer(model: VlmModel, cache: Any) -> None:
    rows = [[row[0], row[-1]] if len(row) == 2 else [row[0], *rows_of_parts()[0]] for row in rows_of_parts()]
    prompt = build(rows, model.embed_text)
    answer = torch.randint(0, WORDS, (3, 4), generator=torch.Generator().manual_seed(3))
    whole = prompt.followed_by(model.embed_text(answer))
    asked = whole.of({"answer"})
    asked[:, prompt.length - 1] = True
    with ExitStack() as stack:
        stack.enter_context(method("fastv", {"layer": 2, "drop": 0.5}).apply(model, None))
        if cache is not None:
            stack.enter_context(method(*cache).apply(model, None))
        close(model.stepwise(prompt, answer), model.run(whole, asked).view(3, 5, -1))


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@torch.no_grad()
def test_masks_of_unequal_rows_are_what_the_attention_wants(model: VlmModel, kind: str) -> None:
    prompt = build(rows_of_parts(), model.embed_text)
    expected = torch.stack([by_hand(model, prompt, row, Adaptive.stays)[-1] for row in range(3)])
    before = model.decoder.config._attn_implementation
    model.decoder.set_attn_implementation(kind)
    try:
        with model.occupy(DECODER_LAYERS, Adaptive(model)):
            close(model.run(prompt), model.head(expected))
    finally:
        model.decoder.set_attn_implementation(before)


@torch.no_grad()
def test_a_dropped_token_and_padding_have_no_logits(model: VlmModel) -> None:
    prompt = build(rows_of_parts(), model.embed_text, padding="right")
    with pytest.raises(ValueError, match="has no logits"):
        model.run(prompt, torch.ones_like(prompt.valid_BL))
    with model.occupy(DECODER_LAYERS, Adaptive(model)), pytest.raises(ValueError, match="has no logits"):
        model.run(prompt, prompt.of({"image", "crop"}))


@torch.no_grad()
def test_layers_report_the_mean_of_unequal_rows(model: VlmModel) -> None:
    prompt = build(rows_of_parts(), model.embed_text)
    with model.occupy(DECODER_LAYERS, Adaptive(model)) as policy:
        model.run(prompt)
        assert isinstance(policy, Adaptive)
        counts = policy.per_layer
        assert policy.left_BK is not None
        assert bool((policy.left_BK == -1).any())
    assert counts[0] == pytest.approx((9 + 9 + 5) / 3)
    assert counts[0] > counts[1] == counts[2] > counts[3] > 0


@torch.no_grad()
def test_what_wants_equal_counts_refuses_others(model: VlmModel) -> None:
    prompt = build(rows_of_parts(), model.embed_text)
    with (
        method("fastv", {"layer": 1, "drop": 0.5}).apply(model, None),
        pytest.raises(Infeasible, match="from 5 to 9 visual tokens"),
    ):
        model.run(prompt)
    rows = rows_of_parts()
    rows[0][-1] = Part("question", torch.tensor([1, 2, 3]))
    with (
        method("full-cache", {}).apply(model, None),
        pytest.raises(Infeasible, match="images of a batch to end in the same column"),
    ):
        model.run(build(rows, model.embed_text))


@torch.no_grad()
def test_the_one_image_of_a_batch_is_such_a_prompt(model: VlmModel) -> None:
    from isoflop.models.vlm_info import VlmBatch

    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(5))
    token = model.info.geometry["image_token"]
    ids = torch.tensor([[token, 7, 8, 9], [0, token, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    batch = VlmBatch(model.look(images), ids, None, torch.arange(2), prompt_mask_BT=mask)
    close(model.run(model.prompt_of(batch)), model.answer_logits(batch))
    assert model.prompt_of(batch).spans()[1][0].kind == "image"


def test_a_question_that_stands_elsewhere_is_refused() -> None:
    ids, image = torch.tensor([[9, 9, 5, 6]]), torch.tensor([[True, True, False, False]])
    x, own = torch.zeros(1, 4, 2), torch.ones(1, 2, 2)
    found = replace_question(x, ids, image, torch.tensor([[5, 6]]), None, own)
    assert found[0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    padded = replace_question(x, ids, image, torch.tensor([[0, 5]]), torch.tensor([[0, 1]]), own * 2)
    assert padded[0].tolist() == [[0, 0], [0, 0], [2, 2], [0, 0]]
    for question in ([[6, 5]], [[5, 6, 7]]):
        with pytest.raises(ValueError, match=r"does not stand right behind|embeddings"):
            replace_question(x, ids, image, torch.tensor(question), None, torch.ones(1, len(question[0]), 2))


def test_a_prompt_of_segments_is_immutable(model: VlmModel) -> None:
    prompt = build(rows_of_parts(), model.embed_text)
    assert isinstance(prompt, SegmentedPrompt)
    assert len(prompt.columns(0, 3).spans()) == 3
    with pytest.raises(AttributeError):
        prompt.next_B = prompt.next_B  # type: ignore[misc]


@torch.no_grad()
def test_a_prompt_whose_last_token_was_dropped_has_no_logits() -> None:
    model, numbers = grouped_model(), torch.Generator().manual_seed(1)
    image = [Part("image", embeds_Td=torch.randn(5, 64, generator=numbers)) for _ in range(2)]
    prompt = build([[image[0], image[1]]], model.embed_text)
    with method("drop-random", {"drop": 0.8, "layer": 1}).apply(model, None):
        with pytest.raises(Infeasible, match="a prompt that ends in an image has no token behind it"):
            model.run(prompt)
        with pytest.raises(Infeasible, match="give it a question"):
            model.stepwise(prompt, torch.zeros(1, 1, dtype=torch.long))
