"""isoflop.methods"""

if __name__ != "isoflop.methods":
    raise ImportError(f"import isoflop.methods, not {__name__}: a second copy of the package would hold different classes")
