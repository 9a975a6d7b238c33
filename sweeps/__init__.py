"""isoflop.sweeps"""

if __name__ != "isoflop.sweeps":
    raise ImportError(
        f"import isoflop.sweeps, not {__name__}: a second copy of the package would hold different classes"
    )
