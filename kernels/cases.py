"""Inputs that every kernel is tested and measured on: small ones for Triton's interpreter, large ones for hardware.

Small cases of products use float16: the interpreter computes with NumPy, which has no bfloat16. The large ones use bfloat16.

The large ones take their sizes from the serving of a model of 8 billion parameters (32 query heads, 8 key-value heads, head
width 128, 32,768 tokens) and from vision transformers; a CPU gets the same shapes with fewer tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isoflop.kernels.decode_segments import Part, RaggedPart, SegmentPart
from isoflop.kernels.quant import Packed, quant_pack
from isoflop.kernels.softmax import Softmax

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Arguments of an operation.

    Attributes:
        name: unique among the cases of its kernel.
        make: builds the arguments on a device.
        flops: of matrix products, one multiply-add counting 2.
    """

    name: str
    make: Callable[[Source], Arguments]
    flops: float = 0.0


class Source:
    """Seeded random tensors on a device; drawn on the CPU when ``portable``, so that every device gets the same."""

    def __init__(self, device: torch.device, seed: int = 0, portable: bool = True) -> None:
        self.device = device
        self._generator = torch.Generator("cpu" if portable else device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal values."""
        made = torch.randn(*shape, generator=self._generator, device=self._generator.device)
        return made.to(self.device, dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Values in [0, 1)."""
        return torch.rand(*shape, generator=self._generator, device=self._generator.device).to(self.device)

    def order(self, batch: int, n: int) -> Tensor:
        """A random order of ``n`` things for each row, (batch, n)."""
        return self.uniform(batch, n).argsort(dim=1)


# quant_pack and unpack


def quant_small() -> tuple[Case, ...]:
    """All widths, both axes, short and long and ragged groups, odd lengths, constant rows, one token, other layouts."""
    made = [
        _quant(f"{bits} bits, axis {axis}", (2, 2, 19, 13), bits, axis, None)
        for bits in range(1, 9)
        for axis in (-1, -2)
    ]
    made += [_quant(f"{bits} bits, groups of 8", (3, 5, 20), bits, -1, 8) for bits in (2, 3, 4)]
    return (
        *made,
        _quant("ragged groups of tokens", (1, 2, 23, 10), 3, -2, 5),
        _quant("groups of tokens beyond a tile", (1, 1, 530, 6), 2, -2, 300),
        _quant("one token", (2, 3, 1, 16), 4, -2, None),
        _quant("one dimension", (13,), 2, -1, None),
        _quant("half precision", (2, 1, 9, 24), 4, -1, 12, dtype=torch.float16),
        _quant("bfloat16", (1, 2, 9, 24), 2, -2, 4, dtype=torch.bfloat16),
        Case("constant rows", lambda s: _quant_args(s.normal(4, 1).expand(4, 11), 4, -1, None)),
        Case("beyond float16", lambda s: _quant_args(s.normal(3, 4, 16) * 1e6, 2, -1, None)),
        Case("ties between codes", lambda s: _quant_args((s.normal(3, 4, 16) * 4).round() / 2, 2, -2, None)),
        Case("transposed memory", lambda s: _quant_args(s.normal(2, 13, 9).transpose(1, 2), 3, -2, None)),
    )


def quant_large(batch: int, tokens: int) -> tuple[Case, ...]:
    """Keys by channel and values by token, as caches hold them."""
    shape = (batch, 8, tokens, 128)
    return (
        _quant("K, 2 bits, by channel", shape, 2, -2, None, dtype=torch.bfloat16),
        _quant("K, 4 bits, 64 tokens", shape, 4, -2, 64, dtype=torch.bfloat16),
        _quant("V, 2 bits, by token", shape, 2, -1, None, dtype=torch.bfloat16),
        _quant("V, 3 bits, by token", shape, 3, -1, None, dtype=torch.bfloat16),
        _quant("V, 4 bits, 32 channels", shape, 4, -1, 32, dtype=torch.bfloat16),
    )


def unpacked(cases: tuple[Case, ...], *dtypes: torch.dtype) -> tuple[Case, ...]:
    """The same tensors, to be unpacked; types taken in turn."""

    def packed(case: Case, dtype: torch.dtype) -> Case:
        return Case(case.name, lambda s: {"packed": quant_pack.twin(**case.make(s)), "dtype": dtype})

    return tuple(packed(case, dtypes[i % len(dtypes)]) for i, case in enumerate(cases))


def _quant(
    name: str, shape: tuple[int, ...], bits: int, axis: int, group: int | None, dtype: torch.dtype = torch.float32
) -> Case:
    return Case(name, lambda s: _quant_args(s.normal(*shape, dtype=dtype), bits, axis, group))


def _quant_args(x: Tensor, bits: int, axis: int, group: int | None) -> Arguments:
    return {"x": x, "bits": bits, "axis": axis, "group": group}


# column_scores


def scores_small() -> tuple[Case, ...]:
    """Odd sizes, grouped heads, padding on the left, several sets, a few probes out of order, one token."""
    return (
        _scores("grouped heads, padding", 2, 4, 2, 37, 37, 16, sets=1, padded=5),
        _scores("odd sizes, three sets", 1, 3, 1, 71, 71, 20, sets=3),
        _scores("probes out of order", 2, 2, 2, 9, 130, 32, sets=2, padded=40),
        _scores("a key block without weight", 1, 2, 1, 150, 150, 8, sets=1, silent=100),
        _scores("one token", 1, 1, 1, 1, 1, 8, sets=1),
        _scores("half precision", 1, 4, 2, 40, 40, 16, sets=1, dtype=torch.float16),
        _scores("cap and sinks, padding", 2, 4, 2, 37, 37, 16, sets=2, padded=5, cap=1.5, sinks=True),
    )


def scores_large(batch: int, tokens: int, probes_of: int) -> tuple[Case, ...]:
    """All queries (H2O), probe queries (ZipCache), and two sets at once over a window and all queries (EMS)."""
    probes = probes_of // 10
    kind = torch.bfloat16
    return (
        _scores(f"all queries, {tokens:,}", batch, 32, 8, tokens, tokens, 128, sets=1, dtype=kind),
        _scores(f"10 % probes, {probes_of:,}", batch, 32, 8, probes, probes_of, 128, sets=1, in_order=True, dtype=kind),
        _scores(f"two sets, {tokens:,}", batch, 32, 8, tokens, tokens, 128, sets=2, dtype=kind),
    )


def _scores(
    name: str,
    batch: int,
    heads: int,
    groups: int,
    queries: int,
    keys: int,
    width: int,
    sets: int,
    padded: int = 0,
    silent: int = 0,
    in_order: bool = False,
    dtype: torch.dtype = torch.float32,
    cap: float | None = None,
    sinks: bool = False,
) -> Case:
    def make(s: Source) -> Arguments:
        places = torch.arange(keys, device=s.device)[None]
        chosen = places if queries == keys else s.order(1, keys)[:, :queries]
        weight = s.uniform(batch, sets, queries)
        weight[:, :, :silent] = 0.0
        return {
            "q_BHTD": s.normal(batch, heads, queries, width, dtype=dtype),
            "k_BGSD": s.normal(batch, groups, keys, width, dtype=dtype),
            "softmax": Softmax(width**-0.5, cap, s.normal(heads) if sinks else None),
            "weight_BWT": weight,
            "q_positions_BT": chosen.sort().values if in_order else chosen,
            "k_positions_BS": places,
            "valid_BS": (places >= padded).expand(batch, -1) if padded else None,
        }

    pairs = queries * (keys + 1) / 2
    return Case(name, make, flops=2 * 2.0 * batch * heads * pairs * width)  # two passes over queries and keys


# decode_segments


def decode_small() -> tuple[Case, ...]:
    """Dense, packed in every layout, ragged, biases, empty entries, empty segments, channel scales, several queries, one token."""

    def mixed(s: Source) -> list[SegmentPart]:
        return [
            _dense_part(s, 2, 2, 70, 20),
            _packed_part(s, 2, 2, 37, 20, 2, None, 4, None, v_scale=True),
            _packed_part(s, 2, 2, 75, 20, 3, 32, 3, 8, biased=True, k_scale=True),
            _dense_part(s, 2, 2, 0, 20),
        ]

    def empty(s: Source) -> list[SegmentPart]:
        part = _dense_part(s, 1, 1, 5, 16)
        return [SegmentPart(part.k, part.v, torch.full((1, 1, 5), -torch.inf, device=s.device))]

    def bits(k: int, v: int) -> Case:
        parts = functools.partial(_packed_parts, tokens=33, k_bits=k, v_bits=v)
        return _decode(f"{k} bit keys, {v} bit values", 1, 4, 2, 1, 16, parts)

    def joined(s: Source) -> list[Part]:
        return [_ragged_part(s, [0, 1, 90, 7], 2, 20), *mixed(s)]

    made = [bits(k, v) for k, v in ((1, 8), (2, 4), (3, 3), (4, 2), (5, 6), (8, 7))]
    return (
        *made,
        _decode("all kinds joined", 2, 6, 2, 2, 20, mixed),
        _decode("values by channel", 1, 2, 2, 1, 16, lambda s: [_packed_part(s, 1, 2, 21, 16, 4, 5, 4, 7, v_axis=-2)]),
        _decode("keys by token", 1, 4, 2, 1, 16, lambda s: [_packed_part(s, 1, 2, 21, 16, 3, None, 4, None, k_axis=-1, k_scale=True)]),
        _decode("one token", 1, 2, 1, 1, 8, lambda s: [_dense_part(s, 1, 1, 1, 8)]),
        _decode("every entry empty", 1, 2, 1, 1, 16, empty),
        _decode("ragged heads", 2, 4, 2, 1, 16, lambda s: [_ragged_part(s, [130, 0, 64, 65], 2, 16)]),
        _decode("one long head among short ones", 1, 4, 4, 1, 16, lambda s: [_ragged_part(s, [3, 700, 2, 5], 4, 16)]),
        _decode("ragged heads with all kinds, cap and sinks", 2, 6, 2, 2, 20, joined, cap=1.5, sinks=True),
        _decode("half precision, ragged", 1, 4, 2, 1, 16, lambda s: [_ragged_part(s, [40, 9], 2, 16, torch.float16)], torch.float16),
        _decode("cap and sinks", 2, 6, 2, 2, 20, mixed, cap=1.5, sinks=True),
        _decode("every entry empty but the sink", 1, 2, 1, 1, 16, empty, sinks=True),
        _decode("half precision", 1, 4, 2, 1, 16, lambda s: [_dense_part(s, 1, 2, 40, 16, torch.float16)], torch.float16),
        _decode("half precision, packed", 1, 4, 2, 1, 16, lambda s: [_packed_part(s, 1, 2, 40, 16, 4, None, 4, None)], torch.float16),
    )  # fmt: skip


def decode_large(batch: int, tokens: int) -> tuple[Case, ...]:
    """One step over a dense cache, over packed ones, over ZipCache's mixture, and over heads that keep 0 to 1/2, 1/4 on average."""
    few = tokens // 5
    kind = torch.bfloat16

    heads = batch * 8
    kept = [tokens * (heads - i) // (2 * heads) for i in range(heads)]

    def case(name: str, parts: Callable[[Source], Sequence[Part]], read: int = batch * 8 * tokens) -> Case:
        return _decode(name, batch, 32, 8, 1, 128, parts, kind, flops=4.0 * 4 * read * 128)

    return (
        case("dense", lambda s: [_dense_part(s, batch, 8, tokens, 128, kind)]),
        case("4 bits", lambda s: [_packed_part(s, batch, 8, tokens, 128, 4, 64, 4, None, dtype=kind)]),
        case("2 bits", lambda s: [_packed_part(s, batch, 8, tokens, 128, 2, None, 2, None, dtype=kind)]),
        case(
            "1/5 dense, 2 bits",
            lambda s: [
                _dense_part(s, batch, 8, few, 128, kind),
                _packed_part(s, batch, 8, tokens - few, 128, 2, None, 2, None, v_scale=True, dtype=kind),
            ],
        ),
        case("ragged", lambda s: [_ragged_part(s, kept, 8, 128, kind)], sum(kept)),
    )


def _decode(
    name: str,
    batch: int,
    heads: int,
    groups: int,
    queries: int,
    width: int,
    parts: Callable[[Source], Sequence[Part]],
    dtype: torch.dtype = torch.float32,
    flops: float = 0.0,
    cap: float | None = None,
    sinks: bool = False,
) -> Case:
    def make(s: Source) -> Arguments:
        q_BHTD = s.normal(batch, heads, queries, width, dtype=dtype)
        return {
            "q_BHTD": q_BHTD,
            "segments": parts(s),
            "softmax": Softmax(width**-0.5, cap, s.normal(heads) if sinks else None),
        }

    return Case(name, make, flops)


def _dense_part(
    s: Source, batch: int, groups: int, tokens: int, width: int, dtype: torch.dtype = torch.float32
) -> SegmentPart:
    shape = (batch, groups, tokens, width)
    return SegmentPart(s.normal(*shape, dtype=dtype), s.normal(*shape, dtype=dtype))


def _ragged_part(
    s: Source, lengths: list[int], groups: int, width: int, dtype: torch.dtype = torch.float32
) -> RaggedPart:
    ends_O = torch.tensor(lengths, device=s.device).cumsum(0).int()
    k_RD, v_RD = (s.normal(sum(lengths), width, dtype=dtype) for _ in range(2))
    return RaggedPart(k_RD, v_RD, ends_O, groups, max(lengths))


def _packed_parts(s: Source, tokens: int, k_bits: int, v_bits: int) -> list[SegmentPart]:
    return [_packed_part(s, 1, 2, tokens, 16, k_bits, None, v_bits, None)]


def _packed_part(
    s: Source,
    batch: int,
    groups: int,
    tokens: int,
    width: int,
    k_bits: int,
    k_group: int | None,
    v_bits: int,
    v_group: int | None,
    k_axis: int = -2,
    v_axis: int = -1,
    biased: bool = False,
    k_scale: bool = False,
    v_scale: bool = False,
    dtype: torch.dtype = torch.float32,
) -> SegmentPart:
    def pack(bits: int, axis: int, group: int | None) -> Packed:
        return quant_pack.twin(s.normal(batch, groups, tokens, width, dtype=dtype), bits, axis, group)

    return SegmentPart(
        pack(k_bits, k_axis, k_group),
        pack(v_bits, v_axis, v_group),
        s.normal(batch, groups, tokens) * 3 if biased else None,
        s.uniform(batch, groups, width) + 0.5 if k_scale else None,
        s.uniform(batch, groups, width) + 0.5 if v_scale else None,
    )


# bipartite_match and merge_tokens


def match_small() -> tuple[Case, ...]:
    """Odd sizes, several blocks, padding, a row without any destination, ties, zero vectors, one token."""

    def masked(s: Source) -> Arguments:
        valid_BM = s.uniform(3, 11) > 0.4
        valid_BM[0] = False
        return {"a_BND": s.normal(3, 5, 16), "b_BMD": s.normal(3, 11, 16), "valid_BM": valid_BM}

    def ties(s: Source) -> Arguments:
        a_BND, b_BMD = s.normal(1, 4, 12), s.normal(1, 80, 12)
        b_BMD[:, 70:74], b_BMD[:, 2:6] = a_BND, a_BND
        a_BND[:, 3] = 0.0
        return {"a_BND": a_BND, "b_BMD": b_BMD, "valid_BM": None}

    return (
        _match("odd sizes", 1, 35, 70, 100),
        _match("one token", 2, 1, 1, 8),
        _match("half precision", 1, 20, 20, 16, torch.float16),
        Case("padding", masked),
        Case("ties and zeros", ties),
    )


def match_large(batch: int, frames: int) -> tuple[Case, ...]:
    """Halves of the tokens of an image of a large vision transformer, and of a clip."""
    return (
        _match("image, 577", 8 * batch, 289, 288, 64, torch.bfloat16),
        _match(f"clip, {frames * 256:,}", batch, frames * 128, frames * 128, 64, torch.bfloat16),
    )


def _match(
    name: str, batch: int, sources: int, destinations: int, width: int, dtype: torch.dtype = torch.float32
) -> Case:
    def make(s: Source) -> Arguments:
        a_BND, b_BMD = (s.normal(batch, n, width, dtype=dtype) for n in (sources, destinations))
        return {"a_BND": a_BND, "b_BMD": b_BMD, "valid_BM": None}

    return Case(name, make, flops=2.0 * batch * sources * destinations * width)


def merge_small() -> tuple[Case, ...]:
    """Dropped tokens, many sources of one destination, sums, nothing to merge, wide rows, half precision."""
    return (
        _merge("some dropped", 2, 12, 7, 4, 10),
        _merge("all into one", 2, 9, 1, 8, 5),
        _merge("sum", 1, 30, 10, 20, 33, mode="sum"),
        _merge("nothing to merge", 2, 4, 4, 0, 5),
        _merge("wide rows", 1, 6, 4, 2, 1100),
        _merge("bfloat16", 1, 12, 8, 4, 16, dtype=torch.bfloat16),
    )


def merge_large(batch: int, frames: int) -> tuple[Case, ...]:
    """Sixteen tokens of an image, and half of the tokens of a clip."""
    tokens = frames * 256
    return (
        _merge("image, 577 to 561", 8 * batch, 577, 561, 16, 1024, dtype=torch.bfloat16),
        _merge(f"clip, {tokens:,} to {tokens // 2:,}", batch, tokens, tokens // 2, tokens // 2, 1024, dtype=torch.bfloat16),
    )  # fmt: skip


def _merge(
    name: str,
    batch: int,
    tokens: int,
    kept: int,
    sources: int,
    channels: int,
    mode: str = "mean",
    dtype: torch.dtype = torch.float32,
) -> Case:
    def make(s: Source) -> Arguments:
        order_BN = s.order(batch, tokens)
        keep_BK = order_BN[:, :kept]
        chosen = (s.uniform(batch, sources) * kept).long()
        return {
            "x_BNC": s.normal(batch, tokens, channels, dtype=dtype),
            "size_BN1": (s.uniform(batch, tokens, 1) * 5).floor() + 1,
            "keep_BK": keep_BK,
            "src_BR": order_BN[:, kept : kept + sources],
            "dst_BR": keep_BK.gather(1, chosen),
            "mode": mode,
        }

    return Case(name, make)
