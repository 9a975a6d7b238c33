"""isoflop.methods: a folder per family, a file per method. Importing it registers the built-in methods."""

if __name__ != "isoflop.methods":
    raise ImportError(
        f"import isoflop.methods, not {__name__}: a second copy of the package would hold different classes"
    )

from isoflop.methods import visual_tokens

__all__ = ["visual_tokens"]
