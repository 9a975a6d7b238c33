"""How selected entries of a tensor travel: index codings, value types, and the bytes of one tensor's message.

Shape suffixes: K selected entries, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.kernels.quant import pack_bits, unpack_bits

VALUE_TYPES = {"fp32": torch.float32, "fp16": torch.float16}
CODINGS = ("int32", "int64", "bitmap", "delta-varint")
_VARINT_BYTES = 5  # 7 bits each: enough for any distance below 2^35
_COUNT_BYTES = 4


@dataclass(frozen=True)
class Entries:
    """Selected entries of a flattened tensor.

    Attributes:
        indices_K: where, ascending, int64.
        values_K: what, in float32.
    """

    indices_K: Tensor
    values_K: Tensor


@dataclass(frozen=True)
class EntryCoding:
    """The bytes of the entries of one tensor: indices, then values, behind a count of 4 bytes where it is not known.

    Args:
        values: type of the values; those beyond float16's range are cut to it.
        indices: ``int32`` or ``int64``; ``bitmap``, a bit per element of the tensor; ``delta-varint``, distances between
            neighbours in groups of 7 bits.
        counted: the receivers know how many entries come.
    """

    values: str = "fp32"
    indices: str = "int32"
    counted: bool = True

    @property
    def fixed(self) -> bool:
        """Whether equal counts give equally long messages."""
        return self.counted and self.indices != "delta-varint"

    def encode(self, entries: Entries, numel: int) -> Tensor:
        """The message, uint8."""
        count_B = () if self.counted else (_bytes(torch.tensor([len(entries.indices_K)], dtype=torch.int32)),)
        dtype = VALUE_TYPES[self.values]
        limit = torch.finfo(dtype).max
        values_B = _bytes(entries.values_K.clamp(-limit, limit).to(dtype))
        return torch.cat((*count_B, _encode_indices(self.indices, entries.indices_K, numel), values_B))

    def decode(self, message_B: Tensor, numel: int, count: int) -> tuple[Entries, int]:
        """The entries at the front of a message, and the bytes they take.

        Args:
            count: of entries, where it is known.
        """
        start = 0
        if not self.counted:
            count, start = int(_typed(message_B[:_COUNT_BYTES], torch.int32)), _COUNT_BYTES
        indices_K, used = _decode_indices(self.indices, message_B[start:], numel, count)
        start += used
        dtype = VALUE_TYPES[self.values]
        stop = start + count * dtype.itemsize
        return Entries(indices_K, _typed(message_B[start:stop], dtype).float()), stop


def _encode_indices(coding: str, indices_K: Tensor, numel: int) -> Tensor:
    if coding == "bitmap":
        flags = torch.zeros(numel, dtype=torch.uint8)
        flags[indices_K] = 1
        return pack_bits(flags, 1)
    if coding == "delta-varint":
        return encode_varint(torch.diff(indices_K, prepend=torch.zeros(1, dtype=torch.int64)))
    return _bytes(indices_K.to(torch.int32 if coding == "int32" else torch.int64))


def _decode_indices(coding: str, message_B: Tensor, numel: int, count: int) -> tuple[Tensor, int]:
    if coding == "bitmap":
        used = -(-numel // 8)
        return unpack_bits(message_B[:used], 1, numel).nonzero().flatten(), used
    if coding == "delta-varint":
        distances_K, used = decode_varint(message_B, count)
        return distances_K.cumsum(0), used
    dtype = torch.int32 if coding == "int32" else torch.int64
    used = count * dtype.itemsize
    return _typed(message_B[:used], dtype).to(torch.int64), used


def encode_varint(numbers_K: Tensor) -> Tensor:
    """Numbers in [0, 2^35) in groups of 7 bits, the lowest first; the top bit says that more follow."""
    lengths_K = 1 + sum((numbers_K >= 1 << (7 * i)).to(torch.int64) for i in range(1, _VARINT_BYTES))
    lengths_K = torch.as_tensor(lengths_K)
    starts_K = lengths_K.cumsum(0) - lengths_K
    message_B = torch.zeros(int(lengths_K.sum()), dtype=torch.uint8)
    for i in range(_VARINT_BYTES):
        has_K = lengths_K > i
        more_K = (lengths_K[has_K] > i + 1).to(torch.int64) << 7
        message_B[starts_K[has_K] + i] = (((numbers_K[has_K] >> (7 * i)) & 127) | more_K).to(torch.uint8)
    return message_B


def decode_varint(message_B: Tensor, count: int) -> tuple[Tensor, int]:
    """The first ``count`` numbers of ``encode_varint``, and the bytes they take."""
    if not count:
        return torch.zeros(0, dtype=torch.int64), 0
    last_K = (message_B < 128).nonzero().flatten()[:count]
    used = int(last_K[-1]) + 1
    lengths_K = torch.diff(last_K, prepend=torch.full((1,), -1))
    owner_B = torch.repeat_interleave(torch.arange(count), lengths_K)
    place_B = torch.arange(used) - (last_K - lengths_K + 1)[owner_B]
    parts_B = (message_B[:used].to(torch.int64) & 127) << (7 * place_B)
    return torch.zeros(count, dtype=torch.int64).index_add_(0, owner_B, parts_B), used


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _typed(message_B: Tensor, dtype: torch.dtype) -> Tensor:
    return message_B.clone().view(dtype)  # copied, since a slice may lie anywhere
