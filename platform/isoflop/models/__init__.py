"""Models: what a reference names, how its weights come to be, and its hook points. Importing it registers the families."""

from isoflop.models import hf, tiny_llava, tiny_lm, tiny_vit

__all__ = ["hf", "tiny_llava", "tiny_lm", "tiny_vit"]
