"""Linear views: the compressible matrices of a Hugging Face model, seen in one way.

A view gives one matrix as (rows, cols) = (outputs, inputs), whatever holds it: an ``nn.Linear``, GPT-2's ``Conv1D``
(stored the other way round), or one expert of a mixture (a slice of a three-dimensional parameter). Fused matrices
(``qkv``, ``gate_up``) are one view, and a parameter that several modules share is one view as well. Views lie inside the
numbered decoder or encoder blocks; embeddings, heads, routers, vision towers and projectors are left alone.

Shape suffixes: O outputs (rows), I inputs (columns), E experts, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.models.base import Model
from isoflop.models.decoder_model import DecoderModel
from isoflop.models.hooks.matrices import blocks_matrices

Observer = Callable[["LinearView", Tensor], None]


@dataclass(frozen=True, eq=False)
class LinearView:
    """One compressible matrix.

    Attributes:
        name: of the module, from the model's root; experts carry their number: ``….experts.down_proj[3]``.
        parameter: name of the parameter that holds it, as in ``module.named_parameters()``.
        layer: number of the block, counted from 0.
        role: last part of the module's name, or of the expert parameter's: ``q_proj``, ``c_attn``, ``gate_up_proj`` …
        rows, cols: outputs and inputs.
        expert: index in a three-dimensional parameter, or None.
        transposed: stored as (inputs, outputs).
        module: that calls it.
        holder: the parameter.
    """

    name: str
    parameter: str
    layer: int
    role: str
    rows: int
    cols: int
    expert: int | None
    transposed: bool
    module: Any
    holder: nn.Parameter

    @property
    def numel(self) -> int:
        """Weights of the matrix."""
        return self.rows * self.cols

    def weight(self) -> Tensor:
        """The matrix (O, I) as it is now: a view on the parameter, detached."""
        stored = self.holder.detach()
        if self.expert is not None:
            stored = stored[self.expert]
        return stored.T if self.transposed else stored

    def write(self, weight_OI: Tensor) -> None:
        """Set the matrix in place; use it inside :func:`replaceable`, which brings the old one back."""
        self.weight().copy_(weight_OI.detach())


def linear_views(model: Model) -> list[LinearView]:
    """The views of a loaded model in the order of its modules.

    Raises:
        Infeasible: the model has no numbered blocks with linear layers.
    """
    root, prefix = _root(model)
    views = list(_walk(root, prefix, model.module))
    if not views:
        raise Infeasible(
            f"model {model.info.ref}: {type(root).__name__} has no linear layers inside numbered blocks to compress"
        )
    return views


def _root(model: Model) -> tuple[nn.Module, str]:
    """The module whose blocks hold the views (the language model of a vision-language model), and its name."""
    if not isinstance(model, DecoderModel):
        return model.module, ""
    decoder = model.decoder
    return decoder, next(name for name, part in model.module.named_modules() if part is decoder)


def _walk(root: nn.Module, prefix: str, whole: nn.Module) -> Iterator[LinearView]:
    names = {id(p): name for name, p in whole.named_parameters()}
    for path, module, layer, holder, label, transposed in blocks_matrices(root):
        role = path.rsplit(".", 1)[-1]
        full = ".".join(part for part in (prefix, path) if part)
        parameter = names[id(holder)]
        rows, cols = holder.shape[-2:][::-1] if transposed else holder.shape[-2:]
        if holder.dim() == 2:
            yield LinearView(full, parameter, layer, role, rows, cols, None, transposed, module, holder)
            continue
        for expert in range(holder.shape[0]):
            name = f"{full}.{label}[{expert}]"
            yield LinearView(name, parameter, layer, label, rows, cols, expert, transposed, module, holder)


@contextmanager
def replaceable(model: Model, names: list[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters that may be written in place inside the ``with`` block; afterwards they are what they were, bit for bit.

    Args:
        names: as in ``model.module.named_parameters()``.
    """
    parameters = dict(model.module.named_parameters())
    chosen = {name: parameters[name] for name in names}
    kept = {name: parameter.data for name, parameter in chosen.items()}
    try:
        for parameter in chosen.values():
            parameter.data = parameter.data.clone()
        yield chosen
    finally:
        for name, parameter in chosen.items():
            parameter.data = kept[name]


@contextmanager
def observed(views: list[LinearView], observe: Observer) -> Iterator[None]:
    """Calls ``observe(view, x)`` with every input of every view inside the ``with`` block.

    ``x`` has shape (..., I), the first dimension counting samples where there are three. Experts see their routed
    tokens only, (N, I), and are not called without any.
    """
    by_module: dict[int, list[LinearView]] = {}
    for view in views:
        by_module.setdefault(id(view.module), []).append(view)
    with ExitStack() as stack:
        for group in by_module.values():
            hook = _experts_hook(group, observe) if group[0].expert is not None else _linear_hook(group[0], observe)
            stack.callback(group[0].module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _linear_hook(view: LinearView, observe: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        observe(view, args[0] if args else next(iter(kwargs.values())))

    return hook


def expert_inner(first: LinearView, x_NI: Tensor, weight_OI: Tensor | None = None) -> Tensor:
    """What an expert's first matrix and its activation make of tokens: the inputs (N, I) of its second matrix.

    Args:
        first: the view of the first matrix, ``gate_up_proj`` or ``up_proj``.
        weight_OI: in the place of that matrix.
    """
    bias = getattr(first.module, f"{first.role}_bias", None)
    weight_OI = first.weight() if weight_OI is None else weight_OI
    y_NO = nn.functional.linear(x_NI, weight_OI, None if bias is None else bias[first.expert])
    inner: Tensor = first.module._apply_gate(y_NO) if first.role == "gate_up_proj" else first.module.act_fn(y_NO)
    return inner


def _experts_hook(views: list[LinearView], observe: Observer) -> Callable[..., None]:
    """Inputs of the experts of a mixture: routed tokens, and what the first matrix and its activation make of them.

    The second matrix's inputs are computed here once more, because the fused implementations never show them.
    """
    wanted = {(view.role, view.expert): view for view in views}
    first = next(view.role for view in views if view.role != "down_proj")

    def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden, chosen = (*args, *kwargs.values())[:2]
        tokens_NI = hidden.reshape(-1, hidden.shape[-1])
        for expert in torch.unique(chosen).tolist():
            if (first, expert) not in wanted:
                continue  # a place of an expert that lives elsewhere
            x_NI = tokens_NI[(chosen == expert).any(-1)]
            observe(wanted[first, expert], x_NI)
            observe(wanted["down_proj", expert], expert_inner(wanted[first, expert], x_NI))

    return hook
