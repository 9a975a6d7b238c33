"""Taps: what a model computes on the way, read or changed while it runs as it is.

An attention tap works rows of a layer's attention weights out from the outputs of ``q_proj`` and ``k_proj``, with
whatever attention kernel the model uses. The model is never switched to eager attention, and the whole map is never
formed. Architectures rotate and normalise queries and keys in ways of their own, and in some layers not at all; so in the first
pass under a tap a row is compared with what the architecture's own attention works out, and what the tap gets wrong is refused when it is asked.
An activation tap reads or replaces what enters or leaves a module.

Shape suffixes: B batch, T tokens, R rows asked for, H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from isoflop.core.errors import Infeasible
from isoflop.kernels.column_scores import column_scores
from isoflop.kernels.softmax import Softmax
from isoflop.models.hooks.one_attention import own_last_row
from isoflop.models.moving import moved


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
    flat = x_BTF.flatten(0, -2) if valid_BT is None else x_BTF[valid_BT.to(x_BTF.device)]
    return flat.float()


_Layer = tuple[type, str, int]
_KNOWN: dict[_Layer, bool] = {}
"""Whether rows of an attention class under a config were right in a layer: some layers rotate nothing (SmolLM3)."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest difference of logits relative to the largest logit, by the type of queries and keys; 16 bits round more."""


def attention_in(layer: nn.Module) -> nn.Module:
    """A decoder layer's own attention, whatever the layer calls it.

    Raises:
        Infeasible: it calls it in none of the ways that are known.
    """
    for name in ("self_attn", "attn", "attention", "self_attention"):
        found = getattr(layer, name, None)
        if isinstance(found, nn.Module):
            return found
    raise Infeasible(
        f"the attention that tokens get cannot be read off {type(layer).__name__}, which keeps none; allowed: decoders with attention "
        "like that of Llama, Qwen2 or Qwen3"
    )


class Tap:
    """Queries and keys of one attention module's last forward pass, before RoPE.

    Args:
        attention: a Hugging Face attention module with ``q_proj`` and ``k_proj`` (CLIP, SigLIP, Llama, Qwen, …).
            On others nothing is heard, and what is asked for is refused.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention: Any = attention
        self._fits = all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim"))
        self._q_BTC: Tensor | None = None
        self._k_BTC: Tensor | None = None
        self._key: _Layer | None = None

    @contextmanager
    def listening(self) -> Iterator[Tap]:
        """Inside the block every pass through the module is noted, the last one kept."""
        if not self._fits:
            yield self
            return
        handles = [
            self.attention.q_proj.register_forward_hook(self._note_q),
            self.attention.k_proj.register_forward_hook(self._note_k),
        ]
        if self._architecture not in _KNOWN:
            handles.append(self.attention.register_forward_hook(self._compare, with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._q_BTC = self._k_BTC = None

    def vision_rows(self, rows: slice) -> Tensor:
        """Attention of some tokens of a vision layer over all tokens, p_BHRT in float32."""
        q_BTC, k_BTC = self._whole_normed("q_norm", self._q_BTC), self._whole_normed("k_norm", self._k_BTC)
        q_BTHD, k_BTHD = self._heads(q_BTC), self._heads(k_BTC)
        logits = torch.einsum("brhd,bthd->bhrt", q_BTHD[:, rows].float(), k_BTHD.float()) * self.attention.scale
        return logits.softmax(-1)

    def last_row(self, rope: tuple[Tensor, Tensor] | None, valid_BT: Tensor | None, end: int | None = None) -> Tensor:
        """Attention of the last token of a decoder layer over all tokens, p_BHT in float32; beside a sink it sums to less than 1.

        Args:
            rope: cos and sin of all tokens, as the layer was called with; None where it was called with none.
            valid_BT: False for padding, None when nothing is padded.
            end: the last token is the one before this column, and those behind are not seen; None for all columns.

        Raises:
            Infeasible: the architecture's own attention is another; found out in its first pass under a tap.
        """
        if not self._fits:
            raise self._unknown("has no projections of queries and keys by themselves")
        heard = self._heads(self._q_BTC)  # a layer that has not run says so
        if rope is None or not _KNOWN.get(self._architecture, False):
            raise self._unknown("rotates, scales or normalises queries and keys in another way")
        logits_BHT = self._last_logits(*moved((rope, valid_BT), heard.device), end)
        return self._softmax.weights(logits_BHT[:, :, None])[:, :, 0].to(rope[0].device)  # where the question came from

    def received(self, rope: tuple[Tensor, Tensor] | None, valid_BT: Tensor | None) -> Tensor:
        """Attention that each token of a decoder layer gets, (B, T) in float32: the mean over heads and over the real tokens from
        it on; 0 at padding.

        Args:
            rope, valid_BT: as in ``last_row``.

        Raises:
            Infeasible: as in ``last_row``.
        """
        if not self._fits:
            raise self._unknown("has no projections of queries and keys by themselves")
        heard = self._heads(self._q_BTC)
        if rope is None or not _KNOWN.get(self._architecture, False):
            raise self._unknown("rotates, scales or normalises queries and keys in another way")
        (cos, sin), valid_BT = moved((rope, valid_BT), heard.device)
        q_BHTD, k_BGTD = self._rotated((cos, sin), slice(None), slice(None))
        batch, heads, length, _ = q_BHTD.shape
        if valid_BT is None:
            valid_BT = torch.ones(batch, length, dtype=torch.bool, device=heard.device)
        places_1T = torch.arange(length, device=heard.device)[None]
        sums_BGT = column_scores(
            q_BHTD, k_BGTD, self._softmax, valid_BT[:, None].float(), places_1T, places_1T, valid_BT
        )[:, :, 0]
        behind_BT = valid_BT.flip(-1).cumsum(-1).flip(-1)
        mean_BT = sums_BGT.sum(1) / (heads * behind_BT.clamp(min=1))
        return mean_BT.masked_fill(~valid_BT, 0.0).to(rope[0].device)

    def _last_logits(self, rope: tuple[Tensor, Tensor], valid_BT: Tensor | None, end: int | None = None) -> Tensor:
        last = slice((rope[0].shape[1] if end is None else end) - 1, end)
        q_BHTD, k_BGTD = self._rotated(rope, last, slice(end))
        k_BHTD = k_BGTD.repeat_interleave(q_BHTD.shape[1] // k_BGTD.shape[1], dim=1)
        logits_BHT = self._softmax.logits((q_BHTD.float() @ k_BHTD.float().transpose(-1, -2))[:, :, 0])
        if valid_BT is not None:
            logits_BHT = logits_BHT.masked_fill(~valid_BT[:, None, :end], float("-inf"))
        return logits_BHT

    def _rotated(self, rope: tuple[Tensor, Tensor], queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, D) and keys (B, G, T, D) of some columns, as the module has them behind RoPE."""
        q_BHTD = self._normed("q_norm", self._heads(self._q_BTC)[:, queries]).transpose(1, 2)
        k_BGTD = self._normed("k_norm", self._heads(self._k_BTC)[:, keys]).transpose(1, 2)
        rotate = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb  # each architecture has its own
        cos, sin = rope
        q_BHTD = rotate(q_BHTD, q_BHTD, cos[:, queries], sin[:, queries])[0]
        return q_BHTD, rotate(k_BGTD, k_BGTD, cos[:, keys], sin[:, keys])[1]

    @property
    def _softmax(self) -> Softmax:
        """As the module is built: Gemma 2 caps its logits, gpt-oss has sinks beside them."""
        cap, sinks_H = (getattr(self.attention, name, None) for name in ("attn_logit_softcapping", "sinks"))
        return Softmax(self.attention.scaling, cap, sinks_H)

    @property
    def _architecture(self) -> _Layer:
        if self._key is None:
            layer = getattr(self.attention, "layer_idx", -1)
            self._key = type(self.attention), self.attention.config.to_json_string(), -1 if layer is None else layer
        return self._key

    def _compare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Behind the first pass of a decoder's attention: is the row of its last token what the module works out itself?

        At once, so that nothing of the pass has to be kept for a question that may never come.
        """
        if self._architecture in _KNOWN or "position_embeddings" not in kwargs:  # the layers of a tower rotate nothing
            return
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape[-1] != self._heads(self._k_BTC).shape[1]:  # a step behind a cache
            return
        heard = self._q_BTC, self._k_BTC  # the module runs again here, and must not be heard
        try:
            with torch.no_grad(), _disable_current_modes():  # no part of what a method costs, where that is counted
                own_BHT, own = own_last_row(self.attention, args, kwargs)
                found_BHT = self._last_logits(kwargs["position_embeddings"], None)
                _KNOWN[self._architecture] = own.equals(self._softmax) and _agree(found_BHT, own_BHT, output[0].dtype)
        except Exception:  # shapes that do not fit, functions that are not there: each architecture in its own way
            _KNOWN[self._architecture] = False
        finally:
            self._q_BTC, self._k_BTC = heard

    def _unknown(self, why: str) -> Infeasible:
        return Infeasible(
            f"the attention that tokens get cannot be read off {type(self.attention).__name__}, which {why}; allowed: decoders "
            "with attention like that of Llama, Qwen2 or Qwen3"
        )

    def _heads(self, x_BTC: Tensor | None) -> Tensor:
        if x_BTC is None:
            raise RuntimeError("the tapped layer has not run yet")
        return x_BTC.unflatten(-1, (-1, self.attention.head_dim))

    def _normed(self, name: str, x_BTHD: Tensor) -> Tensor:
        norm = getattr(self.attention, name, None)  # Qwen3 and Gemma3 normalise per head
        return x_BTHD if norm is None else norm(x_BTHD)

    def _whole_normed(self, name: str, x_BTC: Tensor | None) -> Tensor | None:
        norm = getattr(self.attention, name, None)  # InternVL's tower normalises all heads at once
        return x_BTC if norm is None or x_BTC is None else norm(x_BTC)

    def _note_q(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._q_BTC = output

    def _note_k(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._k_BTC = output


def _agree(found_BHT: Tensor, own_BHT: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are equal, up to rounding, where the module's own are not masked."""
    seen = ~own_BHT.isinf()
    largest = TOLERANCE.get(dtype, 2e-2) * own_BHT[seen].abs().max()
    return found_BHT.shape == own_BHT.shape and bool((found_BHT - own_BHT)[seen].abs().max() <= largest)
