"""Token healing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from isoflop.methods.base import METHODS
from isoflop.methods.tokenization.base import TokenizationMethod
from isoflop.models.byte_trees.segmentations import Segmentations
from isoflop.models.byte_trees.starts import healed_start
from isoflop.models.byte_trees.tree import Start
from isoflop.models.hooks.byte_view import ByteText, ByteView, TreeView


@dataclass
class HealedView(TreeView):
    """Takes the last token of the prompt back; the next token must start with its bytes."""

    def start(self, segmentations: Segmentations, text: ByteText) -> Start:
        """Before the last token."""
        return healed_start(segmentations.vocabulary, text.data, text.first)


@METHODS.register("byte-healing")
@dataclass(frozen=True)
class ByteHealing(TokenizationMethod):
    """Token healing: the prompt's last token goes, and the first new token must start with its bytes.

    That repairs a prompt whose end lies inside one token, and nothing else: a word that needs two tokens up to the cut,
    or a cut where the tokenizer would have moved an earlier boundary, stays as it was.
    """

    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "guidance-ai/guidance, baseline in arXiv 2410.09303"

    def view(self, prepared: Any) -> ByteView:
        """Healed prompts."""
        return HealedView()
