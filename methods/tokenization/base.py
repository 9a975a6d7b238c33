"""Methods on the tokenizer's side of a language model: they choose how text becomes probabilities of bytes.

The base class owns the hook point, the slot ``LmModel.byte_view``, which tasks ask that score bytes. No method of this
kind has a ratio: the model is what it was, and what changes is how many tokens it is run on, and what is added up.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from isoflop.core.errors import Infeasible
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.byte_view import ByteView, segmentations_of
from isoflop.models.lm import LmModel

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class TokenizationMethod(Method):
    """Base class of methods that put a view of bytes on a language model.

    ``exact_at_cuts``: behind a prompt that ends where every continuation is cut, bytes get the model's own probabilities.
    """

    family: ClassVar[str] = "tokenization"
    slot: ClassVar[str] = "byte-view"
    asked_by_task: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    order: ClassVar[int] = 40
    exact_at_cuts: ClassVar[bool] = False

    @abstractmethod
    def view(self, prepared: Any) -> ByteView:
        """The view; ``prepared`` is the value of the ``prepare`` stage."""

    def check(self, info: ModelInfo) -> None:
        """Refuse tokenizers under which bytes have no probabilities."""
        super().check(info)
        segmentations_of(info, f"method {self.name}")

    @contextmanager
    def apply(self, model: Model, prepared: Any) -> Iterator[None]:
        """Take the slot."""
        self.check(model.info)
        if not isinstance(model, LmModel):
            raise Infeasible(f"method {self.name}: model {model.info.ref} is no language model")
        if model.byte_view is not None:
            raise Infeasible(f"method {self.name}: another method gives the model's bytes their probabilities already")
        model.byte_view = self.view(prepared)
        try:
            yield
        finally:
            del model.byte_view

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """What the last texts took per scored byte: forward passes, tokens; and the most covers at one position.

        ``method_params`` and ``method_bytes`` are those of models that are asked besides.
        """
        view = model.byte_view if isinstance(model, LmModel) else None
        if view is None:
            raise ValueError(f"method {self.name} is not applied")
        return {
            **view.counts.per_symbol(),
            "method_params": float(sum(member.info.n_params for member in view.members)),
            "method_bytes": float(sum(member.weight_bytes() for member in view.members)),
        }

    @classmethod
    def probe(cls) -> Probe:
        """An untrained model with a tokenizer."""
        from isoflop.methods.tokenization.probe import TokenizationProbe

        return TokenizationProbe()
