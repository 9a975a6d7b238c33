"""The hook ``matrices``: the compressible matrices of a Hugging Face model, those inside its numbered blocks, whatever holds them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from torch import nn

from isoflop.core.hook import Hook
from isoflop.models.hooks.occupant import Occupant

BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
"""Finds the number of the block in a module's name with a dot behind it."""
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_EXPERT_MATRICES = ("gate_up_proj", "up_proj", "down_proj")

Shapes = tuple[tuple[int, int, int], ...]
"""(rows, cols, how many) of matrices."""


MATRICES: Hook[Occupant] = Hook("matrices", 0, "serves matrices of the blocks from a compressed form")
"""Its occupant writes what it serves into the parameters (``at_work``) and tells their bytes (``stored``)."""


def held_matrices(module: nn.Module) -> Iterator[tuple[nn.Parameter, str, bool]]:
    """Matrices that a module itself holds: (parameter, its attribute, stored as (inputs, outputs))."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Linear, Conv1D)):
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        yield weight, "weight", isinstance(module, Conv1D)
    else:
        for label in _EXPERT_MATRICES:
            found = getattr(module, label, None)
            if isinstance(found, nn.Parameter) and found.dim() == 3:
                yield found, label, bool(getattr(module, "is_transposed", False))


def blocks_matrices(root: nn.Module) -> Iterator[tuple[str, nn.Module, int, nn.Parameter, str, bool]]:
    """Every compressible parameter below ``root`` once: (module's name, module, block, and as in :func:`held_matrices`).

    Routers are left alone. Parameters of experts are three-dimensional.
    """
    seen: set[int] = set()
    for path, module in root.named_modules():
        place = BLOCK.search(f"{path}.")
        if place is None or path.rsplit(".", 1)[-1] in ROUTERS:
            continue
        for holder, label, transposed in held_matrices(module):
            if id(holder) not in seen:
                seen.add(id(holder))
                yield path, module, int(place[1]), holder, label, transposed


def matrix_shapes(root: nn.Module) -> Shapes:
    """``geometry["matrices"]`` of a model; ``root`` may be a skeleton without memory for its weights."""
    found: Counter[tuple[int, int]] = Counter()
    for _, _, _, holder, _, transposed in blocks_matrices(root):
        rows, cols = holder.shape[-2:][::-1] if transposed else holder.shape[-2:]
        found[rows, cols] += holder.shape[0] if holder.dim() == 3 else 1
    return _listed(found)


def llama_shapes(width: int, layers: int, queries: int, keys: int, mlp: int) -> Shapes:
    """Of a decoder of the Llama type, whose query heads together are ``queries`` wide and key heads ``keys``."""
    found: Counter[tuple[int, int]] = Counter()
    for rows, cols, per_layer in (
        (queries, width, 1),
        (keys, width, 2),
        (width, queries, 1),
        (mlp, width, 2),
        (width, mlp, 1),
    ):
        found[rows, cols] += per_layer * layers
    return _listed(found)


def _listed(found: Counter[tuple[int, int]]) -> Shapes:
    return tuple((rows, cols, count) for (rows, cols), count in found.items())
