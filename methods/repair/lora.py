"""``lora``: low-rank adapters on the attention's projections, the same repair by weights instead of a prompt.

Shape suffixes: r rank, I inputs, O outputs, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob, KnobValue
from isoflop.methods.base import METHODS
from isoflop.methods.repair.base import Learned, RepairMethod
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.adapters import ADAPTERS
from isoflop.models.hooks.occupant import Occupant

NAMES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q_lin"),
    "k": ("k_proj", "key", "k_lin"),
    "v": ("v_proj", "value", "v_lin"),
    "o": ("o_proj", "out_proj", "out_lin"),
}
"""What architectures call a projection of its own."""
FUSED = ("c_attn", "qkv_proj")
"""What they call queries, keys and values one behind the other."""
TARGETS = ("q", "qv", "qkvo")


class LowRank(nn.Module):
    """B A of one projection: A as a linear layer begins, B zero (Hu et al. 2021, section 4.1)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a_rI = nn.Parameter(torch.empty(rank, inputs))
        self.b_Or = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a_rI, a=5**0.5)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """(B, T, O), in the type of the inputs."""
        return x_BTI @ self.a_rI.to(x_BTI).T @ self.b_Or.to(x_BTI).T


class LowRanks(Learned):
    """The adapters of all layers, by layer and projection: ``0_q``, ``0_v``, ``1_q`` …"""

    def __init__(self, info: ModelInfo, rank: int, targets: str) -> None:
        super().__init__(info)
        sizes, layers = _sizes(info), info.geometry["layers"]
        self.parts = nn.ModuleDict(
            {f"{layer}_{name}": LowRank(*sizes[name], rank) for layer in range(layers) for name in targets}
        )


class Adapted(Occupant):
    """Adapters at work beside whatever serves the matrices.

    Args:
        adapters: of all layers.
        scale: of what they add.
        seconds: CPU seconds of their training.
    """

    def __init__(self, adapters: LowRanks, scale: float, seconds: float) -> None:
        self.adapters, self.seconds = adapters, seconds
        self._scale = scale

    def tensors(self) -> Sequence[Tensor]:
        """All of them."""
        return list(self.adapters.parameters())

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """Inside the block the projections give what they gave, and what the adapters add."""
        with ExitStack() as stack:
            for name, adapter in self.adapters.parts.items():
                layer, target = name.split("_")
                place = _place(model, int(layer), target)
                hook = self._adding(adapter, place)
                stack.callback(place.module.register_forward_hook(hook).remove)
            yield

    def _adding(self, adapter: nn.Module, place: _Place) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output_BTO: Tensor) -> Tensor:
            added_BTO = adapter(args[0]) * self._scale
            behind = output_BTO.shape[-1] - place.start - added_BTO.shape[-1]
            return output_BTO + nn.functional.pad(added_BTO, (place.start, behind))

        return add


class _Place(NamedTuple):
    """Where the outputs of a projection are: of which module, from which one on."""

    module: nn.Module
    start: int


def _sizes(info: ModelInfo) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each projection."""
    shape = info.geometry
    head = shape.get("head_width", shape["width"] // shape["heads"])
    queries, keys, width = shape["heads"] * head, shape.get("kv_heads", shape["heads"]) * head, shape["width"]
    return {"q": (width, queries), "k": (width, keys), "v": (width, keys), "o": (queries, width)}


def _place(model: Any, layer: int, target: str) -> _Place:
    """A projection of one layer.

    Raises:
        Infeasible: it is called, or shaped, otherwise than in any architecture that is known.
    """
    sizes = _sizes(model.info)
    inner = {name.rsplit(".", 1)[-1]: module for name, module in model.decoder_layers[layer].named_modules()}
    found = next((inner[name] for name in NAMES[target] if name in inner), None)
    start, outputs = 0, sizes[target][1]
    if found is None and target != "o" and (fused := next((inner[name] for name in FUSED if name in inner), None)):
        found, start = fused, sum(sizes[name][1] for name in "qkv"[: "qkv".index(target)])
        outputs = sum(sizes[name][1] for name in "qkv")
    if found is None and target == "o" and "c_attn" in inner:
        found = model.decoder_layers[layer].attn.c_proj
    if found is None or getattr(found, "out_features", getattr(found, "nf", outputs)) != outputs:
        raise Infeasible(
            f"method lora: layer {layer} of model {model.info.ref} has no projection {target} under a known name and of {outputs} outputs; "
            f"known: {', '.join((*NAMES[target], *FUSED))}"
        )
    return _Place(found, start)


@METHODS.register("lora")
@dataclass(frozen=True)
class Lora(RepairMethod):
    """Beside projections of the attention stands a product of two thin matrices, learned through the compressed model.

    y = W x + (alpha / r) B A x, where W is served by whatever weight method the trial has, and A (r x inputs) and B (outputs x r)
    learn; B begins at nothing, so that untrained adapters change nothing. They are not merged: W stays compressed, and A and B cost
    their bytes and FLOPs with every token. The baseline of repairs by prompts (arXiv 2310.00867) at equal numbers: a prompt has
    n · width of them; adapters of queries alone, where heads together are as wide as the model, 2 · r · width · layers.
    """

    paper: ClassVar[str] = "arXiv 2106.09685"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (ADAPTERS,)

    rank: Annotated[int, Knob(low=1, high=1024, log=True, doc="r")] = 2
    targets: Annotated[str, Knob(choices=TARGETS, doc="projections: queries, queries and values (the paper's choice), or all four")] = "qv"  # fmt: skip
    alpha: Annotated[float, Knob(low=0.01, high=1024.0, log=True, doc="what is added counts alpha / r")] = 8.0

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """As they are drawn."""
        return cls(steps=0)

    def build(self, info: ModelInfo) -> nn.Module:
        """A random A, B zero."""
        return LowRanks(info, self.rank, self.targets)

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The adapters."""
        module = self.module_of(model, prepared)
        assert isinstance(module, LowRanks)
        return {ADAPTERS: Adapted(module, self.alpha / self.rank, self.seconds_of(prepared))}

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """``learned_on`` by what the first steps lead to."""
        return {"learned_on": [{"learned_on": name} for name in ("none", "rtn?bits=2&group=16")]}
