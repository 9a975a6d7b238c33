"""Compressors of visual tokens between the vision tower and the language model."""

from isoflop.methods.visual_tokens import avgpool, none, quecc, random

__all__ = ["avgpool", "none", "quecc", "random"]
