"""Models: what a reference names, how its weights come to be, and its hook points. Importing it registers the families."""

from isoflop.models import tiny_llava

__all__ = ["tiny_llava"]
