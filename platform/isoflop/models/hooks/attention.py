"""The hook ``attention``: run one's own attention inside a Hugging Face decoder, whose other code stays as it is.

A function registered with transformers' attention interface, together with a mask builder of the same name, sees the
queries and keys after RoPE, which is all that KV-cache and sparse-attention methods need. The builder hands the padding
mask through, so that exact masks are built from positions, also over caches from which tokens are gone.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of this call, D head width.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.kernels.softmax import Softmax
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.windows import windowed_attention

if TYPE_CHECKING:
    from isoflop.models.rotary import Rotation

IMPLEMENTATION = "isoflop"
_WITHOUT_EFFECT = frozenset(
    {
        "dropout", "is_causal", "position_ids", "cache_position", "past_key_values", "use_cache", "return_dict", "deterministic",
        "output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep",
    }
)  # fmt: skip
"""What modules hand to their attention function that changes nothing in a causal pass without training. Anything else
may change the softmax (biases, packed sequences), but for what a call says: windows, caps and sinks."""
_REPLACEABLE = (
    "allowed: a softmax over all tokens before or those in a window, with or without a cap on the logits and sinks"
)


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one forward pass.

    Attributes:
        layer: number of the decoder layer.
        q_BHTD, k_BGTD, v_BGTD: of the tokens in this pass, after RoPE.
        softmax: from products of queries and keys to weights.
        order_BT: each token's number among its row's real tokens that have reached this layer, from 0; batch dimension 1
            when all rows agree. It orders and counts tokens. It is not the position that RoPE used, which may have gaps
            where tokens were dropped before; nothing here needs that, as keys and queries carry it.
        valid_BT: False for padding; None when nothing is padded.
        ids_BT: token ids, where the policy follows them.
        examples_B: example numbers, where the model has them. What is random in a method depends on these numbers, else on
            the token ids, and on nothing else of the batch.
        carried: what layers before this one have left about these very tokens in this pass, by name, and where this layer
            leaves something for those behind it. Empty at the first layer of every pass. The policy sees to it that
            tokens which a layer takes at once have one memory, so that what is left holds for each query by itself.
        window: tokens that each query sees, itself included; None where it sees all before it. A policy leaves layers with a
            window as they are: their caches hold no more (see ``isoflop.models.windows``).
        rotation: how the layer has turned the queries and keys, where the policy follows it and positions turn them.
    """

    layer: int
    q_BHTD: Tensor
    k_BGTD: Tensor
    v_BGTD: Tensor
    softmax: Softmax
    order_BT: Tensor
    valid_BT: Tensor | None
    ids_BT: Tensor | None = None
    examples_B: Tensor | None = None
    carried: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    window: int | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True)
class CacheReport:
    """What the key-value cache of the last forward pass took: bytes per example, summed over layers.

    Attributes:
        stored, dense: everything resident at the end of the pass (codes, scales, indices, labels, exact tokens, scores
            kept for later steps), and the same tokens kept whole.
        prompt_stored, prompt_dense: the same of the compressed prompt alone.
        read: fetched by one decoding step at the end of the pass.
    """

    stored: float
    dense: float
    prompt_stored: float
    prompt_dense: float
    read: float


class AttentionPolicy(Occupant):
    """The occupant: computes every attention layer of the decoder, and answers for the cache.

    Attributes:
        prefix: tokens of the prompt in a one-pass evaluation, at the layer that runs next; None for plain causal passes.
        examples_B: example numbers of that evaluation's rows, where the model has them.
        spans_layers: layers share their caches, so that the prompt must run through all of them before anything behind it
            does: models run such a policy in a session, the prompt first.
        token_by_token: and what comes behind the prompt takes a pass per token.
        follows_rotation: calls tell how queries and keys were turned.
        exact_prompt: the pass over a prompt, in a session, is what it would be without the policy.
    """

    prefix: int | None = None
    examples_B: Tensor | None = None
    held_in_session: ClassVar[tuple[str, ...]] = ()
    """Attributes in which a session keeps what it has seen; what ``report`` needs is none of them."""
    spans_layers: bool = False
    token_by_token: bool = False
    follows_rotation: bool = False
    exact_prompt: bool = False

    @contextmanager
    def returning(self) -> Iterator[None]:
        """Inside a session: what passes inside the block add is gone behind it, but for what ``report`` says of them.

        Tensors are shared with what it returns to, not copied: passes replace them, or write behind their end.
        """
        with self._putting_back() as held:
            # one copy of all, so that what several of them share they share afterwards, too
            vars(self).update(copy.deepcopy(held, _tensors_within(held)))
            yield

    @contextmanager
    def _putting_back(self) -> Iterator[dict[str, Any]]:
        """Gives what a session holds, which behind the block is there again: what one was open before goes on."""
        held = {name: getattr(self, name) for name in self.held_in_session}
        try:
            yield held
        finally:
            vars(self).update(held)

    def noting(self) -> AbstractContextManager[list[AttentionCall]]:
        """Gives the calls of the layers in the passes inside the block; of whoever has an ``exact_prompt``."""
        raise NotImplementedError(f"{type(self).__name__} notes no calls")

    def follow(self, calls: Sequence[AttentionCall], ids_BT: Tensor) -> None:
        """Inside a session: take in a prompt whose pass has run before, with the calls that were noted then."""
        raise NotImplementedError(f"{type(self).__name__} follows no calls")

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """The layer's output, (B, T, H, D)."""

    @abstractmethod
    def session(self) -> AbstractContextManager[None]:
        """A step-by-step run: the first pass inside the block is the prompt, later ones continue it.

        One that is open already waits, and goes on behind the block. Where ``prefix`` is set, the first pass is a one-pass evaluation: a prompt and tokens behind it.
        """

    @abstractmethod
    def report(self) -> CacheReport:
        """Bytes of the last one-pass evaluation, or of the session so far.

        Raises:
            ValueError: nothing has been compressed, or nothing since ``forget``.
        """

    @abstractmethod
    def forget(self) -> None:
        """Nothing has been run yet, as far as ``report`` knows; a session goes on. Meters call it when they open."""


def _tensors_within(held: Any) -> dict[int, Any]:
    """Every tensor that can be reached, by its id: for ``copy.deepcopy`` something that it has copied already."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    left = [held]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found[id(one)] = one
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, (list, tuple, set)):
            left += one
        elif hasattr(one, "__dict__"):
            left += vars(one).values()
    return found


class AttentionHook(Hook[AttentionPolicy]):
    """Every attention layer of the decoder calls the policy's ``attend``."""

    @contextmanager
    def installed(self, model: Any, occupant: AttentionPolicy) -> Iterator[None]:
        """See ``once_per_pass`` and ``isoflop.models.rotary``."""
        from isoflop.models.rotary import followed_rotations

        following = followed_rotations(model.decoder) if occupant.follows_rotation else nullcontext()
        with following as rotation_of, once_per_pass(model.decoder, occupant.attend, rotation_of):
            yield


ATTENTION = AttentionHook("attention", 30, "computes the decoder's attention and keeps its key-value cache")
Attend = Callable[[AttentionCall], Tensor]
_ACTIVE: dict[int, Attend] = {}


@contextmanager
def replaced_attention(decoder: Any, attend: Attend) -> Iterator[None]:
    """Every attention layer of ``decoder`` calls ``attend`` inside the ``with`` block."""
    if id(decoder.config) in _ACTIVE:
        raise RuntimeError("another method has replaced the attention of this model already")
    with replacing(decoder.config, attend):
        yield


@contextmanager
def replacing(config: Any, attend: Attend) -> Iterator[None]:
    """Attention modules of a config call ``attend`` inside the block, whatever took their attention before."""
    _register()
    before, occupied = config._attn_implementation, _ACTIVE.get(id(config))
    _ACTIVE[id(config)] = attend
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
        del _ACTIVE[id(config)]
        if occupied is not None:
            _ACTIVE[id(config)] = occupied


@contextmanager
def once_per_pass(
    decoder: Any, attend: Attend, rotation_of: Callable[[int], Rotation | None] | None = None
) -> Iterator[None]:
    """``replaced_attention`` for a policy that keeps a cache: a layer has one store, to which a call adds its tokens.

    Args:
        rotation_of: how a layer turns the queries and keys of the pass, where the policy follows it.

    Raises:
        Infeasible: inside the block, when a layer calls its attention again in the same pass of ``decoder``, whose
            second call a store would take for later tokens.
    """
    called: set[int] = set()

    def guarded(call: AttentionCall) -> Tensor:
        if call.layer in called:
            raise Infeasible(
                f"layer {call.layer} of {type(decoder).__name__} calls its attention twice in one pass, so nothing can act on its "
                "cache; allowed: one call per layer"
            )
        if running[0]:
            called.add(call.layer)
        return attend(call if rotation_of is None else replace(call, rotation=rotation_of(call.layer)))

    def started(module: Any, args: Any) -> None:
        called.clear()
        running[0] = True

    def ended(module: Any, args: Any, output: Any) -> None:
        called.clear()
        running[0] = False

    running = [False]  # layers that are run by hand, outside a pass, may be run as often as one likes
    before = decoder.register_forward_pre_hook(started)
    behind = decoder.register_forward_hook(ended, always_call=True)
    try:
        with replaced_attention(decoder, guarded):
            yield
    finally:
        before.remove()
        behind.remove()


def causal_attention(call: AttentionCall) -> Tensor:
    """Plain causal attention over the tokens of the call, within its window if it has one, (B, T, H, D).

    Neighbouring rows that stand in the same columns go together, without a mask: one would take memory in the square of the
    tokens, and rules out the kernels that do without. What comes out at padding means nothing; it is finite.
    """
    if call.window is not None:
        return windowed_attention(call.q_BHTD, call.k_BGTD, call.v_BGTD, call.softmax, call.window, call.valid_BT)
    tensors = call.q_BHTD, call.k_BGTD, call.v_BGTD
    if call.valid_BT is None:
        return call.softmax.attend(*tensors).transpose(1, 2)
    out_BHTD = call.v_BGTD.new_zeros(*call.q_BHTD.shape[:3], call.v_BGTD.shape[-1])
    for rows, columns in standing_alike(call.valid_BT):
        q, k, v = (x[rows][:, :, columns] for x in tensors)
        out_BHTD[rows, :, columns] = call.softmax.attend(q, k, v)
    return out_BHTD.transpose(1, 2)


def whole_attention(call: AttentionCall) -> Tensor:
    """Attention of every token of the call to all real ones, (B, T, H, D)."""
    valid_BT = call.valid_BT
    if valid_BT is None:
        valid_BT = torch.ones(1, call.k_BGTD.shape[2], dtype=torch.bool, device=call.k_BGTD.device)
    sees = valid_BT[:, None, None]
    return call.softmax.attend(call.q_BHTD, call.k_BGTD, call.v_BGTD, sees).transpose(1, 2)


def standing_alike(valid_BT: Tensor) -> Iterator[tuple[slice, slice | Tensor]]:
    """Neighbouring rows with their real tokens in the same columns, and those columns; rows without any are left out."""
    host_BT = valid_BT.cpu()
    start = 0
    for _, alike in groupby(host_BT, key=lambda valid_T: valid_T.numpy().tobytes()):
        stop = start + len(list(alike))
        columns_N = host_BT[start].nonzero()[:, 0]
        if len(columns_N):
            first, last = int(columns_N[0]), int(columns_N[-1])
            gapless = last - first + 1 == len(columns_N)
            yield slice(start, stop), slice(first, last + 1) if gapless else columns_N.to(valid_BT.device)
        start = stop


def order_of(valid_BT: Tensor | None, length: int, device: torch.device, before: Tensor | int = 0) -> Tensor:
    """Numbers of a pass's tokens among the real ones, (B or 1, T); padding takes the number before it, or 0.

    Args:
        before: real tokens of earlier passes, for all rows or each, (B, 1).
    """
    if valid_BT is None:
        return torch.arange(length, device=device)[None] + before
    return (valid_BT.long().cumsum(-1) - 1 + before).clamp(min=0)


def supports_attention(module: Any) -> bool:
    """Whether a Hugging Face model dispatches through the attention interface (Falcon and Bloom do not)."""
    return bool(getattr(module, "_supports_attention_backend", False))


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    changes = sorted(name for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT)
    if changes:
        raise Infeasible(f"attention with {', '.join(changes)} cannot be replaced; {_REPLACEABLE}")
    if attention_mask is not None and attention_mask.dim() != 2:  # ours hands padding through
        raise Infeasible(f"attention with a mask of the architecture's own cannot be replaced; {_REPLACEABLE}")
    valid_BT = None if attention_mask is None else attention_mask.bool()[:, -query.shape[2] :]
    order_BT = order_of(valid_BT, query.shape[2], query.device)
    softmax, window = Softmax(scaling, softcap, s_aux), _window(module, sliding_window)
    call = AttentionCall(module.layer_idx, query, key, value, softmax, order_BT, valid_BT, window=window)
    return _ACTIVE[id(module.config)](call).contiguous(), None


def _window(module: Any, given: int | None) -> int | None:
    """A layer's window; None where no text of the model is longer."""
    positions = getattr(module.config, "max_position_embeddings", None)
    return None if given is None or (positions is not None and given >= positions) else given


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    if attention_mask is None or attention_mask.is_meta or bool(attention_mask.all()):
        return None
    return attention_mask


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if IMPLEMENTATION not in AttentionInterface._global_mapping:
        AttentionInterface.register(IMPLEMENTATION, _attention)
        AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)
