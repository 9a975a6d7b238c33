"""What an image lost: squared error, peak signal-to-noise ratio, structural similarity.

Shape suffixes: B batch, C channels, H height, W width, S side of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 11
"""Side of the Gaussian window of SSIM; smaller images take the largest odd side that fits."""
DEVIATION = 1.5
"""Standard deviation of that window, in pixels."""
_C1, _C2 = 0.01**2, 0.03**2


def mse(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean squared error of each image, (B,), values in [0, 1]."""
    return (a_BCHW.float() - b_BCHW.float()).square().mean((1, 2, 3))


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,): -10 log10 of the mean squared error; infinite for equal images.

    A mean of these is not the ratio of the mean error: each image counts the same in dB.
    """
    return -10 * mse(a_BCHW, b_BCHW).log10()


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Structural similarity of each image, (B,), values in [0, 1] (Wang et al. 2004): a mean over channels and windows.

    Gaussian windows of side 11 and deviation 1.5 that lie inside the image, K1 = .01, K2 = .03.
    """
    a, b = a_BCHW.double(), b_BCHW.double()
    side = min(WINDOW, *(size - 1 + size % 2 for size in a.shape[-2:]))
    window_S = torch.exp(
        -((torch.arange(side, dtype=torch.float64, device=a.device) - side // 2) ** 2) / (2 * DEVIATION**2)
    )
    kernel_SS = torch.outer(window_S, window_S) / window_S.sum() ** 2

    def local(x_BCHW: Tensor) -> Tensor:
        return F.conv2d(x_BCHW.flatten(0, 1)[:, None], kernel_SS[None, None]).unflatten(0, x_BCHW.shape[:2]).squeeze(2)

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2 * covariance + _C2) / (var_a + var_b + _C2)
    return (light * structure).mean((1, 2, 3))
