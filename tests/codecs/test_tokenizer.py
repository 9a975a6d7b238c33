"""The tokenizer's networks and their training: what is dropped when, what learns when."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isoflop.methods.codecs.one_d_piece import OneDPiece
from isoflop.methods.codecs.tokenizer_training import Recipe, TokenizerLesson, Trainer, lessons
from isoflop.models.family import family_of
from isoflop.models.networks.image_tokenizer import Tokenizer, from_patches, to_patches
from isoflop.models.networks.quantizers import COMMITMENT
from isoflop.models.worlds.sprite_world import ImageSet
from isoflop.testing import FolderContext

SMALL = OneDPiece(tokens=2, n_latent=6, codebook_size=16, patch=8, width=32, layers=1, steps=8, batch=8, revive=2)


def tokenizer() -> Tokenizer:
    return Tokenizer(SMALL.size, 0)


def images(count: int = 5) -> Tensor:
    return torch.from_numpy(next(ImageSet("digits", "train", count, 0.0, 3).images()))


def quantized(net: Tokenizer) -> Tensor:
    return net.quantizer(net.latents(images())).values_BLD


@pytest.mark.parametrize("length", [1, 3, 6])
def test_decoding_a_length_is_decoding_the_prefix_exactly(length: int) -> None:
    net = tokenizer().eval()
    q = quantized(net)
    assert torch.equal(net.render(q, length=length), net.render(q[:, :length]))
    codes = net.encode(images())
    torch.testing.assert_close(net.decode(codes[:, :length]), net.render(q, length=length).clamp(0, 1))


def test_no_mode_of_the_network_drops_anything() -> None:
    net = tokenizer()
    q = quantized(net)
    assert torch.equal(net.train().render(q), net.eval().render(q))
    assert not torch.allclose(net.render(q), net.render(q, length=3), atol=1e-4)


def test_a_length_for_each_image_is_what_cutting_gives_and_ignores_the_tail() -> None:
    net = tokenizer()
    q = quantized(net)
    kept = torch.tensor([1, 6, 3, 2, 5])
    masked = net.render(q, kept_B=kept)
    for row, length in enumerate(kept.tolist()):
        torch.testing.assert_close(masked[row], net.render(q[row : row + 1], length)[0], atol=1e-5, rtol=1e-5)
    other = q.clone()
    for row, length in enumerate(kept.tolist()):
        other[row, length:] = 7.0
    assert torch.equal(net.render(other, kept_B=kept), masked)


def test_encoding_does_not_depend_on_the_batch_or_on_the_global_random_state() -> None:
    state = torch.random.get_rng_state()
    net, again = tokenizer(), tokenizer()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    whole = net.encode(images())
    assert torch.equal(torch.cat([net.encode(image[None]) for image in images()]), whole)


def test_patches_are_put_back_where_they_were() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    patches = to_patches(x, 4)
    assert torch.equal(patches[0, 1].view(3, 4, 4), x[0, :, :4, 4:])
    assert torch.equal(from_patches(patches, 4, 3), x)


def trainer(**changes: object) -> Trainer:
    recipe = dataclasses.replace(SMALL.recipe, **changes)  # type: ignore[arg-type]
    return Trainer(tokenizer(), recipe, 0)


def test_stage_two_leaves_encoder_and_codebook_without_gradients() -> None:
    run = trainer()
    step = next(lessons(run.recipe, 6, "digits", 0))
    run.loss(step).backward()
    net = run.tokenizer
    assert all(p.grad is not None for p in net.parameters())
    net.freeze_encoder()
    run.loss(step).backward()
    frozen = [*net.encoder.parameters(), *net.quantizer.parameters()]
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in net.decoder.parameters())


def test_stage_two_of_a_training_changes_the_decoder_only() -> None:
    """With all but one of the steps in stage two, two trainings of different lengths differ in the decoder alone."""
    nets = []
    for steps, second in ((4, 0.75), (8, 0.875)):
        run = trainer(steps=steps, second=second, revive=0)
        assert run.recipe.second_steps == steps - 1
        assert len(run.run("digits", 0)) == steps
        nets.append(run.tokenizer)
    first, longer = nets
    assert not longer.training
    for name, parameter in longer.named_parameters():
        same = torch.equal(parameter, dict(first.named_parameters())[name])
        assert same == name.startswith(("encoder", "quantizer")), name


def test_the_quantizer_sees_all_tokens_and_the_decoder_the_kept_ones() -> None:
    run = trainer(quantizer_weight=0.0)
    step = dataclasses.replace(next(lessons(run.recipe, 6, "digits", 0)), kept_B=torch.full((8,), 2))
    run.loss(step).backward()
    places = run.tokenizer.decoder.latent_places_LE.grad
    assert places is not None
    assert [bool(row.any()) for row in places] == [True, True, False, False, False, False]

    net = tokenizer()
    latents = torch.nn.functional.normalize(net.latents(step.images_BCHW), dim=-1).detach()
    gaps = (net.quantizer.lookup(net.encode(step.images_BCHW)).detach() - latents).square()
    weighted = float(
        trainer(quantizer_weight=1.0).loss(step).detach() - trainer(quantizer_weight=0.0).loss(step).detach()
    )
    assert weighted == pytest.approx((1 + COMMITMENT) * float(gaps.mean()), rel=1e-4)
    assert weighted != pytest.approx((1 + COMMITMENT) * float(gaps[:, :2].mean()), rel=1e-2)


def test_the_tail_is_dropped_in_both_stages() -> None:
    kept: dict[bool, list[Tensor]] = {True: [], False: []}

    class Recording(Trainer):
        def loss(self, step: TokenizerLesson) -> Tensor:
            frozen = not any(p.requires_grad for p in self.tokenizer.encoder.parameters())
            kept[frozen].append(step.kept_B)
            return super().loss(step)

    recipe = dataclasses.replace(SMALL.recipe, steps=16, second=0.5, each=True)
    Recording(tokenizer(), recipe, 0).run("digits", 0)
    assert [len(kept[frozen]) for frozen in (False, True)] == [8, 8]
    for lengths in kept.values():
        assert set(torch.stack(lengths).unique().tolist()) == {*range(1, 7)}


def test_latent_tokens_see_the_whole_image_and_each_other() -> None:
    """No causal mask: the first token changes with the last pixel and with the last latent token, and the other way round."""
    net, x = tokenizer(), images(2)
    before = net.latents(x)
    corner = x.clone()
    corner[..., -1, -1] = 1 - corner[..., -1, -1]
    assert (net.latents(corner) - before).abs().amax((0, 2)).gt(1e-4).all()
    for place in (0, 5):
        other = tokenizer()
        with torch.no_grad():
            other.encoder.latents_LE[place, ::2] += 1  # of all channels alike, the norm would take it away
        assert (other.latents(x) - before).abs().amax((0, 2)).gt(1e-4).all()


@pytest.mark.parametrize("drop", ["every", "powers", "full"])
def test_lengths_of_a_training_are_those_of_the_policy(drop: str) -> None:
    recipe = Recipe(40, 8, 1e-3, drop, True, 0.0, 0.1, 0)
    kept = torch.stack([step.kept_B for step in lessons(recipe, 6, "digits", 0)])
    assert kept.shape == (40, 8)
    assert set(kept.unique().tolist()) == {"every": {*range(1, 7)}, "powers": {1, 2, 4, 6}, "full": {6}}[drop]
    batch = torch.stack([step.kept_B for step in lessons(dataclasses.replace(recipe, each=False), 6, "digits", 0)])
    assert torch.equal(batch, kept[:, :1].expand(40, 8))


def test_training_is_a_stage_that_no_kept_length_and_no_model_size_changes(tmp_path: Path) -> None:
    infos = [family_of(ref).info(ref, {}) for ref in ("tiny-vit/c48", "tiny-vit/c96", "tiny-vit/c48-sprites")]
    stage = SMALL.prepare(infos[0], None, 1)
    assert dataclasses.replace(SMALL, tokens=5).prepare(infos[1], None, 1).key == stage.key
    assert SMALL.prepare(infos[2], None, 1).key != stage.key
    assert SMALL.prepare(infos[0], None, 2).key != stage.key
    assert dataclasses.replace(SMALL, tail_drop="none").prepare(infos[0], None, 1).key != stage.key
    state = torch.random.get_rng_state()
    net, again = (FolderContext(tmp_path / name).get(stage) for name in ("a", "b"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not any(p.requires_grad for p in net.parameters())
