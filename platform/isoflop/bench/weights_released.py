"""The side of released code in ``isoflop bench weights``: clones of what authors published, called as their own scripts call it.

Nothing of it is part of isoflop. Modules are loaded from their files, since the clones are no packages and share module names.

Shape suffixes: O outputs (rows), I inputs (columns), N tokens.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import UserError
from isoflop.methods.weights.statistics import ViewStats

RELEASED = ("gptq", "sparsegpt", "hqq", "llm-awq", "AQLM")
"""Folders of clones: github.com/IST-DASLab/gptq and /sparsegpt, mobiusml/hqq, mit-han-lab/llm-awq, Vahe1994/AQLM."""


@dataclass(frozen=True, eq=False)
class Given:
    """A matrix, inputs of it, and what a calibration keeps of them."""

    weight_OI: Tensor
    x_NI: Tensor
    stats: ViewStats

    @property
    def outputs(self) -> float:
        """|WX|², on the scale of the Hessian."""
        return float(((self.weight_OI @ self.stats.hessian_II) * self.weight_OI).sum())


Peer = Callable[[Given], Tensor]
"""The matrix as released code would serve it."""


def find_peers(folder: Path | None) -> Mapping[str, Peer]:
    """Those whose code is there, by name.

    Raises:
        UserError: a clone is not what it was when this was written, or needs what is not installed.
    """
    found: dict[str, Peer] = {}
    with contextlib.suppress(ImportError):
        found["nf4"] = _nf4(importlib.import_module("bitsandbytes.functional"))
    if folder is None:
        return found
    for name, peers in _MAKERS.items():
        if (folder / name).is_dir():
            try:
                found |= peers(folder / name)
            except Exception as error:  # foreign code may fail in any way
                raise broken(folder / name, error) from error
    return found


def broken(clone: Path | str, error: Exception) -> UserError:
    """What is said of released code that fails."""
    said = (str(error).splitlines() or [""])[0]
    return UserError(
        f"--released: {clone} fails with {type(error).__name__}: {said}; allowed: a clone of its authors' repository with what it "
        "needs installed, or no such folder"
    )


def _gptq(clone: Path) -> dict[str, Peer]:
    gptq, quant = _modules(clone, "gptq", "quant")

    def peer(ordered: bool) -> Peer:
        @torch.no_grad()
        def run(on: Given) -> Tensor:
            layer = _layer(on)
            solver = gptq.GPTQ(layer)
            solver.H = on.stats.hessian_II.clone()
            solver.quantizer = quant.Quantizer()
            solver.quantizer.configure(4, perchannel=True, sym=False, mse=False)
            with _without_cuda():
                solver.fasterquant(percdamp=0.01, groupsize=128, actorder=ordered, static_groups=ordered)
            return layer.weight.data

        return run

    return {"gptq": peer(False), "gptq-ordered": peer(True)}


def _sparsegpt(clone: Path) -> dict[str, Peer]:
    (sparsegpt,) = _modules(clone, "sparsegpt")

    def peer(kept: int, of: int) -> Peer:
        @torch.no_grad()
        def run(on: Given) -> Tensor:
            layer = _layer(on)
            solver = sparsegpt.SparseGPT(layer)
            solver.H = on.stats.hessian_II.clone()
            with _without_cuda():
                solver.fasterprune(0.5, prunen=kept, prunem=of, percdamp=0.01, blocksize=128)
            return layer.weight.data

        return run

    return {"sparsegpt": peer(0, 0), "sparsegpt-2:4": peer(2, 4)}


def _hqq(clone: Path) -> dict[str, Peer]:
    with _stand_in("termcolor", colored=lambda text, *_: text):  # for what it says in colours
        (quantize,) = _modules(clone, "hqq.core.quantize")

    def run(on: Given) -> Tensor:
        packed, meta = quantize.Quantizer.quantize(
            on.weight_OI.clone(), nbits=4, channel_wise=True, group_size=64, optimize=True, round_zero=False, axis=1,
            bitpack=True, compute_dtype=torch.float32, device="cpu",
        )  # fmt: skip
        return quantize.Quantizer.dequantize(packed, meta)

    return {"hqq": run}


def _awq(clone: Path) -> dict[str, Peer]:
    """The scale search of ``auto_scale_block`` on a single matrix, whose outputs it then compares, and the released clipping."""
    source = (clone / "awq" / "quantize" / "quantizer.py").read_text()
    start = source.index("def pseudo_quantize_tensor")
    names: dict[str, Any] = {"torch": torch}
    exec(source[start : source.index("@torch.no_grad()", start)], names)  # its module needs CUDA to be imported
    rounded = names["pseudo_quantize_tensor"]
    clipping = (clone / "awq" / "quantize" / "auto_clip.py").read_text()
    start = clipping.index("def auto_clip_layer")
    names |= {"gc": importlib.import_module("gc")}
    exec(clipping[start : clipping.index("@torch.no_grad()", start)], names)
    settings = {"zero_point": True, "q_group_size": 64}

    @torch.no_grad()
    def run(on: Given) -> Tensor:
        layer, outputs = _layer(on), on.x_NI @ on.weight_OI.T
        size_I, best_I, least = on.x_NI.abs().mean(0), torch.ones_like(on.x_NI[0]), torch.inf
        for step in range(20):
            s_I = size_I.pow(step / 20).clamp(min=1e-4)
            s_I = s_I / (s_I.max() * s_I.min()).sqrt()
            layer.weight.data = rounded(on.weight_OI * s_I, n_bit=4, **settings) / s_I
            error = float((outputs - layer(on.x_NI)).pow(2).mean())
            if error < least:
                best_I, least = s_I, error
        scaled_OI = on.weight_OI * best_I
        limit = names["auto_clip_layer"](scaled_OI, on.x_NI / best_I, 4, settings)
        groups = scaled_OI.unflatten(1, (limit.shape[1], -1))
        clipped_OI = groups.clamp(-limit, limit).flatten(1)
        return rounded(clipped_OI, n_bit=4, **settings) / best_I

    return {"awq": run}


def _aqlm(clone: Path) -> dict[str, Peer]:
    (engine,) = _modules(clone, "aq_engine")
    args = Namespace(
        devices=[torch.device("cpu")], out_group_size=1, in_group_size=8, num_codebooks=2, nbits_per_codebook=8,
        codebook_value_nbits=16, codebook_value_num_groups=1, scale_nbits=0, init_max_iter=100,
        init_max_points_per_centroid=None, lr=1e-4, max_epochs=1, steps_per_epoch=100, relative_mse_tolerance=None,
        print_frequency=10**9, beam_size=1,
    )  # fmt: skip

    def run(on: Given) -> Tensor:
        solver = engine.AQEngine(_layer(on))
        solver.XTX = (on.stats.hessian_II / 2).double()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return solver.quantize(args=args, verbose=False)()

    return {"aqlm": run}


def _nf4(functional: ModuleType) -> Peer:
    def run(on: Given) -> Tensor:
        packed, state = functional.quantize_4bit(
            on.weight_OI.clone(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        return functional.dequantize_4bit(packed, state)

    return run


_MAKERS: Mapping[str, Callable[[Path], dict[str, Peer]]] = dict(
    zip(RELEASED, (_gptq, _sparsegpt, _hqq, _awq, _aqlm), strict=True)
)


def _layer(on: Given) -> nn.Linear:
    rows, cols = on.weight_OI.shape
    layer = nn.Linear(cols, rows, bias=False)
    layer.weight.data = on.weight_OI.clone()
    return layer


def _modules(clone: Path, *names: str) -> list[ModuleType]:
    """Modules of a clone, which are not left where others of the same names would be found."""
    before = set(sys.modules)
    sys.path.insert(0, str(clone))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(clone))
        for name in set(sys.modules) - before:
            if str(clone) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


@contextlib.contextmanager
def _stand_in(name: str, **attributes: Any) -> Iterator[None]:
    """A module of that name where none is installed."""
    if importlib.util.find_spec(name) is not None:
        yield
        return
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(attributes)
    try:
        yield
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    """The released solvers wait for CUDA, and print what they lose."""
    waits = torch.cuda.synchronize
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.cuda.synchronize = waits
