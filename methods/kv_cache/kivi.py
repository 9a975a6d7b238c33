"""KIVI: keys per channel, values per token, and the newest tokens exactly (arXiv 2402.02750).

The timing is that of the released code (jy-yuan/KIVI, models/llama_kivi.py): keys wait until ``residual`` of them are a block, values
leave the exact part one by one.

Shape suffixes: B batch, G key-value heads, T queries, N tokens held, M tokens held exactly, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.kernels.decode_segments import SegmentPart
from isoflop.kernels.quant import Packed, quant_pack, unpack
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.base import empty_recent, whole_prompt
from isoflop.methods.kv_cache.quantised import EXACT, KeyAndValueBits
from isoflop.methods.kv_cache.select import lengths
from isoflop.methods.kv_cache.token_tiers import appended
from isoflop.models.base import ModelInfo
from isoflop.models.growing import Rooms
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore, Segment, attend_segments


@METHODS.register("kivi")
@dataclass(frozen=True)
class Kivi(KeyAndValueBits):
    """Keys share grids along tokens, values along channels, and a residual of the newest tokens stays as it is.

    Of n tokens the first n - n mod ``residual`` keys are packed, so that groups are always whole, and the first n - ``residual`` values.
    While generating, keys become a block whenever ``residual`` of them have come, and with each token one value leaves. The paper's
    residual is 128, on prompts of thousands; the default is that of the released example. Prompts shorter than it stay exact.
    ``kv-rtn`` is the same layout without a residual.
    """

    paper: ClassVar[str] = "arXiv 2402.02750"

    bits: Annotated[int, Knob(choices=(2, 3, 4, 8, 16), ratio=True, unit="bits", doc="per element; 16 keeps the cache")] = 2  # fmt: skip
    group: Annotated[int, Knob(low=1, high=65536, log=True, unit="values", doc="tokens (keys) or channels (values) of one grid; divides residual")] = 32  # fmt: skip
    residual: Annotated[int, Knob(low=1, high=1_000_000, log=True, unit="tokens", doc="newest tokens whose values stay exact, and keys that become a block together")] = 32  # fmt: skip

    def check(self, info: ModelInfo) -> None:
        """Refuse blocks of keys that are not whole groups."""
        super().check(info)
        if self.residual % self.group:
            near = max(1, round(self.residual / self.group)) * self.group
            raise Infeasible(
                f"method kivi: residual = {self.residual} tokens are not whole groups of {self.group} (group); allowed: multiples of it, "
                f"such as {near}"
            )

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """One segment with packed and exact tokens."""
        if self.bits >= EXACT:
            return LayerStore([whole_prompt(prompt)], empty_recent(prompt))
        seen = lengths(prompt)
        most = max(seen)
        k_BGND, v_BGND = (x[:, :, x.shape[2] - most :] for x in (prompt.k_BGTD, prompt.v_BGTD))
        empty = KiviSegment.starting(k_BGND[:, :, :0], v_BGND[:, :, :0], len(seen))
        return LayerStore([self.moved_on(empty, k_BGND, v_BGND, seen)], empty_recent(prompt))

    def stride(self, store: LayerStore) -> int | None:
        """Up to the next block of keys; which values are exact depends on the query, see ``read``."""
        if self.bits >= EXACT:
            return None
        return min(self.residual - n % self.residual for n in _kivi(store).seen)

    def read(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Each query reads the newest ``residual`` values before it exactly, and older ones as they are packed then."""
        if self.bits >= EXACT:
            return super().read(query, store, prepared)
        segments = store.all()
        out_BTHD, p_BHTN = attend_segments(query.q_BHTD, segments, query.softmax, query.order_BT)
        if query.q_BHTD.shape[2] == 1:
            return out_BTHD
        held = _kivi(store)
        v_BGMD = torch.cat((held.v_exact_BGMD, store.recent.v_BGND), dim=2)
        places = p_BHTN.shape[-1] - v_BGMD.shape[2]
        positions_BN = torch.cat([s.positions_BGN[:, 0] for s in segments], dim=-1)[:, places:]
        gone_BTN = query.order_BT[:, :, None] - positions_BN[:, None] > self.residual
        p_BHTM = p_BHTN[..., places:] * gone_BTN[:, None]
        changed_BGMD = unpack(self._values(v_BGMD)) - v_BGMD.float()
        p_BGXM = p_BHTM.reshape(p_BHTM.shape[0], v_BGMD.shape[1], -1, p_BHTM.shape[-1])
        more_BHTD = (p_BGXM @ changed_BGMD).view(*p_BHTM.shape[:3], -1)
        return out_BTHD + more_BHTD.transpose(1, 2).to(out_BTHD.dtype)

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Read, then pack what is no longer among the newest."""
        out_BTHD = self.read(query, store, prepared)
        if self.bits < EXACT:
            held = _kivi(store)
            seen = [n + query.q_BHTD.shape[2] for n in held.seen]
            store.segments = [self.moved_on(held, store.recent.k_BGND, store.recent.v_BGND, seen)]
            store.recent = empty_recent(query)
        return out_BTHD

    def moved_on(self, held: KiviSegment, k_BGTD: Tensor, v_BGTD: Tensor, seen: list[int]) -> KiviSegment:
        """The segment with more tokens, of which ``seen`` each row has had by then."""
        k_BGMD = torch.cat((held.k_exact_BGMD, k_BGTD), dim=2)
        v_BGMD = torch.cat((held.v_exact_BGMD, v_BGTD), dim=2)
        stay = min(max(seen), self.residual)
        leaving_BGTD = v_BGMD[:, :, : v_BGMD.shape[2] - stay]
        v, rooms = held.v, held.rooms
        if leaving_BGTD.shape[2]:
            new = self._values(leaving_BGTD)
            v = new if v is None else appended(v, new, rooms, "v")
        k, blocks = held.k, [n - n % self.residual for n in seen]
        if blocks != held.packed_keys:
            k = self._keys(k, k_BGMD, held, seen, blocks)
        waiting = max(n - b for n, b in zip(seen, blocks, strict=True))
        exact = k_BGMD[:, :, k_BGMD.shape[2] - waiting :].clone(), v_BGMD[:, :, v_BGMD.shape[2] - stay :].clone()
        return KiviSegment.of(seen, blocks, k, v, *exact, rooms)

    def _values(self, v_BGND: Tensor) -> Packed:
        return quant_pack(v_BGND, self.value_bits or self.bits, -1, self.group)

    def _keys(self, k: Packed | None, k_BGMD: Tensor, held: KiviSegment, seen: list[int], blocks: list[int]) -> Packed:
        """Packed keys with those behind them that are whole blocks by now: each row's from its slot ``held.packed_keys`` on."""
        counts = [after - before for after, before in zip(blocks, held.packed_keys, strict=True)]
        device, count = k_BGMD.device, max(counts)
        # a row's keys that are not packed yet end with the newest; empty slots repeat a key, and lie behind a row's own
        first_B = torch.tensor(
            [k_BGMD.shape[2] - (n - p) for n, p in zip(seen, held.packed_keys, strict=True)], device=device
        )
        places_BN = (first_B[:, None] + torch.arange(count, device=device)).clamp(max=k_BGMD.shape[2] - 1)
        index_BGND = places_BN[:, None, :, None].expand(-1, k_BGMD.shape[1], -1, k_BGMD.shape[3])
        new = quant_pack(k_BGMD.gather(2, index_BGND), self.bits, -2, self.group)
        if k is None:
            return new
        if len(set(seen)) == 1:
            return appended(k, new, held.rooms, "k")
        return spliced(k, new, held.packed_keys, counts)


@dataclass
class KiviSegment(Segment):
    """All tokens of a layer. Columns end with each row's newest token; positions below 0 are empty.

    Attributes:
        seen: tokens of each row.
        packed_keys: how many of them, from the first on, have packed keys.
        k: these, by their numbers in each row; None for none.
        v: values that are packed, ending with the newest of them.
        k_exact_BGMD, v_exact_BGMD: the newest ones, ending with the newest.
    """

    seen: list[int]
    packed_keys: list[int]
    k: Packed | None
    v: Packed | None
    k_exact_BGMD: Tensor
    v_exact_BGMD: Tensor
    rooms: Rooms = field(default_factory=Rooms, repr=False)

    @classmethod
    def starting(cls, k_BG0D: Tensor, v_BG0D: Tensor, rows: int) -> KiviSegment:
        """Without tokens."""
        return cls.of([0] * rows, [0] * rows, None, None, k_BG0D, v_BG0D, Rooms())

    @classmethod
    def of(
        cls,
        seen: list[int],
        blocks: list[int],
        k: Packed | None,
        v: Packed | None,
        k_BGMD: Tensor,
        v_BGMD: Tensor,
        rooms: Rooms,
    ) -> KiviSegment:
        """With positions and biases of its tokens."""
        most = max(seen)
        columns_N, seen_B1 = torch.arange(most, device=k_BGMD.device), torch.tensor(seen, device=k_BGMD.device)[:, None]
        numbers_BGN = (columns_N + seen_B1 - most)[:, None].expand(-1, k_BGMD.shape[1], -1)
        bias_BGN = None
        if min(seen) < most:
            bias_BGN = torch.zeros_like(numbers_BGN, dtype=k_BGMD.dtype).masked_fill(numbers_BGN < 0, float("-inf"))
        return cls(numbers_BGN.clamp(min=0), bias_BGN, seen, blocks, k, v, k_BGMD, v_BGMD, rooms)

    def part(self) -> SegmentPart:
        """Dequantised, for readers of whole tokens."""
        return SegmentPart(self.keys(), self.values(), self.log_bias_BGN)

    def keys(self) -> Tensor:
        """Of every column."""
        if self.k is None:
            return self.k_exact_BGMD
        k_BGXD = torch.cat((unpack(self.k), self.k_exact_BGMD.float()), dim=2)
        places_BN = self._places()
        if places_BN is None:
            return k_BGXD
        return k_BGXD.gather(2, places_BN[:, None, :, None].expand(-1, k_BGXD.shape[1], -1, k_BGXD.shape[3]))

    def values(self) -> Tensor:
        """Of every column."""
        if self.v is None:
            return self.v_exact_BGMD
        return torch.cat((unpack(self.v), self.v_exact_BGMD.float()), dim=2)

    def products(self, q_BGMD: Tensor) -> Tensor:
        """With packed and exact keys by themselves; neither is copied."""
        q_BGMD = q_BGMD.float()
        found = q_BGMD @ self.k_exact_BGMD.float().transpose(-1, -2)
        if self.k is None:
            return found
        found_BGMX = torch.cat((q_BGMD @ unpack(self.k).transpose(-1, -2), found), dim=-1)
        places_BN = self._places()
        if places_BN is None:
            return found_BGMX
        return found_BGMX.gather(3, places_BN[:, None, None].expand(-1, *found_BGMX.shape[1:3], -1))

    def mixed(self, p_BGMN: Tensor) -> Tensor:
        """Over packed and exact values by themselves."""
        packed = 0 if self.v is None else self.v.shape[2]
        found = p_BGMN[..., packed:] @ self.v_exact_BGMD.float()
        return found if self.v is None else found + p_BGMN[..., :packed] @ unpack(self.v)

    def _places(self) -> Tensor | None:
        """Where each column's key stands among the packed and then the exact ones, (B, N); None where columns are just these."""
        assert self.k is not None
        if len(set(self.seen)) == 1:
            return None
        most, slots, device = max(self.seen), self.k.shape[2], self.k_exact_BGMD.device
        seen_B1, blocks_B1 = (torch.tensor(n, device=device)[:, None] for n in (self.seen, self.packed_keys))
        columns_N = torch.arange(most, device=device)
        numbers_BN = columns_N + seen_B1 - most
        exact_N = (columns_N - (most - self.k_exact_BGMD.shape[2]) + slots).clamp(min=0)
        return torch.where(numbers_BN < blocks_B1, numbers_BN.clamp(0, slots - 1), exact_N)

    def tensors(self) -> Iterable[Tensor]:
        """Codes and grids, and exact numbers."""
        for packed in (self.k, self.v):
            yield from () if packed is None else packed.tensors()
        yield from (self.k_exact_BGMD, self.v_exact_BGMD)
        if self.log_bias_BGN is not None:
            yield self.log_bias_BGN


def _kivi(store: LayerStore) -> KiviSegment:
    held = store.segments[0]
    assert isinstance(held, KiviSegment)
    return held


def spliced(held: Packed, new: Packed, starts: list[int], counts: list[int]) -> Packed:
    """``held`` with the first ``counts[b]`` of the new tokens of row b from slot ``starts[b]`` on; all are whole groups."""
    slots = max(held.shape[2], *(start + count for start, count in zip(starts, counts, strict=True)))
    tensors = []
    for old, fresh, step in zip(held.tensors(), new.tensors(), (1, held.group, held.group), strict=True):
        wide = torch.nn.functional.pad(old, (0, 0, 0, slots // step - old.shape[2]))
        place_BN = (
            torch.arange(wide.shape[2], device=old.device) - torch.tensor(starts, device=old.device)[:, None] // step
        )
        fits_BN = (place_BN >= 0) & (place_BN < torch.tensor(counts, device=old.device)[:, None] // step)
        index_BN = place_BN.clamp(0, fresh.shape[2] - 1)
        picked = fresh.gather(2, index_BN[:, None, :, None].expand(-1, fresh.shape[1], -1, fresh.shape[3]))
        tensors.append(torch.where(fits_BN[:, None, :, None], picked, wide))
    codes, scale, zero = tensors
    return replace(held, codes=codes, scale=scale, zero=zero, shape=(*held.shape[:2], slots, held.shape[3]))
