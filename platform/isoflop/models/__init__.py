"""Models: what a reference names, how its weights come to be, and where methods act. Importing it registers the families."""

from isoflop.models.checkpoints import hf
from isoflop.models.tiny import bert, llava, lm, vit

__all__ = ["bert", "hf", "llava", "lm", "vit"]
