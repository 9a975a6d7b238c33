"""isoflop.kernels: Triton kernels, each beside its plain torch reference.

================================  ==============================================================================
``quant``                         ``quant_pack``, ``unpack``: grids per token or per channel, 1 to 8 bits, packed
``column_scores``                 weighted column sums of attention, without the matrix
``decode_segments``               a decoding step over dense, packed and ragged pieces of a cache
``merge``                         ``bipartite_match``, ``merge_tokens``
``dispatch``                      which implementation runs: the twin, or the kernel on CUDA tensors
``registry``, ``cases``           all of them with inputs, bytes, FLOPs and peers, for tests and benchmarks
================================  ==============================================================================

``isoflop bench kernels`` measures them. A kernel stays off by default until such a measurement on a GPU has shown it to be
faster than stock torch; ``dispatch.use(name)`` or the environment variable ``ISOFLOP_KERNELS`` switches it on.
"""

if __name__ != "isoflop.kernels":
    # transformers asks for a package named `kernels` (the Hub's kernel loader) and would import this folder whenever
    # the repository's root is on sys.path. Refusing with an error would break transformers, so a bare import gives an
    # empty package instead: too old for transformers, and nothing can be loaded a second time through it.
    __version__ = "0.0.0"
    __path__ = []
