"""Evicted tokens that survive in others: each joins the kept one whose key is most like its own, or the zero class and is gone.

Shape suffixes: B batch, G key-value heads, N tokens, M kept ones (the centres of classes), C candidates, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.kernels.blocks import queries_at_once
from isoflop.methods.kv_cache.select import KeptTokens
from isoflop.models.segments import DenseSegment

_LEAST = 1e-30


@dataclass(frozen=True, eq=False)
class Merged:
    """What has become of tokens.

    Attributes:
        segment: the centres, with what has joined them.
        mass_BGM: scores of each class, the centre's included.
        lost_BG: scores of the candidates in the zero class.
    """

    segment: DenseSegment
    mass_BGM: Tensor
    lost_BG: Tensor


def merged(
    tokens: DenseSegment,
    scores_BGN: Tensor,
    centres: KeptTokens,
    candidates: KeptTokens,
    tau: float,
    merge_keys: bool,
    counted: bool,
) -> Merged:
    """Classes around ``centres``; what is in neither choice is gone.

    Values are means weighted by scores. Keys are the weighted mean direction at the norm of the centre. Nothing moves in a class
    without members, or whose members have scores of zero.

    Args:
        scores_BGN: at least zero.
        tau: cosine that a candidate's most similar centre must exceed.
        merge_keys: False leaves the centres' keys as they are.
        counted: log n is added to the logits of a class of n tokens.
    """
    shape = scores_BGN.shape[:2], centres.index_BGM.shape[-1]
    target_BGC = _targets(tokens.k_BGND, centres, candidates, tau)
    weight_BGC = candidates.take(scores_BGN).float()
    if candidates.empty_BGM is not None:
        weight_BGC = weight_BGC.masked_fill(candidates.empty_BGM, 0.0)
    own_BGM = centres.take(scores_BGN).float()
    all_mass = _sums(weight_BGC, target_BGC, shape)
    mass_BGM = own_BGM + all_mass[..., :-1]
    moves_BGM1 = (all_mass[..., :-1] > 0)[..., None]

    def joined(x_BGND: Tensor) -> Tensor:
        sums_BGMD = _sums(weight_BGC[..., None] * candidates.take(x_BGND), target_BGC, shape)[:, :, :-1]
        return sums_BGMD + own_BGM[..., None] * centres.take(x_BGND)

    k_BGMD, v_BGMD = (centres.take(x) for x in (tokens.k_BGND, tokens.v_BGND))
    means_BGMD = joined(tokens.v_BGND.float()) / mass_BGM.clamp(min=_LEAST)[..., None]
    v_BGMD = torch.where(moves_BGM1, means_BGMD.to(v_BGMD.dtype), v_BGMD)
    if merge_keys:
        directions_BGMD = _unit(joined(_unit(tokens.k_BGND.float())))
        found_BGMD = directions_BGMD * k_BGMD.float().norm(dim=-1, keepdim=True)
        k_BGMD = torch.where(moves_BGM1, found_BGMD.to(k_BGMD.dtype), k_BGMD)
    bias_BGM = centres.bias(k_BGMD.dtype)
    if counted:
        bias_BGM = _counts(tokens, centres, candidates, target_BGC, shape)
    segment = DenseSegment(centres.take(tokens.positions_BGN), bias_BGM, k_BGMD, v_BGMD)
    return Merged(segment, mass_BGM, all_mass[..., -1])


def _targets(k_BGND: Tensor, centres: KeptTokens, candidates: KeptTokens, tau: float) -> Tensor:
    """Each candidate's class, (B, G, C); M for the zero class."""
    centre_BGMD = _unit(centres.take(k_BGND).float())
    count = centre_BGMD.shape[2]
    found = []
    rows = queries_at_once(k_BGND.device, k_BGND.shape[0] * k_BGND.shape[1], count)
    for index_BGC in candidates.index_BGM.split(rows, dim=-1):
        cosine_BGCM = _unit(KeptTokens(index_BGC, None).take(k_BGND).float()) @ centre_BGMD.transpose(-1, -2)
        if centres.empty_BGM is not None:
            cosine_BGCM = cosine_BGCM.masked_fill(centres.empty_BGM[:, :, None], -2.0)
        best_BGC, class_BGC = cosine_BGCM.clamp(max=1.0).max(-1)
        found.append(torch.where(best_BGC > tau, class_BGC, count))
    return torch.cat(found, dim=-1)


def _sums(x: Tensor, target_BGC: Tensor, shape: tuple[torch.Size, int]) -> Tensor:
    """Of candidates by class, (B, G, M + 1, …): a product with the one-hot matrix of the classes, which is not laid out."""
    into = x.new_zeros(*shape[0], shape[1] + 1, *x.shape[3:])
    index = target_BGC.reshape(*target_BGC.shape, *[1] * (x.dim() - 3)).expand_as(x)
    return into.scatter_add_(2, index, x)


def _counts(
    tokens: DenseSegment, centres: KeptTokens, candidates: KeptTokens, target_BGC: Tensor, shape: tuple[torch.Size, int]
) -> Tensor:
    """Log of how many tokens each class stands for, those that had joined before included."""
    before_BGN = torch.zeros_like(tokens.positions_BGN, dtype=torch.float32)
    if tokens.log_bias_BGN is not None:
        before_BGN = tokens.log_bias_BGN.float()
    number_BGC = candidates.take(before_BGN).exp()
    if candidates.empty_BGM is not None:
        number_BGC = number_BGC.masked_fill(candidates.empty_BGM, 0.0)
    bias_BGM = (centres.take(before_BGN).exp() + _sums(number_BGC, target_BGC, shape)[..., :-1]).log()
    return bias_BGM if centres.empty_BGM is None else bias_BGM.masked_fill(centres.empty_BGM, -torch.inf)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=_LEAST)
