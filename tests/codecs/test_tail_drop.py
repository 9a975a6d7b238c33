"""What tail drop is for: trained with it, every prefix decodes well; trained without, only the whole code does.

Images of four flat squares on a common shade are easy enough for a tokenizer to learn in seconds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isoflop.methods.budgets import BudgetSampler
from isoflop.methods.codecs.one_d_piece import OneDPiece, contributions
from isoflop.methods.codecs.tokenizer_training import Recipe, TokenizerLesson, Trainer
from isoflop.models.family import family_of
from isoflop.models.networks.image_tokenizer import Tokenizer, TokenizerSize
from isoflop.models.training.loop import descend
from isoflop.models.worlds.sprite_world import ImageSet
from isoflop.testing import FolderContext

TOKENS = 4
SIZE = TokenizerSize(8, 3, 4, TOKENS, 4, "vq", 8, True, 32, 1, 2)
RECIPE = Recipe(300, 64, 5e-3, "every", True, 0.0, 0.1, 20)


def squares(count: int, seed: int) -> Tensor:
    """Images (count, 3, 8, 8): a shade of grey that all share, and a smaller one for each quarter."""
    generator = torch.Generator().manual_seed(seed)
    shade = torch.rand(count, 1, 1, 1, generator=generator) * 0.6
    quarters = torch.rand(count, 1, 2, 2, generator=generator) * 0.4
    return (shade + quarters).repeat_interleave(4, -1).repeat_interleave(4, -2).expand(-1, 3, -1, -1).contiguous()


def trained(drop: str) -> Tokenizer:
    recipe = dataclasses.replace(RECIPE, drop=drop, each=drop != "full")
    net = Tokenizer(SIZE, 0)
    trainer, sampler = Trainer(net, recipe, 0), BudgetSampler(drop, TOKENS, TOKENS)
    steps = (
        TokenizerLesson(n, squares(recipe.batch, n), torch.tensor(sampler.draw_each(n, 0, recipe.batch)))
        for n in range(recipe.steps)
    )
    descend(torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=1e-4), recipe, steps, trainer.loss)
    return net.eval().requires_grad_(False)


def errors(net: Tokenizer, images: Tensor) -> list[float]:
    codes = net.encode(images)
    lengths = range(1, codes.shape[1] + 1)
    return [float((net.decode(codes[:, :length]) - images).square().mean()) for length in lengths]


def test_prefixes_decode_well_after_tail_drop_only() -> None:
    """Over five trainings the ratios are .60 to .65, .72 to .75, .41 to .57 and .08 to .23. Whether every token lowers the error, and
    what the whole code pays for its prefixes, differs from one to the next."""
    images = squares(256, 10_000)
    mean = float((images - images.mean(0)).square().mean())
    dropped, whole = (errors(trained(drop), images) for drop in ("every", "full"))
    assert dropped[0] < 0.9 * (mean / 2)
    assert dropped[1] < 0.9 * dropped[0]
    assert sum(dropped[:-1]) < sum(whole[:-1])
    assert whole[-1] < 0.7 * whole[0]


class Weighted(Tokenizer):
    """Codes at random, and images as grey as a weighted sum of them."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__(SIZE, 0)
        self.weights = torch.tensor(weights)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(9)
        return torch.randint(self.quantizer.codes, (len(images_BCHW), TOKENS), generator=generator)

    def decode(self, codes_BL: Tensor) -> Tensor:
        return (codes_BL * self.weights).sum(1)[:, None, None, None].expand(-1, 3, 8, 8)


def test_a_tokens_contribution_is_what_the_image_changes_without_it() -> None:
    change = contributions(Weighted([4.0, 2.0, 1.0, 0.0]), torch.zeros(4000, 3, 8, 8))
    assert (change[:3] / change[2]).tolist() == pytest.approx([16.0, 4.0, 1.0], rel=0.1)
    assert float(change[3]) == 0.0


@pytest.mark.slow
def test_error_falls_with_every_doubling_of_the_tokens_of_real_digits(tmp_path: Path) -> None:
    """The recipe of ``sweeps/one-d-piece.yaml`` in half of its steps, the default."""
    info = family_of("tiny-vit/c48").info("tiny-vit/c48", {})
    images = torch.from_numpy(next(ImageSet("digits", "test", 256, 0.4, 1).images()))
    found = {}
    for drop in ("uniform", "none"):
        method = OneDPiece(tail_drop=drop, drop_scope="sample")
        curve = errors(FolderContext(tmp_path).get(method.prepare(info, None, 0)), images)
        found[drop] = [curve[n - 1] for n in (1, 2, 4, 8, 16, 32)]
    assert found["uniform"] == sorted(found["uniform"], reverse=True)
    assert all(a < b for a, b in zip(found["uniform"][:-1], found["none"][:-1], strict=True))
