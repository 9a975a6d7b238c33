"""The output head of a Hugging Face model of text, or of pictures and text, by itself: logits of some positions, without those of the others.

With a vocabulary of 128,000 words, logits of all positions of a long text take far more memory than the pass that gives them.
What an architecture does behind its head (caps, scales) is its own: so its own forward pass runs, with the decoder's states
put in the place of the decoder.

Shape suffixes: B rows, T tokens, S scored positions, d width, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


class _Given(nn.Module):
    """Stands where a decoder was, and gives what it gave; all else that is asked of it the decoder answers."""

    def __init__(self, decoder: nn.Module, output: Any) -> None:
        super().__init__()
        object.__setattr__(self, "decoder", decoder)  # not a part of this one
        self.output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def head_logits(module: Any, decoder: nn.Module, output: Any, states_Sd: Tensor) -> Tensor:
    """Logits (S, W) of states (S, d).

    Args:
        module: the language model.
        decoder: inside it; its layers do not run.
        output: what ``decoder`` gave in the pass that the states are from, or an empty output where nothing else of it is read.
    """
    cut = type(output)(**{**output, "last_hidden_state": states_Sd[None]})
    ids_1S = torch.zeros(1, len(states_Sd), dtype=torch.int64, device=states_Sd.device)
    with _in_place_of(module, decoder, _Given(decoder, cut)):
        logits_SW: Tensor = module(input_ids=ids_1S, use_cache=False).logits[0]
    return logits_SW


class _HeadReached(Exception):
    """Ends a pass in front of the head."""


def run_to_head(model: Any, batch: Any) -> None:
    """A supervised pass of a model for what is watched inside it: a language model's ends in front of its head.

    Args:
        model: a ``Model``; where something sits in its hooks, which may count on whole passes, the pass is a whole one.
        batch: for ``Model.supervised``.
    """
    head = getattr(model.module, "get_output_embeddings", lambda: None)()
    with ExitStack() as stack:
        if head is not None and not model.occupied:
            stack.callback(head.register_forward_pre_hook(_end).remove)
        with suppress(_HeadReached):
            model.supervised(batch)


def _end(*_: Any) -> None:
    raise _HeadReached


@contextmanager
def _in_place_of(module: nn.Module, decoder: nn.Module, other: nn.Module) -> Iterator[None]:
    name = next(name for name, found in module.named_modules() if found is decoder)
    parent, _, own = name.rpartition(".")
    place = module.get_submodule(parent)
    place._modules[own] = other
    try:
        yield
    finally:
        place._modules[own] = decoder
