"""The hook ``feed_forward``: the hidden neurons of a Hugging Face decoder's feed-forward blocks, and what switches some off.

Neuron i of a block adds a_i · W_out[:, i] to the residual stream. Its value a_i enters the *down projection*; that is
where the tap sits, whatever computes it: ``act(W x)``, or ``act(W_gate x) * (W_in x)`` in a gated block. The output of
the activation function alone is called the *gate*.

Shape suffixes: B batch, T tokens, F neurons of a block, d width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.models.hooks.matrices import BLOCK, held_matrices
from isoflop.models.hooks.occupant import Occupant

DOWN_PROJECTIONS = frozenset({"down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out"})
"""What decoders call the second matrix of a feed-forward block (Llama, Qwen, …; GPT-2; OPT, Phi; GPT-NeoX, Falcon; GPT-J)."""
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
_ATTENTION = ("attn", "attention")


@dataclass(frozen=True, eq=False)
class Mlp:
    """One layer's feed-forward block.

    Attributes:
        layer: number of the layer.
        down: the module that the hidden vector (…, F) enters.
        act: the activation function as a module; None where it is none.
        weights_per_neuron: of all matrices of the block: what one neuron costs to compute and to add, per token.
    """

    layer: int
    down: nn.Module
    act: nn.Module | None
    weights_per_neuron: float

    def out_Fd(self) -> Tensor:
        """What each neuron adds per unit of its value, in float32, as the weights are now."""
        weight, _, transposed = next(held_matrices(self.down))
        return (weight if transposed else weight.T).detach().float()

    def norms_F(self) -> Tensor:
        """Euclidean norms of the rows of ``out_Fd``."""
        return self.out_Fd().norm(dim=-1)


class MlpPolicy(Occupant):
    """The occupant: acts on the neurons of all blocks by taps of its own (``at_work``)."""

    @abstractmethod
    def observed(self) -> Mapping[str, Tensor]:
        """Figures of each row of the last pass, (B,) each, by name; what is asked for enters the policy's totals.

        Tasks that ask for the hook call it once after every pass that they score, and after no other.
        """


FEED_FORWARD: Hook[MlpPolicy] = Hook(
    "feed_forward", 25, "switches neurons of the decoder's feed-forward blocks off", asked=True
)


def mlps_of(decoder: nn.Module) -> list[Mlp]:
    """The feed-forward blocks of all layers, in order; empty when a layer has none, or several (mixtures of experts)."""
    found: list[Mlp] = []
    for path, module in decoder.named_modules():
        place = BLOCK.search(f"{path}.")
        if place is None or path.rsplit(".", 1)[-1] not in DOWN_PROJECTIONS or any(a in path for a in _ATTENTION):
            continue
        if len(list(held_matrices(module))) != 1 or int(place[1]) != len(found):
            return []
        found.append(_block(int(place[1]), decoder.get_submodule(path.rpartition(".")[0]), module))
    layers = getattr(getattr(decoder, "config", None), "num_hidden_layers", len(found))
    return found if len(found) == layers else []


def has_mlps(decoder: nn.Module) -> bool:
    """Whether every layer has one feed-forward block; ``decoder`` may be a skeleton on the device ``meta``."""
    return bool(mlps_of(decoder))


def _block(layer: int, parent: Any, down: nn.Module) -> Mlp:
    held = [weight for child in parent.children() for weight, _, _ in held_matrices(child)]
    weight, _, transposed = next(held_matrices(down))
    neurons = weight.shape[0] if transposed else weight.shape[1]
    found = (getattr(parent, name, None) for name in ACTIVATIONS)
    act = next((module for module in found if isinstance(module, nn.Module)), None)
    return Mlp(layer, down, act, sum(w.numel() for w in held) / neurons)


def rows_mean(values_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Means over each row's real tokens, (B,)."""
    if valid_BT is None:
        return values_BT.mean(-1)
    return torch.where(valid_BT, values_BT, 0.0).sum(-1) / valid_BT.sum(-1).clamp(min=1)
