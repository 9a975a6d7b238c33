"""Which heads retrieve: attention from a repeated token to its earlier copies (echo), and to what followed them (induction).

RazorAttention (arXiv 2407.15891, section 3.2). Needs no text: random tokens, repeated. Only the columns that count are taken out
of the attention, block of queries by block.

Shape suffixes: B batch, H query heads, G key-value heads, L layers, T tokens, N keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.kernels.blocks import queries_at_once
from isoflop.methods.calibration import OnModel
from isoflop.models.base import Model
from isoflop.models.decoder_model import decoder_model
from isoflop.models.hooks.attention import AttentionCall, causal_attention, replaced_attention


@dataclass(frozen=True)
class HeadScores:
    """Mean attention mass of each key-value head (its query heads' largest), float32.

    Attributes:
        echo_LG, induction_LG: by layer.
        layers: the numbers of the layers that have scores.
    """

    echo_LG: Tensor
    induction_LG: Tensor
    layers: tuple[int, ...]

    def retrieval(self, echo: float, induction: float) -> dict[int, Tensor]:
        """By layer, True at the heads among the given shares of all heads with the largest scores of either kind."""
        chosen_LG = torch.zeros_like(self.echo_LG, dtype=torch.bool)
        for scores_LG, share in ((self.echo_LG, echo), (self.induction_LG, induction)):
            chosen_LG |= best_heads(scores_LG, share)
        return dict(zip(self.layers, chosen_LG, strict=True))


def best_heads(scores_LG: Tensor, share: float) -> Tensor:
    """True at the share of all heads with the largest scores, (L, G); the nearest number, and of equal ones the first."""
    chosen_LG = torch.zeros_like(scores_LG, dtype=torch.bool)
    count = int(share * scores_LG.numel() + 0.5 + 1e-9)
    chosen_LG.view(-1)[scores_LG.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return chosen_LG


@dataclass(frozen=True)
class HeadsStage(OnModel):
    """The scores of a model's heads.

    Attributes:
        tokens: random tokens of one repeat, at most.
        repeats: of them.
    """

    kind: ClassVar[str] = "retrieval-heads"

    tokens: int
    repeats: int

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """One pass over random tokens."""
        from safetensors.torch import save_file

        with self.model(ctx) as model:
            found = head_scores(model, self.tokens, self.repeats, self.seed)
        layers = torch.tensor(found.layers)
        save_file(
            {"echo": found.echo_LG, "induction": found.induction_LG, "layers": layers}, folder / "heads.safetensors"
        )

    def load(self, ctx: StageContext, folder: Path) -> HeadScores:
        """The scores, on the CPU."""
        from safetensors.torch import load_file

        stored = load_file(folder / "heads.safetensors")
        return HeadScores(stored["echo"], stored["induction"], tuple(stored["layers"].tolist()))


@torch.no_grad()
def head_scores(model: Model, tokens: int, repeats: int, seed: int) -> HeadScores:
    """Scores over one pass of a first token and ``tokens`` random ones, ``repeats`` times; fewer where the model reads no more."""
    lm = decoder_model(model, "razor-attention")
    geometry = model.info.geometry
    tokens = min(tokens, (geometry.get("positions", 1 << 30) - 1) // repeats)
    generator = torch.Generator().manual_seed(derive_seed("retrieval heads", seed))
    ids_T = torch.randint(geometry["vocab_size"], (tokens + 1,), generator=generator)
    ids_1T = torch.cat((ids_T[:1], ids_T[1:].repeat(repeats)))[None].to(lm.device)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(call: AttentionCall) -> Tensor:
        if call.window is None:
            found[call.layer] = masses(call, tokens)
        return causal_attention(call)

    with replaced_attention(lm.decoder, attend):
        lm.decoder(input_ids=ids_1T, use_cache=False)
    layers = tuple(sorted(found))
    echo_LG, induction_LG = (torch.stack([found[layer][kind].cpu() for layer in layers]) for kind in (0, 1))
    return HeadScores(echo_LG, induction_LG, layers)


def masses(call: AttentionCall, period: int) -> tuple[Tensor, Tensor]:
    """Echo and induction scores of one layer's key-value heads, (G,) each, over a text of one token and a period's repeats.

    Of a query at place i behind the first repeat the copies of its token stand at i - m · period, down to 1, and what followed
    them one further on. Scores are means over those queries; a key-value head has the largest of its query heads.
    """
    batch, heads, length, _ = call.q_BHTD.shape
    groups, device = call.k_BGTD.shape[1], call.q_BHTD.device
    k_BHND = call.k_BGTD.repeat_interleave(heads // groups, dim=1).float()
    sums_KH = torch.zeros(2, heads, device=device)
    step = queries_at_once(device, batch * heads, length)
    for start in range(period + 1, length, step):
        rows_T = torch.arange(start, min(start + step, length), device=device)
        logits_BHTN = call.softmax.logits(call.q_BHTD[:, :, rows_T].float() @ k_BHND.transpose(-1, -2))
        later_TN = torch.arange(length, device=device) > rows_T[:, None]
        p_BHTN = call.softmax.weights(logits_BHTN.masked_fill_(later_TN, float("-inf")))
        back_TM = rows_T[:, None] - period * torch.arange(1, length // period + 1, device=device)
        for kind in (0, 1):
            places_TM = (back_TM + kind).clamp(min=0)
            mass_BHTM = p_BHTN.gather(-1, places_TM.expand(batch, heads, -1, -1))
            sums_KH[kind] += (mass_BHTM * (back_TM >= 1)).sum((0, 2, 3))
    means_KH = sums_KH / (batch * max(1, length - period - 1))
    echo_G, induction_G = means_KH.unflatten(1, (groups, -1)).amax(-1)
    return echo_G, induction_G


def stage_of(source: dict[str, Any], tokens: int, repeats: int) -> HeadsStage:
    """The stage for what ``OnModel.source`` gives; it looks at no examples."""
    return HeadsStage(**{**source, "examples": (), "text": None}, tokens=tokens, repeats=repeats)
