"""Methods on the tokenizer's side of a language model: they choose how text becomes probabilities of bytes.

The base class owns what sits in the hook ``byte_view``, which tasks ask that score bytes. No method of this
kind has a ratio: the model is what it was, and what changes is how many tokens it is run on, and what is added up.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from isoflop.core.hook import Hook
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.byte_view import BYTE_VIEW, ByteView, segmentations_of
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.metering import metered

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class TokenizationMethod(Method):
    """Base class of methods that put a view of bytes on a language model.

    ``exact_at_cuts``: behind a prompt that ends where every continuation is cut, bytes get the model's own probabilities.
    """

    family: ClassVar[str] = "tokenization"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (BYTE_VIEW,)
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    exact_at_cuts: ClassVar[bool] = False

    @abstractmethod
    def view(self, prepared: Any) -> ByteView:
        """The view; ``prepared`` is the value of the ``prepare`` stage."""

    def check(self, info: ModelInfo) -> None:
        """Refuse tokenizers under which bytes have no probabilities."""
        super().check(info)
        segmentations_of(info, f"method {self.name}")

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The view."""
        return {BYTE_VIEW: self.view(prepared)}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """What the last texts took per scored byte: forward passes, tokens; and the most covers at one position.

        ``method_params`` and ``method_bytes`` are those of models that are asked besides.
        """
        view = model.occupant(BYTE_VIEW)
        if view is None:
            raise ValueError(f"method {self.name} is not applied")
        return {
            **(view.counts if (read := metered(model, BYTE_VIEW)) is None else read).per_symbol(),
            "method_params": float(sum(member.info.n_params for member in view.members)),
            "method_bytes": float(sum(member.weight_bytes() for member in view.members)),
        }

    @classmethod
    def probe(cls) -> Probe:
        """An untrained model with a tokenizer."""
        from isoflop.methods.tokenization.probe import TokenizationProbe

        return TokenizationProbe()
