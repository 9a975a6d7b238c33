"""Quest: pages of the cache are read by an upper bound on what a query finds in them (arXiv 2406.10774).

Shape suffixes: B batch, H query heads, G key-value heads, S heads that choose for themselves (H or G), T queries or new tokens, N cached
tokens, X pages, P tokens of a page, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.knobs import Knob, KnobValue
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.select import all_tokens, lengths
from isoflop.methods.sparse_attention.base import DenseFirst, best, visible
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore

if TYPE_CHECKING:
    from isoflop.methods.kv_cache.probe import KvCacheProbe

LOWEST = float("-inf")


@METHODS.register("quest")
@dataclass(frozen=True)
class Quest(DenseFirst):
    """The cache is cut into pages; of each the smallest and largest key per channel is known, and tells which pages a query reads.

    The bound of a page is the sum over channels of the larger of q·min and q·max, which no product with one of its keys exceeds. The
    pages with the largest bounds are read whole and attended to exactly, anew for each query. Pages are those of a row's own
    tokens; the last one grows while decoding, and is a page like any other unless ``newest`` forces it, as the released kernels
    do. The released simulation reads 3 pages at least (``least``). A group that chooses together (``select_per``) adds up
    the softmax over pages of its heads' bounds, which is our choice: the paper has no grouped heads.
    """

    paper: ClassVar[str] = "arXiv 2406.10774"

    page: Annotated[int, Knob(low=1, high=4096, log=True, unit="tokens", doc="tokens of a page; of each page two keys are read to score it")] = 16  # fmt: skip
    least: Annotated[
        int, Knob(low=1, high=4096, unit="pages", doc="pages that are read at least, where there are as many")
    ] = 1
    newest: Annotated[bool, Knob(doc="the last page is always among those read")] = False
    select_per: Annotated[str, Knob(choices=("query-head", "kv-head"), doc="who chooses pages; a group by its heads together")] = "query-head"  # fmt: skip

    @classmethod
    def probe(cls) -> KvCacheProbe:
        """The family's, with pages that its few tokens fill several of."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        small: dict[str, KnobValue] = {"page": 4, "dense_layers": 0, "k_share": 0.2}
        values: dict[str, tuple[KnobValue, ...]] = {
            "page": (2, 8), "least": (1, 6), "newest": (False, True), "select_per": ("query-head", "kv-head"),
        }  # fmt: skip
        tried = {knob: [{**small, knob: value} for value in given] for knob, given in values.items()}
        return KvCacheProbe(cost="read", layers=4, tried=tried)

    def index(self, tokens: AttentionCall, store: LayerStore, prepared: Any) -> None:
        """Bring the pages' bounds up to date; and what bounds each new token's own page when it is the newest."""
        k_BGTD, first = tokens.k_BGTD, "low" not in store.state
        seen = lengths(tokens) if first else store.state["seen"]
        if first:
            k_BGTD = all_tokens(tokens).take(k_BGTD)
            pages_BGXPD = _in_pages(k_BGTD, self.page)
            store.state["low"], store.state["high"] = pages_BGXPD.amin(3), pages_BGXPD.amax(3)
        else:
            self._grow(k_BGTD, seen, store)
            seen = [n + k_BGTD.shape[2] for n in seen]
        store.state["seen"] = seen
        store.extra = [store.state["low"], store.state["high"]]

    def _grow(self, k_BGTD: Tensor, seen: list[int], store: LayerStore) -> None:
        """Take in tokens behind ``seen`` of each row: its last page goes on, others follow."""
        count, device = k_BGTD.shape[2], k_BGTD.device
        seen_B = torch.tensor(seen, device=device)
        inside_B, page_B = seen_B % self.page, seen_B // self.page
        width = -(-(int(inside_B.max()) + count) // self.page) * self.page
        # the tokens that a page has already stand for themselves by their bounds
        place_BW = torch.arange(width, device=device) - inside_B[:, None]
        index_BGWD = place_BW.clamp(0, count - 1)[:, None, :, None].expand(-1, k_BGTD.shape[1], -1, k_BGTD.shape[3])
        new_BGWD, held_BW11 = k_BGTD.gather(2, index_BGWD), (place_BW < 0)[:, None, :, None]
        old = torch.arange(-(-(max(seen) + count) // self.page), device=device) - page_B[:, None]
        for name, running in (("low", torch.cummin), ("high", torch.cummax)):
            bounds_BGXD = store.state[name]
            last_BG1D = _at_page(bounds_BGXD, page_B[:, None].clamp(max=bounds_BGXD.shape[2] - 1))
            pages_BGXPD = _in_pages(torch.where(held_BW11, last_BG1D, new_BGWD), self.page)
            so_far_BGWD = running(pages_BGXPD, 3).values.flatten(2, 3)
            own = (torch.arange(count, device=device) + inside_B[:, None])[:, None, :, None]
            store.state[f"own {name}"] = so_far_BGWD.gather(2, own.expand_as(k_BGTD))
            wide_BGXD = torch.nn.functional.pad(bounds_BGXD, (0, 0, 0, old.shape[1] - bounds_BGXD.shape[2]))
            fresh_BGXD = _at_page(so_far_BGWD[:, :, self.page - 1 :: self.page], old.clamp(0, pages_BGXPD.shape[2] - 1))
            store.state[name] = torch.where((old >= 0)[:, None, :, None], fresh_BGXD, wide_BGXD)

    def page_bounds(self, query: AttentionCall, store: LayerStore) -> Tensor:
        """Upper bounds on products, (B, H, T, X); -inf for pages that begin behind a query."""
        low_BGXD, high_BGXD = store.state["low"], store.state["high"]
        groups, own_BT = low_BGXD.shape[1], (query.order_BT // self.page).expand(query.q_BHTD.shape[0], -1)
        q_BGRTD = query.q_BHTD.float().unflatten(1, (groups, -1))
        up, down = q_BGRTD.clamp(min=0), q_BGRTD.clamp(max=0)
        bounds_BGRTX = (
            up @ high_BGXD.float().transpose(-1, -2)[:, :, None] + down @ low_BGXD.float().transpose(-1, -2)[:, :, None]
        )
        # a query's own page holds nothing behind it yet
        if query.q_BHTD.shape[2] > 1:
            own_low, own_high = (store.state[f"own {name}"].float()[:, :, None] for name in ("low", "high"))
            own_BGRT1 = (up * own_high + down * own_low).sum(-1, keepdim=True)
            bounds_BGRTX = bounds_BGRTX.scatter(-1, own_BT[:, None, None, :, None].expand_as(own_BGRT1), own_BGRT1)
        behind_BTX = torch.arange(low_BGXD.shape[2], device=own_BT.device) > own_BT[..., None]
        return bounds_BGRTX.masked_fill(behind_BTX[:, None, None], LOWEST).flatten(1, 2)

    def chosen(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """All tokens of the best pages."""
        bounds_BHTX = self.page_bounds(query, store)
        for name in ("own low", "own high"):
            store.state.pop(name, None)
        cached, groups = store.segments[0], query.k_BGTD.shape[1]
        own_BT = query.order_BT // self.page
        scores_BSTX = bounds_BHTX
        if self.select_per == "kv-head":
            behind_BHTX = bounds_BHTX == LOWEST
            logits_BHTX = query.softmax.logits(bounds_BHTX.masked_fill(behind_BHTX, 0.0)).masked_fill(
                behind_BHTX, LOWEST
            )
            scores_BSTX = (
                logits_BHTX.softmax(-1).unflatten(1, (groups, -1)).sum(2).masked_fill(behind_BHTX[:, :groups], LOWEST)
            )
        if self.newest:
            last_BTX = torch.arange(scores_BSTX.shape[-1], device=own_BT.device) == own_BT[..., None]
            scores_BSTX = scores_BSTX.masked_fill(last_BTX[:, None], float("inf"))
        pages_BSTX = best(scores_BSTX, self._pages(query))
        page_BN = (cached.positions_BGN[:, 0] // self.page).expand(pages_BSTX.shape[0], -1)
        chosen_BSTN = pages_BSTX.gather(-1, page_BN[:, None, None].expand(-1, *pages_BSTX.shape[1:3], -1))
        return chosen_BSTN & visible(query, cached)

    def _pages(self, query: AttentionCall) -> Tensor:
        """Pages that each query reads, (B or 1, T)."""
        there_BT = query.order_BT // self.page + 1
        share_BT = (self.k_share * (query.order_BT + 1).double() / self.page + 0.5 + 1e-9).floor().long()
        whole = self.k_share >= 1
        return there_BT if whole else share_BT.clamp(min=self.least).minimum(there_BT)


def _in_pages(k_BGTD: Tensor, page: int) -> Tensor:
    """Tokens in pages of their own, (B, G, X, P, D); the last repeats its last token."""
    length = k_BGTD.shape[2]
    pages = -(-length // page)
    if pages * page > length:
        k_BGTD = torch.cat((k_BGTD, k_BGTD[:, :, -1:].expand(-1, -1, pages * page - length, -1)), dim=2)
    return k_BGTD.unflatten(2, (pages, page))


def _at_page(x_BGXD: Tensor, index_BY: Tensor) -> Tensor:
    """Some pages of each row, (B, G, Y, D)."""
    return x_BGXD.gather(2, index_BY[:, None, :, None].expand(-1, x_BGXD.shape[1], -1, x_BGXD.shape[3]))
