"""A segment whose heads hold different numbers of tokens, one behind the other without gaps.

Keys and values of all rows and heads lie in one tensor each, head by head, and the ends of the heads' parts beside them: what is
resident is the sum of the lengths. Reading goes by tiles, so many tokens of one head, whose number follows that sum too: one long
head does not make the others as long. A processor reads the heads one after the other instead, which copies no keys: three to
five times as fast there with 2,000 tokens a head, and as fast with 64 short heads.

Shape suffixes: B batch, G key-value heads, O rows and heads (b·G + g), R tokens of all of them, S tiles, W tokens of a tile, M query
rows of a key-value head, N tokens of the longest head, T tokens of a prompt, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.kernels.decode_segments import RaggedPart, SegmentPart
from isoflop.models.segments import NEVER, Segment

TILE = 64


@dataclass(frozen=True, eq=False)
class Tiles:
    """Where the tokens of the tiles lie.

    Attributes:
        owner_S: row and head of each tile.
        place_S: which of its owner's tiles it is.
        index_SW: tokens in the flat tensors; entries beyond the end repeat a token.
        most: tiles of the longest owner.
    """

    owner_S: Tensor
    place_S: Tensor
    index_SW: Tensor
    most: int

    def of(self, x_RD: Tensor) -> Tensor:
        """Their tokens, (S, W, D)."""
        return x_RD.index_select(0, self.index_SW.flatten()).view(*self.index_SW.shape, -1)


@dataclass
class RaggedSegment(Segment):
    """Exact tokens, of each head as many as it has; N is the length of the longest, and shorter ones end in entries that no query sees.

    Attributes:
        k_RD, v_RD: of all rows and heads, ascending.
        ends_O: int32, one past the last token of each.
    """

    k_RD: Tensor
    v_RD: Tensor
    ends_O: Tensor

    @classmethod
    def kept(cls, kept_BGT: Tensor, positions_BGT: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> RaggedSegment:
        """Those tokens where ``kept_BGT`` is True."""
        counts_BG = kept_BGT.sum(-1)
        rank_BGT = torch.where(kept_BGT, kept_BGT.long().cumsum(-1), 0)  # from 1; 0 for those that go
        most = int(counts_BG.max()) if counts_BG.numel() else 0
        positions_BGN = positions_BGT.new_full((*counts_BG.shape, most + 1), NEVER)
        positions_BGN = positions_BGN.scatter(2, rank_BGT, positions_BGT)[:, :, 1:].contiguous()
        ends_O = counts_BG.flatten().cumsum(0).int()
        return cls(positions_BGN, None, k_BGTD[kept_BGT], v_BGTD[kept_BGT], ends_O)

    @property
    def lengths_BG(self) -> Tensor:
        """Tokens of each head."""
        return self.read_part().lengths_BG

    def read_part(self) -> RaggedPart:
        """The tensors themselves."""
        return RaggedPart(self.k_RD, self.v_RD, self.ends_O, self.positions_BGN.shape[1], self.tokens)

    def part(self) -> SegmentPart:
        """With room for the longest head in all of them."""
        return self.read_part().padded()

    def products(self, q_BGMD: Tensor) -> Tensor:
        """Queries times keys; 0 at entries that are not there."""
        q_OMD = q_BGMD.float().flatten(0, 1)
        found_OMN = self.products_by_head(q_OMD) if self._on_processor else self.products_by_tile(q_OMD)
        return found_OMN.view(*q_BGMD.shape[:3], -1)

    def mixed(self, p_BGMN: Tensor) -> Tensor:
        """Weights times values; weights of entries that are not there are 0."""
        p_OMN = p_BGMN.flatten(0, 1)
        found_OMD = self.mixed_by_head(p_OMN) if self._on_processor else self.mixed_by_tile(p_OMN)
        return found_OMD.view(*p_BGMN.shape[:3], -1).to(self.v_RD.dtype)

    @property
    def _on_processor(self) -> bool:
        return self.k_RD.device.type == "cpu"

    def products_by_head(self, q_OMD: Tensor) -> Tensor:
        """Head by head, (O, M, N), float32."""
        parts = zip(q_OMD, self._by_head(self.k_RD), strict=True)
        return torch.stack([F.pad(q @ k.float().T, (0, self.tokens - len(k))) for q, k in parts])

    def mixed_by_head(self, p_OMN: Tensor) -> Tensor:
        """Head by head, (O, M, D), float32."""
        parts = zip(p_OMN, self._by_head(self.v_RD), strict=True)
        return torch.stack([p[:, : len(v)] @ v.float() for p, v in parts])

    def _by_head(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """Views of each row and head's tokens."""
        return x_RD.split(self.lengths_BG.flatten().tolist())

    def products_by_tile(self, q_OMD: Tensor) -> Tensor:
        """Tile by tile, all at once, (O, M, N), float32."""
        tiles = self._tiles()
        found_SMW = q_OMD[tiles.owner_S] @ tiles.of(self.k_RD).float().transpose(-1, -2)
        found_OMXW = found_SMW.new_zeros(*q_OMD.shape[:2], tiles.most, TILE)
        found_OMXW[tiles.owner_S, :, tiles.place_S] = found_SMW
        return found_OMXW.flatten(2)[..., : self.tokens]

    def mixed_by_tile(self, p_OMN: Tensor) -> Tensor:
        """Tile by tile, all at once, (O, M, D), float32."""
        tiles = self._tiles()
        missing = tiles.most * TILE - p_OMN.shape[-1]
        p_OMXW = F.pad(p_OMN, (0, missing)).unflatten(-1, (tiles.most, TILE))
        found_SMD = p_OMXW[tiles.owner_S, :, tiles.place_S] @ tiles.of(self.v_RD).float()
        found_OMD = found_SMD.new_zeros(len(p_OMN), *found_SMD.shape[1:])
        return found_OMD.index_add_(0, tiles.owner_S, found_SMD)

    def tensors(self) -> Iterable[Tensor]:
        """Keys, values, and where heads end."""
        yield from (self.k_RD, self.v_RD, self.ends_O)

    def _tiles(self) -> Tiles:
        """Cut each head's tokens into tiles, the last one of a head with what is left."""
        lengths_O, device = self.lengths_BG.flatten(), self.ends_O.device
        tiles_O = (lengths_O + TILE - 1) // TILE
        owner_S = torch.arange(len(tiles_O), device=device).repeat_interleave(tiles_O)
        place_S = torch.arange(len(owner_S), device=device) - (tiles_O.cumsum(0) - tiles_O)[owner_S]
        first_S = self.ends_O[owner_S] - lengths_O[owner_S] + place_S * TILE
        index_SW = first_S[:, None] + torch.arange(TILE, device=device)
        index_SW = index_SW.minimum(self.ends_O[owner_S, None] - 1)
        return Tiles(owner_S, place_S, index_SW, -(-self.tokens // TILE))
