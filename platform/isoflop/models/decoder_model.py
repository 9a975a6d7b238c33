"""Models with a decoder-only language model inside: what methods on its cache, attention and layers hold on to.

Shape suffixes: B batch, T tokens, W vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.models.attention import AttentionPolicy, replaced_attention
from isoflop.models.base import Model
from isoflop.models.context import ContextCompressor
from isoflop.models.mlps import MlpPolicy


class DecoderModel(Model):
    """A language model, or a vision-language model with one inside.

    Attributes:
        attention: the attention policy in place (KV-cache and sparse-attention methods), or None for stock attention.
        context: what shortens the documents of a prompt before the model reads them, or None.
        mlp: what switches neurons of the feed-forward blocks off, or None.
    """

    attention: AttentionPolicy | None = None
    context: ContextCompressor | None = None
    mlp: MlpPolicy | None = None

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The Hugging Face decoder: a module with ``layers``, ``embed_tokens``, ``norm`` and ``config``."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.module.parameters()).device

    def dense_cache_bytes(self, tokens: int) -> float:
        """Bytes of a key-value cache that holds so many tokens whole in every layer, one request."""
        shape = self.info.geometry
        width = shape.get("head_width", shape["width"] // shape["heads"])
        return 2 * shape["layers"] * shape["kv_heads"] * width * tokens * self.info.dense_bits / 8

    @contextmanager
    def attending(self, policy: AttentionPolicy) -> Iterator[None]:
        """Every attention layer of the decoder goes through ``policy`` inside the ``with`` block.

        Raises:
            Infeasible: another method has taken the place.
        """
        if self.attention is not None:
            raise Infeasible("a trial takes one method on the KV cache or attention, not two")
        self.attention = policy
        try:
            with replaced_attention(self.decoder, policy.attend):
                yield
        finally:
            del self.attention

    @contextmanager
    def thinning(self, policy: MlpPolicy) -> Iterator[None]:
        """Inside the ``with`` block ``policy``, whose hooks are in place, answers for the feed-forward blocks.

        Raises:
            Infeasible: another method has taken the place.
        """
        if self.mlp is not None:
            raise Infeasible("a trial takes one method on the neurons of the feed-forward blocks, not two")
        self.mlp = policy
        try:
            yield
        finally:
            del self.mlp

    @contextmanager
    def reading_through(self, compressor: ContextCompressor) -> Iterator[None]:
        """Inside the ``with`` block tasks hand the documents of a prompt to ``compressor``.

        Raises:
            Infeasible: another method has taken the place.
        """
        if self.context is not None:
            raise Infeasible("a trial takes one method on the text of a prompt, not two")
        self.context = compressor
        try:
            yield
        finally:
            del self.context

    @contextmanager
    def compressing_prefix(self, tokens: int, examples_B: Tensor | None = None) -> Iterator[None]:
        """Inside the block the first ``tokens`` of a forward pass are the prompt that the policy compresses.

        Queries inside the prefix attend to it exactly; queries behind it attend to its compressed form and exactly to
        the tokens behind it. That equals compressing after the prompt and going on step by step, because the states
        of a prefix never depend on what follows. Without a policy the block changes nothing.

        Args:
            examples_B: example numbers of the rows, for what is random in the policy; None where there are none.
        """
        policy = self.attention
        if policy is None:
            yield
            return
        before = policy.prefix
        policy.prefix, policy.examples_B = tokens, examples_B
        try:
            yield
        finally:
            policy.prefix, policy.examples_B = before, None


def decoder_model(model: Model, method: str) -> DecoderModel:
    """``model`` as one with a decoder; Infeasible otherwise."""
    if not isinstance(model, DecoderModel):
        raise Infeasible(f"method {method}: model {model.info.ref} has no language model inside")
    return model
