"""The covering tree: all token sequences that spell a text, or the start of one, with their probabilities.

Lemma of arXiv 2410.09303: the probability that a text starts with bytes ``x`` is the sum of the probabilities of its
covers, the token sequences whose bytes start with ``x`` and without their last token do not. A cover is a node of the
tree, a sequence that ends somewhere in ``x``, together with a token that reaches to the end of ``x`` or beyond. So one
row of next-token probabilities per node gives the probabilities of all bytes, position by position.

Nodes of all examples that end at the same place are run together. They share keys and values: a node is one token, and
sees the prompt and its own ancestors.

Shape suffixes: B batch, K new tokens, C columns of the cache, V vocabulary of the model, W text tokens in the order of
their bytes, S symbols: 256 bytes and ``NO_BYTE``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from isoflop.core.errors import Infeasible
from isoflop.models.byte_trees.segmentations import Segmentations, Tail
from isoflop.models.hooks.attention import ATTENTION

if TYPE_CHECKING:
    from isoflop.models.lm import LmModel

NO_BYTE = 256
"""The symbol of the end of a text, and of other special tokens."""
SYMBOLS = 257

RENORMALISED, MASKED, EVERY = "canonical-renormalised", "canonical-masked", "all-segmentations"
MASSES = (RENORMALISED, MASKED, EVERY)


@dataclass(frozen=True)
class Start:
    """Where the tree of an example begins.

    Attributes:
        data: the bytes of the text.
        context: ids of the tokens that the prompt is given as; at least one.
        offset: the bytes that they stand for; the tree spells those from here on.
        first: offset of the first byte that is asked for.
        forced: bytes from ``offset`` on that the first token must start with; empty for none. What follows that token is
            tokenised by itself, as what follows a prompt is.
    """

    data: bytes
    context: Sequence[int]
    offset: int
    first: int
    forced: bytes = b""


@dataclass
class Counts:
    """What growing trees took.

    Attributes:
        calls: forward passes of a language model.
        tokens: that went through one, padding left out; ``context_tokens`` of them are prompt.
        nodes: of all trees, their roots included.
        widest: most covers at one position, by the node that they share.
        symbols: positions whose next byte was asked for.
        per_model: ``tokens`` of each model, where there are several.
    """

    calls: int = 0
    tokens: int = 0
    context_tokens: int = 0
    nodes: int = 0
    widest: int = 0
    symbols: int = 0
    per_model: tuple[int, ...] = ()

    def per_symbol(self) -> dict[str, float]:
        """By name, per position asked for."""
        asked = max(1, self.symbols)
        return {
            "lm_calls_per_byte": self.calls / asked,
            "tokens_per_byte": self.tokens / asked,
            "tree_tokens_per_byte": (self.tokens - self.context_tokens) / asked,
            "largest_cover": float(self.widest),
        }

    def add(self, other: Counts) -> None:
        """Count what another model took for the same positions."""
        self.per_model = (*(self.per_model or (self.tokens,)), other.tokens)
        for name in ("calls", "tokens", "context_tokens", "nodes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.widest = max(self.widest, other.widest)


@dataclass
class _Node:
    """A token sequence that spells ``data[: at]``, and the tokens behind it that spell what follows ``at``.

    Attributes:
        token: its last token; -1 for the root.
        since: where its tokens are tokenised from: the start of the tree, or behind a forced token.
        tokens, ends, joined: since then: ids, where they end, whether they may share a piece with the token before.
        weight: its probability over that of the bytes reached so far.
        columns: of the cache, that it sees.
        p_W: probabilities of the next token; ``no_byte`` that of no further byte.
        low, high: the range in W of the tokens that agree with the text behind ``at``.
    """

    at: int
    token: int
    since: int
    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    joined: tuple[bool, ...]
    weight: float
    columns: np.ndarray
    p_W: np.ndarray = field(default_factory=lambda: np.zeros(0))
    no_byte: float = 0.0
    low: int = 0
    high: int = 0


class TreePass:
    """Keys and values of the trees of a batch; nodes are appended level by level.

    Raises:
        Infeasible: a method on the cache or on attention is applied, which would see a tree as a text.
    """

    def __init__(self, model: LmModel, counts: Counts) -> None:
        from transformers import DynamicCache

        if model.occupant(ATTENTION) is not None:
            raise Infeasible("bytes have no probabilities under a method on the KV cache or attention; leave one out")
        self._model, self._counts, self._cache = model, counts, DynamicCache()
        self._columns = 0

    def start(self, contexts: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], np.ndarray]:
        """Run the prompts: the columns that each holds, and log-probabilities (B, V) of what follows them."""
        width = max(map(len, contexts))
        ids = np.zeros((len(contexts), width), dtype=np.int64)
        seen = np.zeros((len(contexts), width, width), dtype=bool)
        positions = np.zeros_like(ids)
        for row, context in enumerate(contexts):
            padding = width - len(context)
            ids[row, padding:] = context
            positions[row, padding:] = np.arange(len(context))
            seen[row, padding:, padding:] = np.tri(len(context), dtype=bool)
            seen[row, :padding, :padding] = np.eye(padding, dtype=bool)
        self._counts.context_tokens += sum(map(len, contexts))
        found = self._run(ids, positions, seen, sum(map(len, contexts)), last_only=True)
        return [np.arange(width - len(context), width) for context in contexts], found[:, -1]

    def extend(self, nodes: Sequence[Sequence[_Node]]) -> list[np.ndarray]:
        """Run the new nodes of each example behind their ancestors: log-probabilities (nodes, V), own columns added."""
        width = max(map(len, nodes))
        first = self._columns
        ids = np.zeros((len(nodes), width), dtype=np.int64)
        positions = np.zeros_like(ids)
        seen = np.zeros((len(nodes), width, first + width), dtype=bool)
        seen[:, np.arange(width), first + np.arange(width)] = True
        for row, own in enumerate(nodes):
            for place, node in enumerate(own):
                ids[row, place], positions[row, place] = node.token, len(node.columns)
                seen[row, place, node.columns] = True
                node.columns = np.append(node.columns, first + place)
        found = self._run(ids, positions, seen, sum(map(len, nodes)))
        return [found[row, : len(own)] for row, own in enumerate(nodes)]

    @torch.no_grad()
    def _run(
        self, ids_BK: np.ndarray, positions_BK: np.ndarray, seen_BKC: np.ndarray, tokens: int, last_only: bool = False
    ) -> np.ndarray:
        model = self._model
        dtype = next(model.module.parameters()).dtype
        seen = torch.from_numpy(seen_BKC).to(model.device)
        mask_B1KC = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        mask_B1KC = mask_B1KC.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
        logits_BKV = model.module(
            input_ids=torch.from_numpy(ids_BK).to(model.device),
            position_ids=torch.from_numpy(positions_BK).to(model.device),
            attention_mask=mask_B1KC,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        ).logits
        self._columns += ids_BK.shape[1]
        self._counts.calls += 1
        self._counts.tokens += tokens
        found: np.ndarray = logits_BKV.double().log_softmax(-1).cpu().numpy()
        return found


class CoveringTree:
    """The trees of a batch of examples under one model.

    Args:
        model: whose next-token probabilities they hold.
        segmentations: of its tokenizer.
        mass: what becomes of probability that the model gives to sequences which its tokenizer never makes:
            ``canonical-renormalised`` shares it out among the others at each token, ``canonical-masked`` drops it there
            and normalises at each byte, ``all-segmentations`` counts it, as every sequence that spells the bytes counts.
        beam: nodes that are kept at each position with ``all-segmentations``, the heaviest; 0 for all.
    """

    def __init__(self, model: LmModel, segmentations: Segmentations, mass: str = RENORMALISED, beam: int = 0) -> None:
        self.model, self.segmentations, self.mass, self.beam = model, segmentations, mass, beam
        self.vocabulary = segmentations.vocabulary
        self.counts = Counts()

    def next_bytes(self, starts: Sequence[Start]) -> list[np.ndarray]:
        """Log-probabilities (positions, S) of the byte behind each position from ``first`` on, given all before it.

        Raises:
            ValueError: no sequence of tokens spells a text.
        """
        run = TreePass(self.model, self.counts)
        columns, root_BV = run.start([start.context for start in starts])
        growing = [_Growing(self, start, columns[row]) for row, start in enumerate(starts)]
        levels = max(len(start.data) - start.offset for start in starts)
        for level in range(levels):
            born = [example.born(level) for example in growing]
            if level == 0:
                rows = [root_BV[row : row + 1] for row in range(len(starts))]
            elif any(born):
                rows = run.extend(born)
            for example, nodes, logs in zip(growing, born, rows, strict=True):
                example.grown(level, nodes, logs)
        self.counts.nodes += sum(example.nodes for example in growing)
        self.counts.widest = max([self.counts.widest, *(example.widest for example in growing)])
        self.counts.symbols += sum(len(example.asked) for example in growing)
        return [np.stack(example.asked) for example in growing]

    def prepare(self, node: _Node, log_V: np.ndarray, tail: Tail) -> None:
        """Give a node the probabilities of what follows it."""
        p_W = np.exp(log_V[self.vocabulary.order_W])
        node.no_byte = float(np.exp(log_V[self.vocabulary.end_ids]).sum())
        if self.mass != EVERY:
            p_W *= self.segmentations.following(tail)
            node.no_byte *= self.segmentations.may_end(tail)
        total = p_W.sum() + node.no_byte
        if self.mass == RENORMALISED and total > 0:  # nothing follows a token that ends inside a character by itself
            p_W, node.no_byte = p_W / total, node.no_byte / total
        node.p_W, node.low, node.high = p_W, 0, len(p_W)


class _Growing:
    """The tree of one example while it grows."""

    def __init__(self, tree: CoveringTree, start: Start, columns: np.ndarray) -> None:
        self._tree, self._start = tree, start
        self._live: list[_Node] = [_Node(start.offset, -1, start.offset, (), (), (), 1.0, columns)]
        self._cut = start.offset
        self.asked: list[np.ndarray] = []
        self.nodes = 1
        self.widest = 0

    def born(self, level: int) -> list[_Node]:
        """Advance to ``offset + level``: the nodes that end there."""
        start, vocabulary = self._start, self._tree.vocabulary
        at = start.offset + level
        if level == 0:
            return self._live
        if at >= len(start.data):
            return []
        found, byte = [], start.data[at - 1]
        for node in self._live:
            depth = at - 1 - node.at
            column = vocabulary.next_byte_DW[depth, node.low : node.high]
            low, high = np.searchsorted(column, [byte, byte + 1]) + node.low
            node.low, node.high = int(low), int(high)
            if low < high and vocabulary.next_byte_DW[depth + 1, low] < 0:  # this token ends here
                node.low += 1
                if node.p_W[low] > 0:
                    found.append(self._child(node, int(low), at))
        self._live = [node for node in self._live if node.low < node.high and node.p_W[node.low : node.high].any()]
        self.nodes += len(found)
        return found

    def grown(self, level: int, born: list[_Node], logs: np.ndarray) -> None:
        """Take the new nodes' log-probabilities (nodes, V), and read off those of the next byte."""
        start = self._start
        at = start.offset + level
        if at >= len(start.data):
            return
        self._settle(at)
        for node, log_V in zip(born, logs, strict=False):
            tail = self._tail(node)
            if tail is None:
                node.weight = 0.0
                continue
            self._tree.prepare(node, log_V, tail)
            if level == 0 and start.forced:
                self._force(node)
        if level:
            self._live += [node for node in born if node.weight > 0]
        p_NS = np.array([node.weight * self._symbols(node, at) for node in self._live]).reshape(-1, SYMBOLS)
        total_N = p_NS.sum(1)
        if self._tree.mass == EVERY and 0 < self._tree.beam < len(total_N):
            best = self._heaviest(total_N, at)
            self._live, p_NS, total_N = [self._live[i] for i in best], p_NS[best], total_N[best]
        total = total_N.sum()
        if not total > 0:
            raise ValueError(f"no tokens spell {start.data[start.offset : at]!r} behind the prompt")
        for node in self._live:
            node.weight /= total
        self.widest = max(self.widest, len(self._live))
        if at >= start.first:
            with np.errstate(divide="ignore"):
                self.asked.append(np.log(p_NS.sum(0) / total))

    def _heaviest(self, total_N: np.ndarray, at: int) -> np.ndarray:
        """Numbers of the nodes that stay, ascending; one that ends here always does, so that every byte can follow."""
        ending_N = np.array([node.at == at for node in self._live])
        first = int(np.argmax(np.where(ending_N, total_N, -1.0)))
        order_N = np.argsort(-total_N, kind="stable")
        rest = order_N[order_N != first][: self._tree.beam - 1]
        return np.sort([first, *rest])

    def _child(self, node: _Node, rank: int, at: int) -> _Node:
        vocabulary = self._tree.vocabulary
        token, weight = int(vocabulary.order_W[rank]), node.weight * float(node.p_W[rank])
        if self._start.forced and node.token < 0:
            return _Node(at, token, at, (), (), (), weight, node.columns)
        pair = self._tree.mass != EVERY and bool(node.tokens) and bool(vocabulary.joins(node.tokens[-1])[rank])
        tokens, ends, joined = (*node.tokens, token), (*node.ends, at), (*node.joined, pair)
        return _Node(at, token, node.since, tokens, ends, joined, weight, node.columns)

    def _symbols(self, node: _Node, at: int) -> np.ndarray:
        """Probabilities (S,) of what follows ``at`` behind a node."""
        depth = at - node.at
        bytes_W = self._tree.vocabulary.next_byte_DW[depth, node.low : node.high]
        p_S = np.bincount(bytes_W, weights=node.p_W[node.low : node.high], minlength=SYMBOLS)
        if depth == 0:
            p_S[NO_BYTE] = node.no_byte
        return p_S

    def _force(self, root: _Node) -> None:
        vocabulary, forced = self._tree.vocabulary, self._start.forced
        starts_W = np.array([vocabulary.bytes_of[int(i)].startswith(forced) for i in vocabulary.order_W])
        root.p_W = root.p_W * starts_W
        root.no_byte = 0.0
        root.p_W = root.p_W / root.p_W.sum()

    def _settle(self, at: int) -> None:
        """Move on the last cut that no continuation can move."""
        if self._tree.mass != EVERY:
            self._cut += self._tree.segmentations.settled(self._start.data[self._cut : at])

    def _tail(self, node: _Node) -> Tail | None:
        """What ``Segmentations`` must know of a node: its tokens behind the cut; None where one lies across it."""
        if self._tree.mass == EVERY:
            return Tail(b"", (), (), None)
        cut = self._cut
        if cut not in (node.since, *node.ends):
            if node.since == self._start.offset:
                return None
            cut = node.since  # tokenised by itself, it need not be cut where the whole is
        count = sum(end > cut for end in node.ends)
        if not count:
            return Tail(b"", (), (), None)
        ends = tuple(end - cut for end in node.ends[-count:-1])
        # joined[i] is the boundary before token i, that is at ends[i - 1]
        joined = node.joined[len(node.joined) - count + 1 :]
        return Tail(self._start.data[cut : node.at], ends, joined, node.tokens[-1])


def log_likelihood(logs_PS: np.ndarray, data: bytes) -> np.ndarray:
    """Log-probabilities (P,) of the last P bytes of a text, from those of all symbols."""
    picked: np.ndarray = logs_PS[np.arange(len(logs_PS)), list(data[len(data) - len(logs_PS) :])]
    return picked
