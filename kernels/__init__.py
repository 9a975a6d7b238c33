"""isoflop.kernels: Triton kernels, each beside its plain torch reference."""

if __name__ != "isoflop.kernels":
    # transformers asks for a package named `kernels` (the Hub's kernel loader) and would import this folder whenever
    # the repository's root is on sys.path. Refusing with an error would break transformers, so a bare import gives an
    # empty package instead: too old for transformers, and nothing can be loaded a second time through it.
    __version__ = "0.0.0"
    __path__ = []
