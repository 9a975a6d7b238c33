"""Slicing of a model's width: between two norms the residual stream is rotated to principal components and cut (arXiv 2401.15024).

A half is what lies behind a norm: attention or MLP. Its readers take the cut stream of the half, its writer adds to that of the next
one, and between the two the stream itself passes through a rotation, the shortcut (sections 3.3 and 3.4 of the paper).

The narrow model runs inside the wide one: the cut stream, and the matrices that read or write it, are filled with zeros, which
change nothing. Norms become root mean squares over the whole width; their weights and biases are folded into the readers, and
where they subtract a mean, the stream is kept free of it (section 3.2).

Shape suffixes: O outputs (rows), I inputs (columns), d width of the model, k what is kept of it; the last dimension of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.methods.weights.artefact import Artefact, Serving
from isoflop.methods.weights.blockwise import BlockPasses
from isoflop.methods.weights.folding import norms_feeding
from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model
from isoflop.models.hooks.matrices import BLOCK

CLOSE, CLOSE_IN_HALF = 1e-3, 5e-2
"""Largest difference of logits, relative to the largest, between the model and itself with its norms folded."""


@dataclass(frozen=True, eq=False)
class SlicedPayload(Payload):
    """What a matrix keeps of its rows or columns, in float16; served with zeros in the others' place.

    Attributes:
        kept: (rows, columns) that are left.
        shortcut_kk: of a writer: the stream's way to the next half, from its cut width to that one's.
        entrance_kd: of the first reader: the stream's way into the cut width. Both float16, None elsewhere.
    """

    kind: ClassVar[str] = "sliced"
    kept: Tensor
    shortcut_kk: Tensor | None = None
    entrance_kd: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The matrix, and the rotation that is stored with it."""
        found = {"kept": self.kept, "shortcut": self.shortcut_kk, "entrance": self.entrance_kd}
        return {name: t for name, t in found.items() if t is not None}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SlicedPayload:
        """The inverse of ``settings`` and ``tensors``."""
        rows, cols = settings["shape"]
        return cls((rows, cols), tensors["kept"], tensors.get("shortcut"), tensors.get("entrance"))

    def decode(self) -> Tensor:
        """Zeros around what is kept, in float32."""
        weight_OI = self.kept.new_zeros(self.shape, dtype=torch.float32)
        weight_OI[: self.kept.shape[0], : self.kept.shape[1]] = self.kept
        return weight_OI


@dataclass(frozen=True, eq=False)
class Half:
    """What lies behind one norm.

    Attributes:
        norm: its name.
        readers: matrices that are given what the norm makes of the stream.
        writer: the matrix whose outputs are added to the stream.
    """

    norm: str
    readers: tuple[LinearView, ...]
    writer: LinearView


def halves_of(model: Model, batch: Any) -> list[Half]:
    """The halves of a model, in the order of its modules.

    Raises:
        Infeasible: it is not made of these.
    """
    names = {id(module): name for name, module in model.module.named_modules()}
    views = linear_views(model)
    fed = {view: names[id(norm)] for view, norm in norms_feeding(model, views, batch).items()}
    norms: list[str] = []
    readers: list[list[LinearView]] = []
    writers: list[list[LinearView]] = []
    for view in views:
        norm = fed.get(view.name)
        if norm is not None and (not norms or norms[-1] != norm):
            norms.append(norm)
            readers.append([])
            writers.append([])
        if not norms:
            raise _other(model, f"{view.name} is not behind a norm")
        (writers if norm is None else readers)[-1].append(view)
    width = readers[0][0].cols
    for norm, reading, writing in zip(norms, readers, writers, strict=True):
        if len(writing) != 1 or writing[0].rows != width or any(view.cols != width for view in reading):
            raise _other(model, f"{len(writing)} matrices write what lies behind {norm}")
    return [Half(norm, tuple(read), write[0]) for norm, read, write in zip(norms, readers, writers, strict=True)]


def _other(model: Model, why: str) -> Infeasible:
    return Infeasible(
        f"method slicegpt: model {model.info.ref} cannot be sliced: {why}; allowed: models whose attentions and MLPs each read one "
        "norm's outputs and add those of one matrix to the residual stream"
    )


def centred(x: Tensor, norm: nn.Module) -> Tensor:
    """Without its mean over the width where the norm subtracts it."""
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def principal_axes(gram_dd: Tensor, kept: int) -> Tensor:
    """Orthonormal columns (d, k): the leading eigenvectors of the stream's Gram matrix, in float64."""
    return torch.linalg.eigh(gram_dd.double()).eigenvectors[:, -kept:].flip(1)


# Finding the frames


@torch.no_grad()
def find_frames(model: Model, halves: Sequence[Half], batches: Sequence[Any], kept: int) -> list[Tensor]:
    """The frame (d, k) of each half: principal components of its stream where the halves before are sliced already.

    Each block runs once for each of its halves; the stream behind a half is seen before it is cut (as in the released code).

    Raises:
        Infeasible: the model's blocks cannot be run one by one.
    """
    frames: list[Tensor] = []
    blocks: dict[int, list[Half]] = {}
    for half in halves:
        blocks.setdefault(half.writer.layer, []).append(half)
    passes = BlockPasses(model, linear_views(model), batches)
    try:
        for number, run in passes.blocks():
            if not frames:
                with _Watch(model, blocks[number][:1], []) as watch:
                    run(False)
                frames.append(principal_axes(watch.entering_dd, kept))
            for count in range(1, len(blocks[number]) + 1):
                if len(frames) == len(halves):
                    return frames
                own = blocks[number][:count]
                with _Watch(model, own, frames[-count:]) as watch:
                    run(count == len(blocks[number]))
                frames.append(principal_axes(watch.leaving_dd, kept))
    except ValueError as error:
        raise _other(model, str(error)) from error
    return frames


class _Watch:
    """A block whose first halves run sliced, in the model's own coordinates; sums up the streams before and behind them.

    Args:
        halves: of one block, from its first on; the last of them is watched.
        frames: of these halves; none to watch what enters the first one.

    Attributes:
        entering_dd, leaving_dd: Gram matrices of what enters the first half, and of what comes out of the last.
    """

    def __init__(self, model: Model, halves: Sequence[Half], frames: Sequence[Tensor]) -> None:
        modules = dict(model.module.named_modules())
        self._halves, self._frames = halves, frames
        self._norms = [modules[half.norm] for half in halves]
        self._block = modules[_block_of(halves[0].writer)]
        like = halves[0].writer.weight()
        width = halves[0].writer.rows
        self.entering_dd, self.leaving_dd = (like.new_zeros(width, width, dtype=torch.float64) for _ in range(2))
        self._stream: dict[int, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Watch:
        handles = [self._block.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for number, (half, norm) in enumerate(zip(self._halves, self._norms, strict=True)):
            handles.append(norm.register_forward_hook(self._remember(number)))
            handles.append(half.writer.module.register_forward_hook(self._leave(number)))
        for handle in handles:
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def cut(x: Tensor) -> Tensor:
            x = centred(x, self._norms[0])
            self.entering_dd += _gram(x)
            return self._cut(x, 0)

        return changed_states(args, kwargs, cut)

    def _cut(self, x: Tensor, number: int) -> Tensor:
        if number >= len(self._frames):
            return x
        frame_dk = self._frames[number].to(x)
        return x @ frame_dk @ frame_dk.T

    def _remember(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._stream[number] = args[0]

        return hook

    def _leave(self, number: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            before = self._stream[number]
            behind = centred(before + output, self._norms[number])
            if number == len(self._halves) - 1:
                self.leaving_dd += _gram(behind)
                return output
            return self._cut(behind, number + 1) - before

        return hook


def _gram(x: Tensor) -> Tensor:
    flat = x.flatten(0, -2).float()
    return (flat.T @ flat).double()


def _block_of(view: LinearView) -> str:
    """The name of the block that a matrix lies in."""
    place = BLOCK.search(f"{view.name}.")
    assert place is not None
    return view.name[: place.end() - 1]


def changed_states(args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments of a block with other hidden states."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


# The sliced matrices


@torch.no_grad()
def slice_matrices(
    model: Model, halves: Sequence[Half], frames: Sequence[Tensor], dtype: torch.dtype = torch.float16
) -> Artefact:
    """Payloads of all matrices, and the biases that go with them; the last half writes the whole width.

    Args:
        frames: orthonormal columns (d, k) for each half.
        dtype: of what is stored.

    Raises:
        Infeasible: a norm has a bias, and a reader has none to take it up.
    """
    modules = dict(model.module.named_modules())
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    payloads: dict[str, Payload] = {}
    vectors: dict[str, Tensor] = {}
    for number, half in enumerate(halves):
        norm, writer = modules[half.norm], half.writer
        frame_dk = frames[number].to(writer.holder.device)
        free_dd = centred(torch.eye(len(frame_dk), dtype=torch.float64, device=frame_dk.device), norm)
        gain_d, shift_d = norm.weight.double(), getattr(norm, "bias", None)
        for place, view in enumerate(half.readers):
            weight_Od = view.weight().double()
            entrance_kd = frame_dk.T @ free_dd if number == place == 0 else None
            kept = (weight_Od * gain_d) @ frame_dk
            payloads[view.name] = SlicedPayload(
                (view.rows, view.cols), kept.to(dtype), None, _stored(entrance_kd, dtype)
            )
            if shift_d is not None and bool(shift_d.any()):
                if view.module.bias is None:
                    raise _other(model, f"the bias of {half.norm} has nowhere to go in {view.name}")
                bias_O = view.module.bias
                vectors[names[id(bias_O)]] = (bias_O.double() + weight_Od @ shift_d.double()).to(bias_O.dtype)
        last = number == len(halves) - 1
        next_dk = (
            torch.eye(len(frame_dk), dtype=torch.float64).to(frame_dk) if last else frames[number + 1].to(frame_dk)
        )
        way_kd = next_dk.T if last else next_dk.T @ free_dd
        payloads[writer.name] = SlicedPayload(
            (writer.rows, writer.cols), (way_kd @ writer.weight().double()).to(dtype), (frame_dk.T @ next_dk).to(dtype)
        )
        bias_d = getattr(writer.module, "bias", None)
        if bias_d is not None and not last:
            moved_d = torch.zeros_like(bias_d)
            moved_d[: len(way_kd)] = (way_kd @ bias_d.double()).to(bias_d.dtype)
            vectors[names[id(bias_d)]] = moved_d
    return Artefact(payloads, vectors)


def _stored(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


# Serving them


class SlicedServing(Serving):
    """Sliced matrices, with norms and streams as they need them.

    Args:
        halves: of the model.
    """

    def __init__(self, model: Model, halves: Sequence[Half], artefact: Artefact) -> None:
        super().__init__(linear_views(model), lambda view: artefact[view.name], artefact.vectors)
        self._halves, self._artefact = halves, artefact

    @contextmanager
    def at_work(self, model: Model) -> Iterator[None]:
        """The narrow model inside the wide one."""
        with super().at_work(model), ExitStack() as stack:
            for handle in self._installed(model):
                stack.callback(handle.remove)
            yield

    def _installed(self, model: Model) -> Iterator[Any]:
        modules = dict(model.module.named_modules())
        first = self._payload(self._halves[0].readers[0]).entrance_kd
        assert first is not None
        block = modules[_block_of(self._halves[0].writer)]
        yield block.register_forward_pre_hook(_entrance(first), with_kwargs=True)
        for half in self._halves:
            shortcut_kk = self._payload(half.writer).shortcut_kk
            assert shortcut_kk is not None
            way = _Shortcut(modules[half.norm], shortcut_kk)
            yield modules[half.norm].register_forward_hook(way.normed)
            yield half.writer.module.register_forward_hook(way.written)

    def _payload(self, view: LinearView) -> SlicedPayload:
        found = self._artefact[view.name]
        assert isinstance(found, SlicedPayload)
        return found


def _entrance(way_kd: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return changed_states(args, kwargs, lambda x: filled(x @ way_kd.to(x).T, x.shape[-1]))

    return hook


def filled(x: Tensor, width: int) -> Tensor:
    """With zeros behind it, up to a width."""
    return nn.functional.pad(x, (0, width - x.shape[-1]))


class _Shortcut:
    """The stream from one norm to what is added to it behind the half."""

    def __init__(self, norm: nn.Module, way_kk: Tensor) -> None:
        self._epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
        self._way_kk = way_kk
        self._stream: Tensor | None = None

    def normed(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The stream over its root mean square; what is cut counts as zeros (the mean is over the whole width)."""
        self._stream = args[0]
        wide = self._stream.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._epsilon)).to(output.dtype)

    def written(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """What makes of stream + output the rotated stream + output."""
        stream = self._stream
        assert stream is not None
        way_kk = self._way_kk.to(stream)
        return output + filled(stream[..., : len(way_kk)] @ way_kk, stream.shape[-1]) - stream


@torch.no_grad()
def check_sliceable(model: Model, halves: Sequence[Half], batch: Any) -> None:
    """Try the halves on a batch, with norms folded and nothing cut.

    Raises:
        Infeasible: the outputs move: something else reads or writes the stream, or norms are of another kind.
    """
    before, _ = model.supervised(batch)
    width = halves[0].writer.rows
    whole = slice_matrices(model, halves, [torch.eye(width, dtype=torch.float64)] * len(halves), torch.float32)
    with SlicedServing(model, halves, whole).at_work(model):
        after, _ = model.supervised(batch)
    close = CLOSE if before.dtype == torch.float32 else CLOSE_IN_HALF
    if float((after - before).abs().max()) > close * float(before.abs().max()):
        raise _other(model, "with its norms folded into the matrices it gives other outputs")
