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
from isoflop.models.checkpoints.source import brief
from isoflop.models.decoder_model import layers_of
from isoflop.models.hooks.attention import AttentionCall, replaced_attention, supports_attention
from isoflop.models.hooks.matrices import matrix_shapes
from isoflop.models.rotary import OTHER, rotation_known


def without_weights(ref: str, config: Any, what: str, make: Callable[[], Any]) -> Any:
    """A module without memory for its weights.

    Args:
        what: it shall be, for messages.
        make: builds it from ``config``.

    Raises:
        Infeasible: the config is one of something else, or transformers builds nothing of it.
    """
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # each architecture checks its config in a way of its own
        if "Unrecognized configuration class" in str(error):
            raise Infeasible(
                f"model {ref}: its config, of the type {config.model_type!r}, is not that of a {what}"
            ) from error
        raise Infeasible(
            f"model {ref}: transformers builds no {what} of its config, of the type {config.model_type!r} ({brief(error)})"
        ) from error


def decoder_geometry(ref: str, decoder: Any, name: str, windows: bool = True) -> dict[str, Any]:
    """``width``, ``layers``, ``heads``, ``kv_heads``, ``head_width``, ``vocab_size`` and ``matrices`` of a Hugging Face decoder,
    and ``windows`` where some of its layers attend within windows: by layer, None for one that attends to all tokens before; and
    ``rotation``, where positions turn queries in a way that cannot be taken back.

    Heads are those that the first layer's attention is called with, which configs name in different ways.

    Args:
        decoder: on the device ``meta``; see ``DecoderModel.decoder``.
        name: of the architecture, for messages.
        windows: whether layers may attend within windows, as long as some do not.

    Raises:
        Infeasible: no list of layers, layers that call their attention never or more than once in a pass, layers of other kinds
            (recurrences, windows in all of them or where none may be), masks of an architecture's own, heads that differ between the
            layers, keys and values of different widths, or attention that does not go through transformers' interface.
    """
    config = decoder.config
    if not (hasattr(decoder, "layers") or hasattr(decoder, "h")):
        raise Infeasible(
            f"model {ref}: {name} keeps its layers elsewhere than a decoder does; allowed: architectures with a list of "
            "decoder layers (Llama, Qwen, Mistral, GPT-NeoX, OPT, …)"
        )
    _refuse_other_layers(ref, config, name)
    calls, failed = _attention_calls(ref, decoder, name)
    _refuse_uneven_calls(ref, calls, len(layers_of(decoder)), name, failed)
    widths = _windows(ref, config, calls, name)
    if any(widths) and not windows:
        raise Infeasible(
            f"model {ref}: {name} attends within windows ({_kinds(config)}), and tokens that leave between its layers would leave "
            "them without a width; allowed here: full attention in every layer"
        )
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
        **({"windows": widths} if any(widths) else {}),
        **({} if rotation_known(decoder, head_width) else {"rotation": OTHER}),
    }


def ropes_of(config: Any) -> list[dict[str, Any]]:
    """What a config says of its rotary embeddings, one for all layers or one per kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    inner = [value for value in given.values() if isinstance(value, dict)]
    return inner or [given]


def _refuse_other_layers(ref: str, config: Any, name: str) -> None:
    kinds = set(getattr(config, "layer_types", None) or [])
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others and not any("sliding" in kind or "chunk" in kind for kind in others):
        raise Infeasible(
            f"model {ref}: {name} has layers that do not attend to all tokens before ({', '.join(others)}); "
            "allowed: full attention, or sliding windows in some layers"
        )
    if others:
        raise Infeasible(
            f"model {ref}: {name} attends within windows ({', '.join(others)}); allowed: full attention, or sliding windows in some "
            "layers"
        )
    if any(rope.get("rope_type") == "dynamic" for rope in ropes_of(config)):
        raise Infeasible(
            f"model {ref}: {name} rotates a text of another length in another way (rope_type = dynamic), so that a step is not what one "
            "pass gives; allowed: rotations that depend on positions alone (default, linear, yarn, llama3, …)"
        )
    if getattr(config, "attn_temperature_tuning", False):
        raise Infeasible(
            f"model {ref}: {name} scales queries by how much transformers' own cache holds (attn_temperature_tuning); allowed: "
            "queries that depend on their positions alone"
        )
    shared = getattr(config, "num_kv_shared_layers", 0)
    if shared:
        raise Infeasible(
            f"model {ref}: {name} takes keys and values of its last {shared} layers from layers before them (num_kv_shared_layers), whose "
            "bytes would count twice; allowed: keys and values of its own in every layer"
        )


def _windows(ref: str, config: Any, calls: list[AttentionCall], name: str) -> tuple[int | None, ...]:
    """The window that each layer hands to its attention; what its config says besides is refused."""
    found = tuple(call.window for call in calls)
    width, positions = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    cuts = width is not None and (positions is None or width < positions)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if any(found) or cuts else ""] * len(found)
    for layer, (kind, window) in enumerate(zip(kinds, found, strict=True)):
        if (kind == "sliding_attention" and cuts) != (window is not None):
            said = "none" if window is None else f"one of {window} tokens"
            raise Infeasible(
                f"model {ref}: {name} attends within windows ({_kinds(config)}), and hands {said} to its attention in layer {layer}; "
                "allowed: layers that hand over the window that their config names"
            )
    if all(found):
        raise Infeasible(
            f"model {ref}: {name} attends within windows ({_kinds(config)}) in every layer, whose caches hold nothing to compress; "
            "allowed: full attention in some layers"
        )
    return found


def _kinds(config: Any) -> str:
    """What a config says of its windows, for messages."""
    kinds = set(getattr(config, "layer_types", None) or [])
    said = [f"sliding_window = {getattr(config, 'sliding_window', None)}"]
    return ", ".join([*sorted(kinds - {"full_attention"}), *said])


def _attention_calls(ref: str, decoder: Any, name: str) -> tuple[list[AttentionCall], Exception | None]:
    """What attention is called with in one whole pass over two tokens, in order, at least one call; and what ended the pass.

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
    failed: Exception | None = None

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
        failed = error
        if not calls:
            raise Infeasible(
                f"model {ref}: {name} cannot be followed to its attention without weights ({brief(error)}); "
                "allowed: architectures with attention like that of Llama, Qwen, Mistral, GPT-NeoX, OPT, …"
            ) from error
    if not calls:
        raise elsewhere
    return calls, failed


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


def _refuse_uneven_calls(
    ref: str, calls: list[AttentionCall], layers: int, name: str, failed: Exception | None
) -> None:
    """Every layer calls once, with the same heads: caches and their bytes are counted so."""
    counts = Counter(call.layer for call in calls)
    layer, times = counts.most_common(1)[0]
    missing = sorted(set(range(layers)) - set(counts))
    if missing:
        why = "" if failed is None else f" ({brief(failed)})"
        raise Infeasible(
            f"model {ref}: {name} calls no attention in layer {missing[0]} of {layers}{why}; allowed: attention in every layer"
        )
    shapes = {call.layer: (call.q_BHTD.shape[1], call.k_BGTD.shape[1], call.q_BHTD.shape[3]) for call in calls}
    other = next((n for n, shape in shapes.items() if shape != shapes[0]), None)
    if other is not None:
        heads = " and ".join("{} query heads on {} of width {} in layer {}".format(*shapes[n], n) for n in (0, other))
        raise Infeasible(f"model {ref}: {name} has {heads}; allowed: the same heads in every layer")
    if times > 1:
        raise Infeasible(
            f"model {ref}: {name} calls its attention {times} times per pass in layer {layer}, so nothing can act on its cache; "
            "allowed: architectures with one call per layer (Llama, Qwen, Mistral, GPT-NeoX, OPT, …)"
        )
