"""What a checkpoint's decoder does in its attention: found by running it without weights, refused where methods on the
cache could not take its place.

Shared by language models and the language models inside vision-language models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.models.hooks.attention import AttentionCall, replaced_attention, supports_attention
from isoflop.models.hooks.matrices import matrix_shapes


def decoder_geometry(ref: str, decoder: Any, name: str) -> dict[str, Any]:
    """``width``, ``layers``, ``heads``, ``kv_heads``, ``head_width``, ``vocab_size`` and ``matrices`` of a Hugging Face decoder.

    Heads are those that the first layer's attention is called with, which configs name in different ways.

    Args:
        decoder: on the device ``meta``; see ``DecoderModel.decoder``.
        name: of the architecture, for messages.

    Raises:
        Infeasible: no list of layers, windows, capped logits, attention sinks, keys and values of different widths, or attention that does
            not go through transformers' interface.
    """
    config = decoder.config
    if not (hasattr(decoder, "layers") or hasattr(decoder, "h")):
        raise Infeasible(
            f"model {ref}: {name} keeps its layers elsewhere than a decoder does; allowed: architectures with a list of "
            "decoder layers (Llama, Qwen, Mistral, GPT-NeoX, OPT, …)"
        )
    _refuse_windows(ref, config, name)
    call = _first_call(ref, decoder, name)
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


class _FirstCall(Exception):
    """Ends the pass; nothing went wrong."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call


def _first_call(ref: str, decoder: Any, name: str) -> AttentionCall:
    """What the first layer's attention is called with in a pass that ends there."""
    elsewhere = Infeasible(
        f"model {ref}: {name} does not call its attention through transformers' attention interface, so nothing can act "
        "on its cache; allowed: architectures that do (Llama, Qwen, Mistral, GPT-NeoX, OPT, …)"
    )
    if not supports_attention(decoder) or not hasattr(decoder.config, "num_hidden_layers"):
        raise elsewhere

    def stop(call: AttentionCall) -> Tensor:
        raise _FirstCall(call)

    ids_BT = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), replaced_attention(decoder, stop):
            decoder.eval()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
    except _FirstCall as found:
        return found.call
    except Infeasible as error:
        raise Infeasible(f"model {ref}: {name}: {error}") from error
    except Exception as error:
        # whatever a module does besides attention (state spaces, code from the repository) fails in ways of its own
        raise elsewhere from error
    raise elsewhere
