"""What a checkpoint's decoder does in its attention: found by running it without weights, refused where methods on the
cache could not take its place.

Shared by language models and the language models inside vision-language models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.models.decoder_model import layers_of
from isoflop.models.hooks.attention import AttentionCall, replaced_attention, supports_attention
from isoflop.models.hooks.matrices import matrix_shapes


def decoder_geometry(ref: str, decoder: Any, name: str) -> dict[str, Any]:
    """``width``, ``layers``, ``heads``, ``kv_heads``, ``head_width``, ``vocab_size`` and ``matrices`` of a Hugging Face decoder.

    Heads are those that the first layer's attention is called with, which configs name in different ways.

    Args:
        decoder: on the device ``meta``; see ``DecoderModel.decoder``.
        name: of the architecture, for messages.

    Raises:
        Infeasible: no list of layers, layers that call their attention more than once in a pass, windows, capped logits, attention sinks, keys and values of different widths, or attention that does
            not go through transformers' interface.
    """
    config = decoder.config
    if not (hasattr(decoder, "layers") or hasattr(decoder, "h")):
        raise Infeasible(
            f"model {ref}: {name} keeps its layers elsewhere than a decoder does; allowed: architectures with a list of "
            "decoder layers (Llama, Qwen, Mistral, GPT-NeoX, OPT, …)"
        )
    _refuse_windows(ref, config, name)
    calls = _attention_calls(ref, decoder, name)
    _refuse_second_calls(ref, calls, name)
    call = calls[0]
    heads, head_width = call.q_BHTD.shape[1], call.q_BHTD.shape[3]
    if call.v_BGTD.shape[3] != head_width:
        raise Infeasible(
            f"model {ref}: {name} has keys of width {head_width} and values of width {call.v_BGTD.shape[3]}; allowed: equal widths"
        )
    return {
        "width": int(config.hidden_size),
        "layers": int(config.num_hidden_layers),
        "heads": heads,
        "kv_heads": call.k_BGTD.shape[1],
        "head_width": head_width,
        "vocab_size": int(config.vocab_size),
        "matrices": matrix_shapes(decoder),
    }


def _refuse_windows(ref: str, config: Any, name: str) -> None:
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention"} or (window is not None and not kinds):
        raise Infeasible(
            f"model {ref}: {name} attends within windows ({', '.join(sorted(kinds)) or f'sliding_window = {window}'}); "
            "allowed: full attention in every layer"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        raise Infeasible(
            f"model {ref}: {name} caps its attention logits at {softcap}; allowed: plain softmax attention"
        )


def _attention_calls(ref: str, decoder: Any, name: str) -> list[AttentionCall]:
    """What attention is called with in one whole pass over two tokens, in order; at least one call.

    A layer whose other parts cannot run without weights (routers that look at values) ends behind its attention: its
    input goes on, so that the layers behind it are still seen.
    """
    elsewhere = Infeasible(
        f"model {ref}: {name} does not call its attention through transformers' attention interface, so nothing can act "
        "on its cache; allowed: architectures that do (Llama, Qwen, Mistral, GPT-NeoX, OPT, …)"
    )
    if not supports_attention(decoder) or not hasattr(decoder.config, "num_hidden_layers"):
        raise elsewhere
    calls: list[AttentionCall] = []

    def note(call: AttentionCall) -> Tensor:
        calls.append(call)
        batch, heads, length, _ = call.q_BHTD.shape
        return call.q_BHTD.new_empty(batch, length, heads, call.v_BGTD.shape[3])

    ids_BT = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), _passed_on(layers_of(decoder), calls), replaced_attention(decoder, note):
            decoder.eval()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
    except Infeasible as error:
        raise Infeasible(f"model {ref}: {name}: {error}") from error
    except Exception as error:
        # whatever a module does besides attention (state spaces, code from the repository) fails in ways of its own
        if not calls:
            raise elsewhere from error
    if not calls:
        raise elsewhere
    return calls


@contextmanager
def _passed_on(layers: Any, calls: list[AttentionCall]) -> Iterator[None]:
    """Inside the block a layer that fails behind its attention gives its input as its output."""

    def lenient(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = len(calls)
            try:
                return run(*args, **kwargs)
            except Infeasible:
                raise
            except Exception:
                if len(calls) == before or not args:
                    raise
                return args[0]

        return forward

    for layer in layers:
        layer.forward = lenient(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _refuse_second_calls(ref: str, calls: list[AttentionCall], name: str) -> None:
    layer, times = Counter(call.layer for call in calls).most_common(1)[0]
    if times > 1:
        raise Infeasible(
            f"model {ref}: {name} calls its attention {times} times per pass in layer {layer}, so nothing can act on its cache; "
            "allowed: architectures with one call per layer (Llama, Qwen, Mistral, GPT-NeoX, OPT, …)"
        )
