"""Models with a decoder-only language model inside: what methods on its cache, attention and layers hold on to.

Shape suffixes: B batch, T tokens, W vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.models.base import Model
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT


class DecoderModel(Model):
    """A language model, or a vision-language model with one inside.

    Args:
        tokenizer: gives the model's tokenizer, which is read when text is handed to the model; None where it has none.
    """

    def __init__(self, tokenizer: Callable[[], Any] | None = None) -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face fast tokenizer.

        Raises:
            Infeasible: the model has none.
        """
        if self._tokenizer is None:
            raise Infeasible(f"model {self.info.ref} has no tokenizer, so that text cannot be handed to it")
        return self._tokenizer()

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The Hugging Face decoder: a module with ``layers``, ``embed_tokens``, ``norm`` and ``config``."""

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The layers of the decoder."""
        return layers_of(self.decoder)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.module.parameters()).device

    @property
    def room(self) -> int:
        """Tokens that a text may have: the model's positions without those that a learned prompt takes."""
        prompt = self.occupant(SOFT_PROMPT)
        return int(self.info.geometry["positions"]) - (0 if prompt is None else prompt.tokens)

    def dense_cache_bytes(self, tokens: int) -> float:
        """Bytes of a key-value cache that holds so many tokens whole in every layer, or its window of them, one request."""
        shape = self.info.geometry
        width = shape.get("head_width", shape["width"] // shape["heads"])
        windows = shape.get("windows") or [None] * shape["layers"]
        held = sum(tokens if window is None else min(window, tokens) for window in windows)
        return 2 * held * shape["kv_heads"] * width * self.info.dense_bits / 8

    @contextmanager
    def compressing_prefix(self, tokens: int, examples_B: Tensor | None = None) -> Iterator[None]:
        """Inside the block the first ``tokens`` of a forward pass are the prompt that the policy compresses.

        Queries inside the prefix attend to it exactly; queries behind it attend to its compressed form and exactly to
        the tokens behind it. That equals compressing after the prompt and going on step by step, because the states
        of a prefix never depend on what follows. A learned prompt before the text belongs to it. Without a policy the block
        changes nothing.

        Args:
            examples_B: example numbers of the rows, for what is random in the policy; None where there are none.
        """
        policy, learned = self.occupant(ATTENTION), self.occupant(SOFT_PROMPT)
        with ExitStack() as stack:
            if learned is not None:
                stack.callback(setattr, learned, "prefix", learned.prefix)
                learned.prefix = tokens
                tokens += learned.tokens
            if policy is not None:
                stack.callback(vars(policy).update, prefix=policy.prefix, examples_B=None)
                policy.prefix, policy.examples_B = tokens, examples_B
            yield


def decoder_of(module: Any) -> Any:
    """A Hugging Face causal language model without its head.

    ``get_decoder`` goes by names: it gives the head where an architecture calls that its decoder (ModernBERT), and the module
    itself where it finds nothing (Llama 4).
    """
    from transformers import PreTrainedModel

    found = (module.get_decoder(), module.base_model, getattr(module, "model", None))
    return next((one for one in found if isinstance(one, PreTrainedModel) and one is not module), module)


def layers_of(decoder: Any) -> nn.ModuleList:
    """The layers of a Hugging Face decoder, which GPT-2 calls ``h``."""
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def decoder_model(model: Model, method: str) -> DecoderModel:
    """``model`` as one with a decoder; Infeasible otherwise."""
    if not isinstance(model, DecoderModel):
        raise Infeasible(f"method {method}: model {model.info.ref} has no language model inside")
    return model
