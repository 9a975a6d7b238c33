"""LoCoCo's module: a convolution over the tokens that are to go says how they are mixed into a fixed number of slots.

Equations by their numbers in card and docstring of :mod:`isoflop.methods.kv_cache.lococo`.

Shape suffixes: B batch, G key-value heads, N tokens, M slots, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "none": nn.Identity}


class SlotMixer(nn.Module):
    """The convolution of one layer, the same for all of its heads, and its gate; in float32.

    Args:
        width: of a head.
        slots: M.
        kernel: tokens that a convolution sees, an odd number.
        convolutions: one after the other; all but the first go from slots to slots.
        activation: behind each of them, a name of ``ACTIVATIONS``.
        gate: γ at the start.
    """

    def __init__(self, width: int, slots: int, kernel: int, convolutions: int, activation: str, gate: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(convolutions):
            conv = nn.Conv1d(slots if number else 2 * width, slots, kernel, padding=kernel // 2)
            nn.init.normal_(conv.weight)  # as released
            layers += [conv, ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers)
        self.gate = nn.Parameter(torch.full((1,), gate))

    def forward(self, k_BGND: Tensor, v_BGND: Tensor, anchor_BGM: Tensor) -> Tensor:
        """W (3, 4), (B, G, M, N) in float32: what each token gives to each slot; rows sum to 1.

        Args:
            anchor_BGM: places of the tokens that the slots would be without a convolution.
        """
        x_BGND = torch.cat((k_BGND, v_BGND), dim=-1).float()
        y_BGMN = self.layers(x_BGND.flatten(0, 1).transpose(1, 2)).unflatten(0, x_BGND.shape[:2])
        w_BGMN = self.gate * y_BGMN.softmax(-1)
        return w_BGMN.scatter_add(-1, anchor_BGM[..., None], (1 - self.gate).expand(*anchor_BGM.shape, 1))
