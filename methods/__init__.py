"""isoflop.methods: a folder per family, a file per method. Importing it registers every method found there."""

if __name__ != "isoflop.methods":
    raise ImportError(
        f"import isoflop.methods, not {__name__}: a second copy of the package would hold different classes"
    )

from isoflop.core.registry import import_all

import_all(__name__, __path__)
