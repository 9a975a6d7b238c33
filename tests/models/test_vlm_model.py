"""The model class: placeholders, padding, and agreement with the stock Hugging Face forward."""

from __future__ import annotations

import pytest
import torch

from isoflop.core.errors import Infeasible
from isoflop.methods.kv_cache.full_cache import FullCache
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.models.vlm import expand_placeholders
from isoflop.models.vlm_info import VlmBatch
from isoflop.models.worlds import digit_world as world


@pytest.fixture(scope="module")
def probe() -> VisualTokenProbe:
    return VisualTokenProbe()


def test_expand_placeholders() -> None:
    ids = torch.tensor([[7, 1, 8], [1, 9, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    expanded, wide, picture = expand_placeholders(ids, mask, 1, torch.tensor([1, 5, 1]))
    assert expanded.tolist() == [[7, 1, 5, 1, 8], [1, 5, 1, 9, 9]]
    assert picture.tolist() == [[False, True, True, True, False], [True, True, True, False, False]]
    assert wide is not None
    assert wide.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="exactly one"):
        expand_placeholders(torch.tensor([[1, 1, 8]]), None, 1, torch.tensor([1, 1, 1]))


def test_without_compression_equals_the_stock_forward_on_pixels(probe: VisualTokenProbe) -> None:
    rows = list(range(probe.examples))
    picture = torch.full((world.TILES,), world.IMAGE)
    ids, _, _ = expand_placeholders(probe.batch(rows).prompt_BT, None, world.IMAGE, picture)
    with torch.no_grad():
        stock = probe.model.module(input_ids=ids, pixel_values=probe.model.vision.preprocess(probe._images)).logits[
            :, -1
        ]
    torch.testing.assert_close(probe.outputs(rows), stock, atol=1e-6, rtol=1e-5)


def test_left_padding_changes_nothing(probe: VisualTokenProbe) -> None:
    batch = probe.batch([0, 1, 2])
    pad = torch.full((3, 2), world.PAD)
    assert batch.question_BQ is not None
    padded = VlmBatch(
        batch.hidden,
        torch.cat((pad, batch.prompt_BT), dim=1),
        torch.cat((pad, batch.question_BQ), dim=1),
        batch.ids_B,
        prompt_mask_BT=torch.cat((torch.zeros(3, 2), torch.ones(batch.prompt_BT.shape)), dim=1).long(),
        question_mask_BQ=torch.cat((torch.zeros(3, 2), torch.ones(3, 2)), dim=1).long(),
    )
    torch.testing.assert_close(
        probe.model.answer_logits(padded), probe.model.answer_logits(batch), atol=1e-5, rtol=1e-4
    )
    plain = probe.model.encode_text(batch.question_BQ)
    wide = probe.model.encode_text(padded.question_BQ, padded.question_mask_BQ)
    torch.testing.assert_close(wide[:, 2:], plain, atol=1e-5, rtol=1e-4)


def test_only_needed_layers_are_kept(probe: VisualTokenProbe) -> None:
    assert set(probe.model.look(probe._images)) == {1}


def test_images_that_end_in_other_columns_are_refused_with_a_method_on_the_cache(probe: VisualTokenProbe) -> None:
    batch = probe.batch(range(2))
    assert batch.question_BQ is not None
    read = batch.question_BQ[:, :1]
    prompt = torch.stack(
        (torch.cat((batch.prompt_BT[0], read[0])), torch.cat((read[1], batch.prompt_BT[1])))
    )  # the image first, and behind a word
    uneven = VlmBatch(batch.hidden, prompt, None, batch.ids_B)
    probe.model.answer_logits(uneven)
    with FullCache().apply(probe.model, None), pytest.raises(Infeasible, match="end in the same column"):
        probe.model.answer_logits(uneven)
