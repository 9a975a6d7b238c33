"""isoflop.kernels"""

if __name__ != "isoflop.kernels":
    raise ImportError(f"import isoflop.kernels, not {__name__}: a second copy of the package would hold different classes")
