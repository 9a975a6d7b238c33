"""Quantizers against brute force, closed forms and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from isoflop.models.networks.quantizers import COMMITMENT, FiniteScalarQuantizer, VectorQuantizer, fsq_levels, usage_of


def vector_quantizer(codes: int, width: int, normalise: bool, seed: int) -> VectorQuantizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VectorQuantizer(codes, width, normalise)


@given(codes=st.sampled_from([4, 16, 64]), width=st.integers(2, 12), seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_vq_index_equals_brute_force_cosine_argmax_and_q_has_length_one(codes: int, width: int, seed: int) -> None:
    quantizer = vector_quantizer(codes, width, True, seed)
    z = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed))
    found = quantizer(z)
    for b in range(2):
        for i in range(5):
            cosines = [float(F.cosine_similarity(z[b, i], row, dim=0)) for row in quantizer.codebook_KD.detach()]
            assert cosines[found.indices_BL[b, i]] == pytest.approx(max(cosines), abs=1e-6)
    torch.testing.assert_close(found.values_BLD.norm(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(found.values_BLD, quantizer.lookup(found.indices_BL))


def test_without_normalisation_the_nearest_row_counts() -> None:
    quantizer = vector_quantizer(16, 3, False, 0)
    z = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1)) * 0.05
    distances = (z[:, :, None] - quantizer.codebook_KD).square().sum(-1)
    assert torch.equal(quantizer(z).indices_BL, distances.argmin(-1))


def test_gradients_pass_straight_through_and_the_loss_has_its_two_parts() -> None:
    quantizer = vector_quantizer(16, 4, True, 0)
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = quantizer(z)
    weights = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    (found.values_BLD * weights).sum().backward()
    through = z.grad
    z.grad = None
    (F.normalize(z, dim=-1) * weights).sum().backward()
    torch.testing.assert_close(through, z.grad)
    assert quantizer.codebook_KD.grad is None or not quantizer.codebook_KD.grad.any()

    found = quantizer(z)
    distance = (quantizer.lookup(found.indices_BL) - F.normalize(z, dim=-1)).square().mean()
    assert found.loss.item() == pytest.approx((1 + COMMITMENT) * distance.item(), rel=1e-5)
    (codebook,) = torch.autograd.grad(found.loss, quantizer.codebook_KD, retain_graph=True)
    (latents,) = torch.autograd.grad(found.loss, z)
    assert codebook.any()
    assert latents.any()
    unused = torch.ones(16, dtype=torch.bool)
    unused[found.indices_BL.flatten()] = False
    assert not codebook[unused].any()


def test_unused_codes_move_to_latents_and_the_others_stay() -> None:
    quantizer = vector_quantizer(8, 2, True, 0)
    before = quantizer.codebook_KD.detach().clone()
    used = torch.tensor([True, False] * 4)
    latents = F.normalize(torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(3)), dim=-1)
    assert quantizer.revive(used, latents, torch.Generator().manual_seed(0)) == 4
    after = quantizer.codebook_KD.detach()
    assert torch.equal(after[used], before[used])
    assert all(bool((latents.flatten(0, 1) == row).all(-1).any()) for row in after[~used])


LEVELS = (8, 8, 8, 5, 5, 5)
"""A configuration of 64,000 codes whose numbers are known."""


def test_fsq_codes_and_values_are_a_bijection() -> None:
    quantizer = FiniteScalarQuantizer(LEVELS)
    assert quantizer.codes == 64_000
    assert quantizer.basis_D.tolist() == [1, 8, 64, 512, 2560, 12800]
    values = quantizer.lookup(torch.arange(64_000)[None])
    assert len(torch.unique(values[0], dim=0)) == 64_000
    half = quantizer.levels_D // 2
    inside = values * half + 0.5 * (quantizer.levels_D % 2 == 0)
    reach = (quantizer.levels_D - 1) * (1 + quantizer.MARGIN) / 2
    offset = 0.5 * (quantizer.levels_D % 2 == 0)
    z = torch.atanh(inside / reach) - torch.atanh(offset / reach)
    found = quantizer(z)
    assert torch.equal(found.indices_BL[0], torch.arange(64_000))
    torch.testing.assert_close(found.values_BLD, values)


def test_fsq_values_of_zero_and_of_even_and_odd_levels() -> None:
    quantizer = FiniteScalarQuantizer(LEVELS)
    assert quantizer(torch.zeros(1, 1, 6)).indices_BL.item() == 32_036
    values = quantizer.lookup(torch.arange(64_000)[None])[0]
    assert values[:, 0].unique().tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]
    assert values[:, 3].unique().tolist() == [-1, -0.5, 0, 0.5, 1]


def test_fsq_gradient_is_that_of_the_bound() -> None:
    quantizer = FiniteScalarQuantizer(LEVELS)
    z = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (through,) = torch.autograd.grad(quantizer(z).values_BLD.sum(), z)
    (bound,) = torch.autograd.grad((quantizer.bound(z) / (quantizer.levels_D // 2)).sum(), z)
    torch.testing.assert_close(through, bound)


@pytest.mark.parametrize("codes", [4, 16, 64, 256, 1024, 4096])
def test_levels_multiply_to_the_number_of_codes(codes: int) -> None:
    levels = fsq_levels(codes)
    assert math.prod(levels) == codes
    assert set(levels) <= {4, 8}
    assert FiniteScalarQuantizer(levels).bits == int(math.log2(codes))


def test_usage_of_codes() -> None:
    even = usage_of(torch.arange(8).repeat(3), 16)
    assert even == {"usage": 0.5, "perplexity": pytest.approx(8), "entropy_bits": pytest.approx(3)}
    assert usage_of(torch.zeros(5, dtype=torch.long), 4)["perplexity"] == pytest.approx(1)
