"""``tiny-lm/moe-<size>``: a mixture of experts of Mixtral's class, trained on prose, docstrings and code.

Routers learn with the auxiliary loss that balances them (equations 4 to 6 of arXiv 2101.03961, as transformers has it), so that
every expert is used, and the domains leave them something to specialise on. What is measured is held-out text of all domains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.hashing import content_hash, derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint, ModelInfo
from isoflop.models.hooks.experts import EXPERTS
from isoflop.models.lm import LmBatch, LmInfo
from isoflop.models.tiny.lm_config import EMBEDDING_STD, HEAD_WIDTH, LmSize, lm_fields
from isoflop.models.tiny.lm_training import LmRecipe, lm_groups, save_lm, text_lessons
from isoflop.models.training.loop import Keeper, draw_weights, fit
from isoflop.models.worlds.english import TextSource
from isoflop.models.worlds.lm_text import EnglishText, Tokens, TokensStage, TrainedTokenizer
from isoflop.models.worlds.text_domains import DOMAINS, DomainsStage

if TYPE_CHECKING:
    from transformers import MixtralForCausalLM

CALIBRATION_LENGTH = 128
CORPUS = (250, 50, 600, 0.0)
"""Pieces and their length are those of ``tiny-lm/mixed-…`` at its defaults, which share the corpus; only its texts are read."""
MOE_SIZES = {
    "d32": LmSize(32, 2, 32),
    "d64": LmSize(64, 4, 64),
    "d128": LmSize(128, 4, 128),
}
Fields = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class MoeRecipe(LmRecipe):
    """Next-token prediction on windows of text of all domains."""

    steps: Annotated[int, Knob(low=1, high=1_000_000, doc="optimiser steps")] = 600
    batch: Annotated[int, Knob(low=1, high=4096, doc="windows per step")] = 16
    context: Annotated[int, Knob(low=8, high=1024, doc="tokens of a window", unit="tokens")] = 128
    vocabulary: Annotated[int, Knob(low=300, high=20_000, doc="tokens of the tokenizer")] = 512
    experts: Annotated[int, Knob(low=2, high=64, doc="of each layer")] = 8
    active: Annotated[int, Knob(low=1, high=64, doc="experts that take a token")] = 2
    balance: Annotated[float, Knob(low=0.0, high=1.0, doc="weight of the auxiliary loss that balances the routers")] = 0.02  # fmt: skip


@dataclass(frozen=True)
class AllDomainsStage(TextSource):
    """Texts of all domains by split: ``train``, and ``test``, held out."""

    kind: ClassVar[str] = "all-text-domains"

    domains: DomainsStage

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Join the test texts."""
        found = ctx.get(self.domains)
        test = {name: text for domain in DOMAINS for name, text in found[f"test-{domain}"].items()}
        (folder / "documents.json").write_text(json.dumps({"train": found["train"], "test": test}))

    def load(self, ctx: StageContext, folder: Path) -> dict[str, dict[str, str]]:
        """Texts by split and document name."""
        loaded: dict[str, dict[str, str]] = json.loads((folder / "documents.json").read_text())
        return loaded


@dataclass(frozen=True)
class MoeStage(Stage):
    """A mixture trained on text, in ``save_pretrained`` form, with its tokenizer."""

    kind: ClassVar[str] = "moe-lm"

    size: str
    seed: int
    recipe: Fields
    tokens: TokensStage

    def deps(self) -> tuple[Stage, ...]:
        """The tokenised training split and the tokenizer."""
        return (self.tokens, self.tokens.tokenizer)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, save; ``training.json`` tells how far the use of the experts is from even."""
        started = time.process_time()
        recipe = MoeRecipe(**dict(self.recipe))
        module = untrained_moe(MOE_SIZES[self.size], recipe, self.seed)
        tokens: Tokens = ctx.get(self.tokens)
        lessons = text_lessons(tokens.ids_N, recipe, self.seed)
        losses = train_moe(module, recipe, lessons, Keeper(ctx.scratch(self)))
        ctx.get(self.tokens.tokenizer).save_pretrained(folder)
        figures = {"epochs": recipe.steps * recipe.batch * recipe.context / len(tokens.ids_N)}
        save_lm(folder, module, figures, losses, started)

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))


def untrained_moe(size: LmSize, recipe: MoeRecipe, seed: int) -> MixtralForCausalLM:
    """A Mixtral with initial weights drawn from ``seed``."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **lm_fields(size, recipe.vocabulary),
        num_local_experts=recipe.experts,
        num_experts_per_tok=recipe.active,
        router_aux_loss_coef=recipe.balance,
        sliding_window=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = MixtralForCausalLM(config)
    named, seed = module.model.named_parameters(), derive_seed("weights", seed)
    draw_weights(named, module.lm_head.weight, size.layers, EMBEDDING_STD, seed)
    return module


def train_moe(
    module: MixtralForCausalLM, recipe: MoeRecipe, lessons: Iterator[LmBatch], keeper: Keeper | None = None
) -> list[float]:
    """Train on every batch; returns the loss of every step, its auxiliary part included."""
    module.train()
    losses = fit(lm_groups(module, recipe), recipe, lessons, lambda batch: moe_loss(module, batch), keeper=keeper)
    module.eval()
    return losses


def moe_loss(module: MixtralForCausalLM, batch: LmBatch) -> Tensor:
    """Cross-entropy of the next token, and the auxiliary loss of the routers at the config's weight."""
    output = module(input_ids=batch.ids_BT, use_cache=False, output_router_logits=True)
    text = F.cross_entropy(output.logits.flatten(0, 1), batch.targets_BT.flatten())
    loss: Tensor = text + module.config.router_aux_loss_coef * output.aux_loss
    return loss


def moe_info(ref: str, family: str, size: str, hooks: frozenset[Hook[Any]], options: Fields) -> LmInfo:
    """Describe a member."""
    recipe = MoeRecipe(**dict(options))
    shape, train = MOE_SIZES[size], _tokens(recipe, "train")
    return LmInfo(
        ref=ref,
        family=family,
        version=content_hash({"stage": MoeStage.version, "tokens": train.key, "recipe": dict(options)}, 12),
        n_params=moe_params(shape, recipe.experts),
        hooks=hooks | {EXPERTS},
        offers=frozenset({"tokenizer"}),
        geometry={**shape.geometry(recipe.vocabulary), **_mixture(shape, recipe)},
        options=options,
        text=EnglishText(train, min(CALIBRATION_LENGTH, recipe.context)),
        tokenizer=train.tokenizer,
        test=_tokens(recipe, "test"),
    )


def moe_params(size: LmSize, experts: int) -> int:
    """Parameters of the decoder layers, all experts, routers and norms included."""
    return size.n_params + size.layers * ((experts - 1) * 3 * size.width * size.mlp + experts * size.width)


def moe_weights(info: ModelInfo, size: str, seed: int) -> MoeStage:
    """The stage of the training."""
    return MoeStage(size, seed, info.options, _tokens(MoeRecipe(**dict(info.options)), "train"))


def _mixture(size: LmSize, recipe: MoeRecipe) -> dict[str, Any]:
    """What differs from a decoder without experts: gate and up of one are a single matrix."""
    width, keys, layers = size.width, size.kv_heads * HEAD_WIDTH, size.layers
    experts = ((2 * size.mlp, width, layers * recipe.experts), (width, size.mlp, layers * recipe.experts))
    return {
        "matrices": ((width, width, 2 * layers), (keys, width, 2 * layers), *experts),
        "experts": recipe.experts,
        "experts_per_token": recipe.active,
        "expert_matrices": experts,
    }


def _tokens(recipe: MoeRecipe, split: str) -> TokensStage:
    corpus = AllDomainsStage(DomainsStage.here(*CORPUS))
    return TokensStage(corpus, TrainedTokenizer(corpus, recipe.vocabulary), split)
