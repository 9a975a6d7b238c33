"""Hugging Face's classes of vision-language models: exact beside transformers' own modules, and methods act on each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.checkpoints.vision_language.kinds import KINDS, NOT_TAKEN, other_classes
from isoflop.models.family import family_of
from isoflop.models.features import attention_in
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS
from isoflop.models.vlm import VlmModel
from isoflop.models.whole_cache import WholeCache
from isoflop.testing.architectures.page import PAGE, class_line
from isoflop.testing.architectures.vision_language import (
    SIZE,
    VISION_LANGUAGE_CHECKS,
    VisionLanguageSubject,
    stock_logits,
    vision_language_subject,
)
from isoflop.testing.architectures.walk import EXACT, examined
from isoflop.testing.small_vision_language import MOST, SMALL

SIZES = [(24, 24), (40, 52), (52, 40), (20, 90), (90, 17), (200, 150)]
"""Heights and widths of pictures: as large as a view, wide and tall, smaller than a view on one side, large."""
CONCATENATING = {f"Llava{name}ForConditionalGeneration" for name in ("", "Next", "Onevision")}
NO_PIXELS = {"pixels": "does not offer pixels: images reach it through its own processor"}
NO_BLOCKS = {**NO_PIXELS, "vision_blocks": "its connector merges neighbouring patches"}
BOTH_WAYS = {
    **NO_PIXELS,
    **dict.fromkeys(("attention", "decoder_layers"), "its prompts read themselves in both directions"),
}
REFUSED: dict[str, dict[str, str]] = {
    **{name: NO_PIXELS if name in CONCATENATING else NO_BLOCKS for name in SMALL},
    "PaliGemmaForConditionalGeneration": BOTH_WAYS,
    "Qwen3VLMoeForConditionalGeneration": {**NO_BLOCKS, "feed_forward": "not every layer of its decoder has one"},
}
"""By class and check, what is not exact; everything else is."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(
    scope="module", params=[*MOST, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name not in MOST)]
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageSubject:
    return vision_language_subject(request.param, tmp_path_factory.mktemp("small"))


def test_every_class_has_a_small_checkpoint() -> None:
    assert set(KINDS) == set(SMALL)


def test_every_other_class_is_refused_by_name(tmp_path: Path) -> None:
    others = other_classes()
    assert len(others) > 50
    assert set(NOT_TAKEN) <= others
    for name in sorted(others):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name], "model_type": "llava"}))
        with pytest.raises(Infeasible) as refused:
            family_of("hf:").info(f"hf:{tmp_path}", {})
        assert f"{name} is a vision-language model, and " in str(refused.value)
        assert "allowed: LlavaForConditionalGeneration, LlavaNextFor" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_every_place_is_exact_or_refused_and_on_the_page(subject: VisionLanguageSubject) -> None:
    found = examined(f"hf:{subject.folder}", VISION_LANGUAGE_CHECKS, lambda: subject)
    refused = REFUSED[type(subject.stock).__name__]
    for name, finding in found.items():
        assert finding.verdict == ("refused" if name in refused else EXACT), (name, str(finding))
        assert refused.get(name, "") in finding.why
    if f"transformers {transformers.__version__} knows" in PAGE.read_text().replace("\n", " "):
        assert class_line(type(subject.stock).__name__, found) in PAGE.read_text().splitlines()


def test_pictures_of_all_sizes(subject: VisionLanguageSubject) -> None:
    """Ids are those of transformers' processor, and logits those of its module."""
    side, model = subject.model.side, subject.model
    text = _processor(subject)
    rng = torch.Generator().manual_seed(5)
    for height, width in SIZES:
        values = torch.randint(0, 256, (height, width, 3), generator=rng, dtype=torch.uint8).numpy()
        picture = Image.fromarray(values)
        layout = side.layout(height, width)
        ids = side.ids(layout, side.tokens(layout))
        assert ids.tolist() == model.tokenizer(text(picture), add_special_tokens=False)["input_ids"], (height, width)
        shown = showing(subject, picture)
        expected = stock_logits(subject.stock, shown.inputs(0, picture=ids))[:, -1]
        torch.testing.assert_close(model.answer_logits(shown.batch([0], layout)), expected, atol=1e-4, rtol=1e-4)


def test_what_a_class_does_to_its_logits_is_done(
    subject: VisionLanguageSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every shape of states, as its own forward pass has it, here with a cap in the config that some classes apply."""
    model, states = subject.model, []
    monkeypatch.setattr(model.module.config.get_text_config(), "final_logit_softcapping", 0.5, raising=False)
    listening = model.decoder.register_forward_hook(lambda _, args, output: states.append(output.last_hidden_state))
    try:
        logits_1TW = stock_logits(model.module, subject.inputs(0))
    finally:
        listening.remove()
    torch.testing.assert_close(model.head(states[0]), logits_1TW)
    torch.testing.assert_close(model.head(states[0][0, -2:]), logits_1TW[0, -2:], atol=1e-5, rtol=1e-5)


def test_greedy_answers_are_those_of_transformers(subject: VisionLanguageSubject) -> None:
    model = subject.model
    for row in range(2):
        said = torch.stack(list(model.generated(model.prompt_of(subject.batch([row])), 5)), dim=1)
        inputs = subject.inputs(row)
        stock = subject.stock.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert said.tolist() == stock[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("method", ["avgpool", "random", "uniform-grid", "vtc-cls"])
def test_visual_token_methods_leave_what_they_plan(subject: VisionLanguageSubject, method: str) -> None:
    model, whole = subject.model, subject.model.info.tokens_of_image()
    left = 1 if method == "avgpool" else 4
    chosen = build(method, {"keep" if method == "vtc-cls" else "tokens": left})
    if not model.info.square and method != "random":
        with pytest.raises(Infeasible, match=r"square grid of patches|attention in the vision tower"):
            chosen.check(model.info)
        return
    chosen.check(model.info)
    side = int(model.vision.image_size)
    picture = Image.new("RGB", (side, side), (200, 30, 90))
    layout = model.side.layout(side, side)
    assert model.side.tokens(layout) == whole
    with chosen.apply(model, None):
        batch = showing(subject, picture).batch([0], layout)
        visual_BVd = model.project(model.compress(batch).tokens_BVD, layout)
        one, prompt = model.answer_logits(batch), model.prompt_of(batch)
        steps = model.stepwise(prompt, subject.answer_BS[:1])
    planned = chosen.axes(model.info)
    assert visual_BVd.shape[1] == planned.V == model.info.views * left + model.info.newlines
    assert planned.ratio == pytest.approx(whole / planned.V)
    assert int(prompt.layout().count) == planned.V
    torch.testing.assert_close(steps[:, 0], one, atol=1e-4, rtol=1e-4)


def test_more_tokens_than_a_picture_has(subject: VisionLanguageSubject) -> None:
    """Refused where all views are alike; a picture in a shape of its own keeps what it has, as if nothing were compressed."""
    model, method = subject.model, build("random", {"tokens": 2000})
    if model.info.square:
        with pytest.raises(Infeasible, match="tokens = 2000 exceeds the"):
            method.check(model.info)
        return
    method.check(model.info)
    assert method.axes(model.info).ratio == 1
    with method.apply(model, None):
        found = model.answer_logits(subject.batch([0]))
    torch.testing.assert_close(found, subject.alone[0][:1], atol=1e-4, rtol=1e-4)


def test_attention_in_the_tower_is_that_of_eager_attention(subject: VisionLanguageSubject) -> None:
    """Of the class token where there is one, of all patches else; the mean of the patches that become a token."""
    model, side = subject.model, subject.model.side
    if not model.info.square:
        with pytest.raises(Infeasible, match="keeps queries, keys and values in one matrix; asked: attention-0"):
            side.read(side.pixels(subject.pictures), [attention_in(0)], side.layout(*SIZE))
        return
    pixels, tower = side.pixels(subject.pictures), side.vision.tower
    found = side.read(pixels, [attention_in(0)], side.layout(*SIZE))[attention_in(0)]
    seen = side.vision.preprocess(pixels) if not side.sized else pixels
    config, prefix = tower.config, side.vision.prefix
    before = config._attn_implementation
    try:
        tower.set_attn_implementation("eager")
        given = tower(seen, output_attentions=True).attentions[0]
    finally:
        tower.set_attn_implementation(before)
    rows = given[:, :, :1] if prefix else given
    expected = rows.mean((1, 2))[:, prefix:]
    ratio = expected.shape[1] // side.patches
    torch.testing.assert_close(found.sum(1) * ratio, expected.sum(1), atol=1e-5, rtol=1e-4)
    if ratio == 1:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
        return
    grid, block = round(side.patches**0.5), round(ratio**0.5)
    blocks = expected.view(len(found), grid, block, grid, block).mean((2, 4)).flatten(1)
    torch.testing.assert_close(found, blocks, atol=1e-6, rtol=1e-4)


def test_a_compressed_image_is_the_same_at_once_and_in_steps(subject: VisionLanguageSubject) -> None:
    """The cache of the image is compressed before the question is seen, however the question comes."""
    model = subject.model
    if model.side.bidirectional:
        with pytest.raises(Infeasible, match="no image can be compressed before its question"):
            build("knorm", {"keep": 0.5}).check(model.info)
        whole, prompt = WholeCache(model.info.dense_bits, bidirectional=True), model.prompt_of(subject.batch([0]))
        with model.occupy(ATTENTION, whole, own=True):
            model.stepwise(prompt, subject.answer_BS[:1, :0])
        assert whole.report().stored == model.dense_cache_bytes(prompt.length)
        return
    for method in (build("knorm", {"keep": 0.5}), build("fastv", {"drop": 0.5, "layer": 1})):
        with method.apply(model, None):
            prompt = model.prompt_of(subject.batch([0]))
            once = model.run(prompt.followed_by(model.embed_text(subject.answer_BS[:1])))
            steps = model.stepwise(prompt, subject.answer_BS[:1])
        torch.testing.assert_close(steps[:, -1], once, atol=1e-4, rtol=1e-4)


def test_what_is_added_between_layers_follows_the_tokens_that_are_left(subject: VisionLanguageSubject) -> None:
    """By hand, layer by layer, without masks, hooks or a cache."""
    model, decoder = subject.model, subject.model.decoder
    if DECODER_LAYERS not in model.info.hooks:
        return
    prompt = model.prompt_of(subject.batch([0]))
    with build("fastv", {"drop": 0.5, "layer": 1}).apply(model, None):
        found = model.run(prompt)
        dropping = model.occupant(DECODER_LAYERS)
        assert dropping is not None
        assert dropping.left_BK is not None
        left = dropping.left_BK[0]
    assert len(left) == prompt.length - int(prompt.of({"image"}).sum()) // 2
    x, deep, positions = prompt.embeds_BLd, prompt.deep, prompt.position_ids
    for number, layer in enumerate(decoder.layers):
        if number == 1:
            x, deep, positions = x[:, left], tuple(d[:, left] for d in deep), positions[..., left]
        rotary = decoder.rotary_emb(x, positions)
        x = layer(x, attention_mask=None, position_embeddings=rotary)
        x = x + deep[number] if number < len(deep) else x
    torch.testing.assert_close(found, model.head(decoder.norm(x)[:, -1]), atol=1e-4, rtol=1e-4)


def test_places_among_views_are_refused(subject: VisionLanguageSubject) -> None:
    model = subject.model
    with build("random", {"tokens": 4, "keep_positions": "original"}).apply(model, None):
        if model.side.keeps_places:
            return
        with pytest.raises(Infeasible, match="allowed: places in a row"):
            model.answer_logits(subject.batch([0]))


def test_kept_patches_stand_where_they_stood(subject: VisionLanguageSubject) -> None:
    """By row and column, and the text behind them where it would stand; in a row they are counted like text."""
    model = subject.model
    if not model.side.keeps_places:
        return
    whole, batch = model.prompt_of(subject.batch([1])), subject.batch([1])
    for places in ("original", "contiguous"):
        method = build("random", {"tokens": 4, "keep_positions": places})
        with method.apply(model, None):
            left, kept_1V = model.prompt_of(batch), model.compress(batch).kept_BV
        assert kept_1V is not None
        positions = (left.position_ids[..., 0, :], whole.position_ids[..., 0, :])
        if places == "contiguous":
            first = model.side.first_position
            assert positions[0].tolist() == list(range(first, first + left.length))
            continue
        image = whole.of({"image"})[0]
        stays = torch.cat((image.nonzero()[:, 0][kept_1V[0]], (~image).nonzero()[:, 0])).sort().values
        assert torch.equal(positions[0], positions[1][..., stays])
        assert torch.equal(left.next_B, whole.next_B)
        assert [deep.shape[1] for deep in left.deep] == [left.length] * len(whole.deep)
        for some, every in zip(left.deep, whole.deep, strict=True):
            torch.testing.assert_close(some, every[:, stays])


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_sixteen_bits(subject: VisionLanguageSubject, dtype: str, tolerance: float, tmp_path: Path) -> None:
    """As far from float32 as transformers' own module in the same type, or nearer."""
    ref, family = f"hf:{subject.folder}", family_of("hf:")
    model = family.load(family.info(ref, {"dtype": dtype}), None, FolderContext(tmp_path))
    assert isinstance(model, VlmModel)
    half = VisionLanguageSubject(subject.folder, model.module, model)
    found = model.answer_logits(half.batch([0])).float()
    stock = stock_logits(model.module, half.inputs(0))[:, -1].float()
    exact = subject.alone[0][:1]
    largest = exact.abs().max()
    assert (found - stock).abs().max() <= tolerance * largest
    assert (found - exact).abs().max() <= 2 * (stock - exact).abs().max() + tolerance * largest


def test_a_folder_without_its_processor_is_refused(subject: VisionLanguageSubject, tmp_path: Path) -> None:
    if not subject.model.side.sized:
        return
    subject.stock.config.save_pretrained(tmp_path)
    with pytest.raises(Infeasible, match=r"holds no preprocessor_config.json; allowed: a checkpoint saved with its"):
        family_of("hf:").info(f"hf:{tmp_path}", {})
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    (tmp_path / "tokenizer.json").write_text((subject.folder / "tokenizer.json").read_text())
    with pytest.raises(UserError, match=r"preprocessor_config.json: transformers makes no image processor of it"):
        family_of("hf:").info(f"hf:{tmp_path}", {})


def test_a_processor_that_cuts_otherwise_than_the_config_packs_is_refused(
    subject: VisionLanguageSubject, tmp_path: Path
) -> None:
    """Crops of another size; where pictures keep their own shape there is nothing to disagree on."""
    stored = json.loads((subject.folder / "preprocessor_config.json").read_text())
    if not subject.model.side.sized or not subject.model.info.square:
        return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((subject.folder / name).read_text())
    subject.stock.config.save_pretrained(tmp_path)
    larger = {
        key: {side: 2 * pixels for side, pixels in value.items() if pixels}
        for key, value in stored.items()
        if key.endswith("size") and isinstance(value, dict)
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**stored, **larger}))
    with pytest.raises(Infeasible, match=r"its processor (cuts crops|gives views) of 48 pixels"):
        family_of("hf:").info(f"hf:{tmp_path}", {})


def showing(subject: VisionLanguageSubject, picture: Any) -> VisionLanguageSubject:
    """The same model with another picture in its first prompt."""
    shown = dataclasses.replace(subject)
    vars(shown)["pictures"] = [picture]
    return shown


def _processor(subject: VisionLanguageSubject) -> Callable[[Any], str]:
    """Text that transformers' processor of the class puts in place of a picture.

    Processors that want torchvision for films are made without it.
    """
    small, name = SMALL[type(subject.stock).__name__], type(subject.stock).__name__
    images = getattr(transformers, small.processor).from_pretrained(subject.folder)
    kind = getattr(transformers, name.replace("Moe", "").replace("ForConditionalGeneration", "Processor"))
    made = kind.__new__(kind)
    made.image_processor, made.tokenizer = images, subject.model.tokenizer
    config = subject.stock.config
    vars(made).update(
        image_token=small.image, patch_size=config.vision_config.patch_size, num_image_tokens=36, num_additional_image_tokens=0,
        vision_feature_select_strategy=getattr(config, "vision_feature_select_strategy", None),
        vision_aspect_ratio=getattr(config, "vision_aspect_ratio", None),
        image_seq_len=9, image_seq_length=subject.model.side.patches, start_image_token="<img>", end_image_token="</img>",
        fake_image_token="<fake_token_around_image>", global_image_tag="<global-img>", global_image_token="<global-img>",
    )  # fmt: skip
    if made.vision_feature_select_strategy == "default":
        made.num_additional_image_tokens = 1

    def text(picture: Any) -> str:
        told = {**small.told, **({"return_row_col_info": True} if hasattr(images, "max_image_size") else {})}
        found: str = made.replace_image_token(images(images=[picture], return_tensors="pt", **told), 0)
        return found

    return text
