"""Label channels: which key channels tell most about attention, measured on calibration text.

Shape suffixes: L layers, B batch, H query heads, G key-value heads, S heads with a list of their own (H or G), T tokens,
D head width, r label channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.methods.calibration import OnModel
from isoflop.models.base import Model
from isoflop.models.decoder_model import decoder_model
from isoflop.models.hooks.attention import ATTENTION, AttentionCall, AttentionPolicy, CacheReport, causal_attention

Contributions = dict[str, Tensor]
"""Mean magnitudes over all calibration tokens, by what they are of: ``qk`` and ``q`` are (L, H, D), ``k`` is (L, G, D)."""


@dataclass(frozen=True)
class LabelStage(OnModel):
    """Contributions of a model's key channels.

    Attributes:
        texts: calibration sequences.
    """

    texts: int

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Run the model over the texts."""
        from safetensors.torch import save_file

        with self.model(ctx) as model:
            save_file(contributions(model, ctx, self.texts, self.seed), folder / "contributions.safetensors")

    def load(self, ctx: StageContext, folder: Path) -> Contributions:
        """The means, on the CPU."""
        from safetensors.torch import load_file

        return load_file(folder / "contributions.safetensors")


@torch.no_grad()
def contributions(model: Model, ctx: StageContext, texts: int, seed: int) -> Contributions:
    """Mean of |q k|, |q| and |k| per layer, head and channel, each token's query with its own key, after RoPE."""
    decoder_model(model, "double-sparsity")
    meter = Meter()
    with model.occupy(ATTENTION, meter):
        for batch in model.calibration(ctx, texts, derive_seed("label channels", seed)):
            model.supervised(batch)
            meter.count()
    return meter.means()


class Meter(AttentionPolicy):
    """Stock attention that adds up the magnitudes of queries and keys.

    Only the last pass before ``count`` is counted, that of the scored prompts: compressors that follow the question run
    the decoder on text alone before it.
    """

    def __init__(self) -> None:
        self.prefix: int | None = None
        self.examples_B: Tensor | None = None
        self._last: dict[int, tuple[dict[str, Tensor], int]] = {}
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._tokens: dict[int, int] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Causal attention; padding is not counted."""
        k_BHTD = call.k_BGTD.repeat_interleave(call.q_BHTD.shape[1] // call.k_BGTD.shape[1], dim=1)
        seen = {"qk": call.q_BHTD * k_BHTD, "q": call.q_BHTD, "k": call.k_BGTD}
        sums = {}
        for name, x_BSTD in seen.items():
            magnitude_BSTD = x_BSTD.abs().double()
            if call.valid_BT is not None:
                magnitude_BSTD = magnitude_BSTD * call.valid_BT[:, None, :, None]
            sums[name] = magnitude_BSTD.sum((0, 2)).cpu()
        real = call.q_BHTD[:, 0, :, 0].numel() if call.valid_BT is None else int(call.valid_BT.sum())
        self._last[call.layer] = sums, real
        return causal_attention(call)

    def count(self) -> None:
        """Add the last pass to the sums."""
        for layer, (sums, real) in self._last.items():
            total = self._sums.setdefault(layer, {})
            for name, x_SD in sums.items():
                total[name] = total.get(name, 0) + x_SD
            self._tokens[layer] = self._tokens.get(layer, 0) + real
        self._last = {}

    def means(self) -> Contributions:
        """Sums over tokens divided by their number."""
        layers = sorted(self._sums)
        return {
            name: torch.stack([(self._sums[n][name] / self._tokens[n]).float() for n in layers])
            for name in ("qk", "q", "k")
        }

    @contextmanager
    def session(self) -> Iterator[None]:
        """Not used: calibration has no steps."""
        yield

    def forget(self) -> None:
        """There is nothing to forget: ``count`` has taken what it wanted."""

    def report(self) -> CacheReport:
        """Nothing is compressed."""
        raise ValueError("a meter compresses nothing")


def ranked(
    contributions: Contributions | None,
    order: str,
    layer: int,
    heads: int,
    groups: int,
    per_query_head: bool,
    width: int,
) -> Tensor:
    """All channels of a layer's heads, the most telling first, (S, D).

    Args:
        contributions: of the model; not needed for ``random``.
        order: ``qk``, ``q`` or ``k``: by these magnitudes; ``worst``: by ``qk`` in reverse; ``random``.
        per_query_head: a list for each query head, otherwise one for each group, by the group's sum.
    """
    if order == "random":
        generator = torch.Generator().manual_seed(derive_seed("random label channels", layer))
        return torch.rand(heads if per_query_head else groups, width, generator=generator).argsort(-1)
    if contributions is None:
        raise ValueError("label channels need the value of the calibration stage")
    means_SD = contributions["qk" if order == "worst" else order][layer]
    if per_query_head and means_SD.shape[0] != heads:
        means_SD = means_SD.repeat_interleave(heads // groups, dim=0)
    if not per_query_head and means_SD.shape[0] != groups:
        means_SD = means_SD.unflatten(0, (groups, -1)).sum(1)
    return means_SD.argsort(dim=-1, descending=order != "worst", stable=True)


def pick(x_BSTD: Tensor, channels_Sr: Tensor) -> Tensor:
    """Each head's label channels, (B, S, T, r)."""
    batch, _, length, _ = x_BSTD.shape
    return x_BSTD.gather(-1, channels_Sr[None, :, None].expand(batch, -1, length, -1))
