"""Taps: what a model computes on the way, read or changed while it runs as it is.

An attention tap works rows of a layer's attention weights out from the outputs of ``q_proj`` and ``k_proj``, with
whatever attention kernel the model uses. The model is never switched to eager attention, and the whole map is never
formed. An activation tap reads or replaces what enters or leaves a module.

Shape suffixes: B batch, T tokens, R rows asked for, H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn


class ActivationTap:
    """The first input, or the output, of a module in each forward pass.

    Args:
        module: what is tapped.
        side: ``input`` or ``output``.
    """

    def __init__(self, module: nn.Module, side: Literal["input", "output"] = "input") -> None:
        self.module = module
        self.side = side

    @contextmanager
    def through(self, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Inside the block every tensor passes through ``change``; None from it leaves the tensor as it is."""

        def entering(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            changed = change(args[0])
            return None if changed is None else (changed, *args[1:])

        def leaving(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return change(output)

        handle = (
            self.module.register_forward_pre_hook(entering)
            if self.side == "input"
            else self.module.register_forward_hook(leaving)
        )
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def read(self) -> Iterator[list[Tensor]]:
        """The tensors of all passes inside the block, one per pass."""
        seen: list[Tensor] = []

        def note(tensor: Tensor) -> None:
            seen.append(tensor.detach())

        with self.through(note):
            yield seen


def real_tokens(x_BTF: Tensor, valid_BT: Tensor | None) -> Tensor:
    """The rows of real tokens, (S, F), in float32: what statistics are taken over."""
    flat = x_BTF.flatten(0, -2) if valid_BT is None else x_BTF[valid_BT]
    return flat.float()


class Tap:
    """Queries and keys of one attention module's last forward pass, before RoPE.

    Args:
        attention: a Hugging Face attention module with ``q_proj`` and ``k_proj`` (CLIP, SigLIP, Llama, Qwen, …).
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention: Any = attention
        self._q_BTC: Tensor | None = None
        self._k_BTC: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[Tap]:
        """Inside the block every pass through the module is noted, the last one kept."""
        handles = [
            self.attention.q_proj.register_forward_hook(self._note_q),
            self.attention.k_proj.register_forward_hook(self._note_k),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._q_BTC = self._k_BTC = None

    def vision_rows(self, rows: slice) -> Tensor:
        """Attention of some tokens of a vision layer over all tokens, p_BHRT in float32."""
        q_BTHD, k_BTHD = self._heads(self._q_BTC), self._heads(self._k_BTC)
        logits = torch.einsum("brhd,bthd->bhrt", q_BTHD[:, rows].float(), k_BTHD.float()) * self.attention.scale
        return logits.softmax(-1)

    def last_row(self, rope: tuple[Tensor, Tensor], valid_BT: Tensor | None) -> Tensor:
        """Attention of the last token of a decoder layer over all tokens, p_BHT in float32.

        Args:
            rope: cos and sin of all tokens, as the layer was called with.
            valid_BT: False for padding, None when nothing is padded.
        """
        q_BHTD = self._normed("q_norm", self._heads(self._q_BTC)[:, -1:]).transpose(1, 2)
        k_BGTD = self._normed("k_norm", self._heads(self._k_BTC)).transpose(1, 2)
        rotate = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb  # each architecture has its own
        cos, sin = rope
        q_BHTD = rotate(q_BHTD, q_BHTD, cos[:, -1:], sin[:, -1:])[0]
        k_BGTD = rotate(k_BGTD, k_BGTD, cos, sin)[1]
        k_BHTD = k_BGTD.repeat_interleave(q_BHTD.shape[1] // k_BGTD.shape[1], dim=1)
        logits_BHT = (q_BHTD.float() @ k_BHTD.float().transpose(-1, -2))[:, :, 0] * self.attention.scaling
        if valid_BT is not None:
            logits_BHT = logits_BHT.masked_fill(~valid_BT[:, None], float("-inf"))
        return logits_BHT.softmax(-1)

    def _heads(self, x_BTC: Tensor | None) -> Tensor:
        if x_BTC is None:
            raise RuntimeError("the tapped layer has not run yet")
        return x_BTC.unflatten(-1, (-1, self.attention.head_dim))

    def _normed(self, name: str, x_BTHD: Tensor) -> Tensor:
        norm = getattr(self.attention, name, None)  # Qwen3 and Gemma3 normalise per head
        return x_BTHD if norm is None else norm(x_BTHD)

    def _note_q(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._q_BTC = output

    def _note_k(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._k_BTC = output
