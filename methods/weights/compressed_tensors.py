"""Matrices on integer grids in the format compressed-tensors, which transformers and vLLM read ("pack-quantized").

A linear layer ``X`` is ``X.weight_packed`` (codes, a little-endian bit stream per row in whole int32), ``X.weight_scale``,
``X.weight_shape`` and, where the grid is not symmetric, ``X.weight_zero_point`` (packed along the rows). Readers compute
``scale · (code - zero)`` in the scales' type.

Shape suffixes: O outputs (rows), I inputs (columns), G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from isoflop.core.errors import UserError
from isoflop.kernels.quant import pack_bits
from isoflop.methods.weights.grids import INTEGER, SYMMETRIC, IntegerGridPayload, PermutedPayload
from isoflop.methods.weights.payloads import PatternPayload, Payload
from isoflop.methods.weights.views import LinearView

NAME = "compressed-tensors"
LAYOUT = "pack-quantized"
READER = "0.20"
"""The first version of the package that is known to read this: older ones pack 3, 5, 6 and 7 bits otherwise."""


def check(view: LinearView, payload: Payload) -> None:
    """Raise UserError where the format cannot hold a matrix as it is stored; says what it could."""
    why = _why_not(view, payload)
    if why:
        raise UserError(f"--format {NAME}: {view.name} {why}, or --format dense")


def _why_not(view: LinearView, payload: Payload) -> str:
    if not isinstance(view.module, nn.Linear):
        kind = (
            "an expert's part of a larger parameter" if view.expert is not None else f"a {type(view.module).__name__}"
        )
        return f"is {kind}, and the format holds linear layers; allowed: other models"
    if isinstance(payload, PermutedPayload):
        return (
            "has groups of columns in another order than they lie, which its readers have dropped; allowed: jobs with "
            "static_groups: true, or column_order: natural"
        )
    if isinstance(payload, PatternPayload):
        n, m = payload.pattern
        return f"is pruned {n}:{m}, for which its readers have dropped the format; allowed: jobs on integer grids"
    if not isinstance(payload, IntegerGridPayload):
        return (
            f"is stored as {payload.kind!r}, and the format holds uniform grids with whole zero points; allowed: jobs with "
            f"grid: {INTEGER} or {SYMMETRIC}"
        )
    if payload.shape[1] % payload.group:
        return f"has {payload.shape[1]} inputs, which groups of {payload.group} do not divide; allowed: jobs with a group that does"
    return ""


def tensors_of(payload: IntegerGridPayload, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is stored of one layer, by the names behind its own.

    Args:
        dtype: of the scales, which readers compute in.
    """
    found = {
        "weight_packed": _words(payload.codes_OI, payload.bits),
        "weight_scale": payload.scale_OG.to(dtype),
        "weight_shape": torch.tensor(payload.shape),
    }
    if payload.zeros is not None:
        found["weight_zero_point"] = _words(payload.zero_OG.T, payload.bits).T
    return {name: t.cpu().contiguous() for name, t in found.items()}


def config_of(
    views: Sequence[LinearView], payloads: Sequence[IntegerGridPayload], whole: nn.Module
) -> dict[str, object]:
    """``quantization_config`` of ``config.json``: the layers of each kind of grid by name, all other linear layers as they are."""
    kinds: dict[tuple[int, int, bool], list[str]] = {}
    for view, payload in zip(views, payloads, strict=True):
        group = payload.group if payload.group < payload.shape[1] else -1
        kinds.setdefault((payload.bits, group, payload.zeros is None), []).append(view.name)
    groups = {
        f"group_{number}": {
            "targets": names,
            "format": LAYOUT,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group < 0 else "group",
                "group_size": None if group < 0 else group,
                "dynamic": False,
            },
        }
        for number, ((bits, group, symmetric), names) in enumerate(kinds.items())
    }
    packed = {view.name for view in views}
    linear = [name for name, part in whole.named_modules() if isinstance(part, nn.Linear) and name not in packed]
    # transformers 5 builds layers without weights as if zero points were not packed, and then refuses those of the file; where
    # it decompresses while it loads it reads them
    zero_points = any(not symmetric for _, _, symmetric in kinds)
    return {
        "quant_method": NAME,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": linear,
        **({"dequantize": True} if zero_points else {}),
    }


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes packed by row, as int32 words; a last one is filled with zeros."""
    packed = pack_bits(codes.contiguous(), bits)
    length = -(-codes.shape[1] * bits // 32) * 4
    return pad(packed, (0, max(0, length - packed.shape[1])))[:, :length].contiguous().view(torch.int32)
