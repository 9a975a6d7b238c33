"""Expected attention: what queries to come will attend to, from the distribution of those so far (arXiv 2510.00636).

Shape suffixes: B batch, H query heads, G key-value heads, R query heads of a key-value head, T tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.kernels.blocks import queries_at_once
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.scores import real
from isoflop.models.hooks.attention import AttentionCall


@METHODS.register("expected-attention")
@dataclass(frozen=True)
class ExpectedAttention(Eviction):
    """Tokens stay by the attention that queries at positions not yet reached are expected to pay them, times the size of their value.

    Queries before RoPE are taken as normally distributed, with the mean and covariance of the prompt's; the rotations of the next
    ``future`` positions are averaged and turn both. Then log E[exp(q·k)] = μ·k + kᵀΣk / 2 in closed form, and a softmax over the
    prompt makes it attention. No attention of the prompt itself is read, so what stays does not depend on how it ends. A cap
    on logits is not part of the expectation.
    """

    paper: ClassVar[str] = "arXiv 2510.00636"
    follows_rotation: ClassVar[bool] = True

    sinks: Annotated[int, Knob(low=0, high=1024, unit="tokens", doc="first tokens, which stay and whose queries do not count")] = 4  # fmt: skip
    future: Annotated[int, Knob(low=1, high=1_000_000, log=True, unit="tokens", doc="positions behind the prompt whose rotations are averaged")] = 512  # fmt: skip
    covariance: Annotated[bool, Knob(doc="how queries spread counts, not their mean alone")] = True
    value_norm: Annotated[bool, Knob(doc="multiply by the lengths of the values")] = True
    epsilon: Annotated[float, Knob(low=0.0, high=1.0, doc="added to the attention before that: the larger, the more the values alone decide")] = 0.0  # fmt: skip

    def windows(self, kept: int) -> tuple[int, int]:
        """The first tokens."""
        return min(self.sinks, kept), 0

    def score(self, prompt: AttentionCall) -> Tensor:
        """Expected attention times value norm, (B, G, T)."""
        counted_BT = real(prompt).bool() & (prompt.order_BT >= self.sinks)
        mean_BH1D, spread_BHDD = self.queries_ahead(prompt, counted_BT.float())
        logits_BGRT = self._logits(prompt, mean_BH1D, spread_BHDD).masked_fill(~counted_BT[:, None, None], -torch.inf)
        scores_BGT = logits_BGRT.softmax(-1).mean(2).nan_to_num()  # no tokens but sinks: nothing to choose
        if not self.value_norm:
            return scores_BGT
        return (scores_BGT + self.epsilon) * prompt.v_BGTD.float().norm(dim=-1)

    def queries_ahead(self, prompt: AttentionCall, counted_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (B, H, 1, D) and covariance (B, H, D, D) of queries behind the prompt, from those that count."""
        q_BHTD = prompt.q_BHTD.float() if prompt.rotation is None else prompt.rotation.undone(prompt.q_BHTD)
        weight_BT = counted_BT / counted_BT.sum(-1, keepdim=True).clamp(min=1)
        mean_BH1D = torch.einsum("bhtd,bt->bhd", q_BHTD, weight_BT)[:, :, None]
        spread_BHDD = None
        if self.covariance:
            centred_BHTD = (q_BHTD - mean_BH1D) * weight_BT.sqrt()[:, None, :, None]
            spread_BHDD = centred_BHTD.transpose(-1, -2) @ centred_BHTD
        if prompt.rotation is None:
            return mean_BH1D, spread_BHDD
        ahead = prompt.rotation.ahead(self.future)
        if spread_BHDD is not None:  # R Σ Rᵀ, which is symmetric
            spread_BHDD = ahead(ahead(spread_BHDD).transpose(-1, -2))
        return ahead(mean_BH1D), spread_BHDD

    def _logits(self, prompt: AttentionCall, mean_BH1D: Tensor, spread_BHDD: Tensor | None) -> Tensor:
        """Expected logits, (B, G, R, T): as many keys at a time as there is room for."""
        k_BGTD, scale = prompt.k_BGTD.float(), prompt.softmax.scaling
        rows, groups, length, width = k_BGTD.shape
        logits_BGRT = scale * (mean_BH1D.unflatten(1, (groups, -1))[..., 0, :] @ k_BGTD.transpose(-1, -2))
        if spread_BHDD is None:
            return logits_BGRT
        spread_BGRDD = spread_BHDD.unflatten(1, (groups, -1))
        most = queries_at_once(k_BGTD.device, rows * spread_BHDD.shape[1], width)
        for start in range(0, length, most):
            k_BG1ND = k_BGTD[:, :, None, start : start + most]
            logits_BGRT[..., start : start + most] += scale**2 / 2 * ((k_BG1ND @ spread_BGRDD) * k_BG1ND).sum(-1)
        return logits_BGRT
