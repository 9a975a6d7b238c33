"""Every text encoder of transformers is exact or refused in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models import encoder as encoder_module
from isoflop.models.checkpoints.encoder import HEADS, REFUSED, REFUSED_HEADS
from isoflop.models.family import family_of
from isoflop.models.lm import NOT_SCORED, calibrated_on
from isoflop.testing.architectures.encoders import (
    ENCODER_CHECKS,
    context,
    encoder_classes,
    examine_encoder,
    loaded,
    save_encoder,
    small_encoder,
)

FAST = [
    *(f"Bert{ends}" for ends in HEADS), "RobertaForMaskedLM", "DistilBertModel", "MPNetForMaskedLM", "ModernBertForSequenceClassification",
    "XLMRobertaModel", "DebertaV2ForMultipleChoice", "NomicBertModel",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def check(architecture: str, folder: Path) -> None:
    found = {name: str(finding) for name, finding in examine_encoder(architecture, folder).items()}
    if architecture in REFUSED_HEADS or architecture.removesuffix("Model") in REFUSED:
        assert {text.startswith(f"refused: {architecture} is not taken: ") for text in found.values()} == {True}
        return
    if architecture.startswith("DebertaFor") or architecture == "DebertaModel":
        assert found.pop("16 bits") == f"refused: transformers computes {architecture} in 32 bits only"
    assert set(found.values()) == {"exact"}, found


@pytest.mark.parametrize("architecture", [*FAST, *REFUSED_HEADS, *(f"{begins}Model" for begins in REFUSED)])
def test_an_encoder_is_exact_or_refused(architecture: str, tmp_path: Path) -> None:
    check(architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in encoder_classes() if name not in FAST])
def test_every_encoder_is_exact_or_refused(architecture: str, tmp_path: Path) -> None:
    check(architecture, tmp_path)


def test_what_pads_without_a_mask_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def maskless(self: encoder_module.EncoderBatch, device: torch.device) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids_BT, "attention_mask": torch.ones_like(self.ids_BT)}

    monkeypatch.setattr(encoder_module.EncoderBatch, "inputs", maskless)
    found = examine_encoder("BertModel", tmp_path, {"one pass": ENCODER_CHECKS["one pass"]})
    assert str(found["one pass"]).startswith("wrong: the model as it comes is off by")


@pytest.mark.parametrize(
    ("method", "architecture", "why"),
    [
        ("snapkv", "BertModel", r"needs attention, which model .* does not offer \(it offers: matrices, embeddings, tokenizer\)"),
        ("evopress", "BertModel", "goes by the loss on calibration text, and model .* has no head that predicts tokens"),
        ("bitstack", "BertForSequenceClassification", "with sort = perplexity goes by the loss"),
        ("evopress-drop", "BertForMaskedLM", "needs attention"),
    ],
)  # fmt: skip
def test_what_needs_a_cache_or_a_loss_is_refused_at_plan(
    method: str, architecture: str, why: str, tmp_path: Path
) -> None:
    save_encoder(small_encoder(architecture), tmp_path / "m")
    with pytest.raises(Infeasible, match=why) as refused:
        build(method, {}).check(family_of("hf:x").info(f"hf:{tmp_path / 'm'}", {}))
    assert "\n" not in str(refused.value)


def test_n_counts_the_blocks_and_positions_leave_out_that_of_padding(tmp_path: Path) -> None:
    for name, positions in (("BertModel", 64), ("RobertaModel", 62)):
        save_encoder(small_encoder(name), tmp_path / name)
        model = loaded(f"hf:{tmp_path / name}")
        assert model.info.n_params == sum(p.numel() for p in model.module.encoder.parameters())
        assert model.info.geometry["positions"] == positions
        long = "a" * 100
        assert len(model.tokens(long)["input_ids"]) == positions
        assert model.embed_all([long], query=True).isfinite().all()
        with pytest.raises(Infeasible, match=rf"102 tokens is longer than the {positions}"):
            model.tokens(long, cut=False)


def test_other_heads_and_labels_are_refused(tmp_path: Path) -> None:
    save_encoder(small_encoder("BertForTokenClassification"), tmp_path / "a")
    with pytest.raises(Infeasible, match="BertForTokenClassification is not taken: no task asks for its head"):
        family_of("hf:x").info(f"hf:{tmp_path / 'a'}", {})
    stock = small_encoder("BertForSequenceClassification")
    stock.config.num_labels = 3
    save_encoder(stock, tmp_path / "b")
    with pytest.raises(Infeasible, match="has 3 labels; allowed: one, which ranks pairs"):
        family_of("hf:x").info(f"hf:{tmp_path / 'b'}", {})
    small_encoder("BertModel").save_pretrained(tmp_path / "c")
    with pytest.raises(Infeasible, match="no fast tokenizer"):
        family_of("hf:x").info(f"hf:{tmp_path / 'c'}", {})


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path: Path) -> None:
    """A pooler is, since embeddings never ask it."""
    from transformers import AutoConfig

    save_encoder(small_encoder("BertModel", hidden_size=32), tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m")
    config.architectures = ["BertForSequenceClassification"]
    config.num_labels = 1
    config.save_pretrained(tmp_path / "m")
    with pytest.raises(
        UserError, match=r"BertForSequenceClassification needs classifier\.bias and 1 more, which its safetensors"
    ):
        loaded(f"hf:{tmp_path / 'm'}")
    save_encoder(small_encoder("BertForMaskedLM"), tmp_path / "n")
    (tmp_path / "n" / "modules.json").write_text(
        '[{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]'
    )
    (tmp_path / "n" / "1_Pooling").mkdir()
    (tmp_path / "n" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert loaded(f"hf:{tmp_path / 'n'}").info.head == "embedding"


def test_a_text_of_ones_own_calibrates(tmp_path: Path) -> None:
    save_encoder(small_encoder("BertForMaskedLM"), tmp_path / "m")
    (tmp_path / "a.txt").write_text("abc def ghi " * 40)
    model = loaded(f"hf:{tmp_path / 'm'}")
    info = calibrated_on(model.info, {"data": str(tmp_path / "a.txt"), "length": 20})
    assert isinstance(info, encoder_module.EncoderInfo)
    model.info = info
    (batch,) = model.calibration(FolderContext(tmp_path / "stages"), 16, 0)
    assert batch.ids_BT.shape == (16, 22)
    assert batch.targets_BT is not None
    masked = batch.targets_BT != NOT_SCORED
    assert 0 < masked.sum() < masked.numel() / 3
    assert (batch.ids_BT[masked] == model.tokenizer.mask_token_id).all()
    assert (batch.ids_BT[:, 0] == 0).all()
    assert (batch.ids_BT[:, -1] == 2).all()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "tokenizer.json is no valid JSON"),
        ("[]", "tokenizer.json holds a JSON value of the type list; allowed: an object"),
        ('{"model": 5}', "tokenizer.json: transformers makes no tokenizer of it"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_told_in_one_line(content: str, told: str, tmp_path: Path) -> None:
    save_encoder(small_encoder("BertModel"), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as refused:
        assert loaded(f"hf:{tmp_path / 'm'}").tokenizer
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_windows_of_ones_own_text_are_read_whole_or_refused(tmp_path: Path) -> None:
    """With no length said, they are as long as fits between the special tokens."""
    save_encoder(small_encoder("BertForMaskedLM"), tmp_path / "m")
    (tmp_path / "a.txt").write_text("abc def ghi " * 400)
    choice, model = {"data": str(tmp_path / "a.txt")}, loaded(f"hf:{tmp_path / 'm'}")
    for cut in (model.info.tokens_at_most, 12):
        info = dataclasses.replace(model.info, tokens_at_most=cut)
        for length, wide in ((None, cut), (cut - 2, cut), (5, 7)):
            model.info = calibrated_on(info, choice if length is None else {**choice, "length": length})
            (batch,) = model.calibration(FolderContext(tmp_path / "stages"), 2, 0)
            assert batch.ids_BT.shape == (2, wide)
        with pytest.raises(Infeasible, match=rf"length = {cut - 1} is more than the {cut - 2} tokens that a text of"):
            calibrated_on(info, {**choice, "length": cut - 1})


def test_what_goes_by_a_loss_runs_on_an_encoder_that_fills_masks(tmp_path: Path) -> None:
    save_encoder(small_encoder("BertForMaskedLM"), tmp_path / "m")
    model, ctx = loaded(f"hf:{tmp_path / 'm'}"), context()
    logits = model.supervised(next(model.calibration(ctx, 2, 0)))[0]
    search = build(
        "evopress", {"bits": 4.0, "group": 8, "generations": 2, "offspring": 2, "n_search": 4, "survivors": 1}
    )
    stacks = build("bitstack", {"bits": 4.0, "k": 1, "n_iter": 4, "n_calib": 4, "n_sort": 2})
    for method in (search, stacks):
        method.check(model.info)
        with method.apply(model, method.calibrate(model, ctx, 0)):
            assert not torch.equal(model.supervised(next(model.calibration(ctx, 2, 0)))[0], logits)
    assert torch.equal(model.supervised(next(model.calibration(ctx, 2, 0)))[0], logits)
