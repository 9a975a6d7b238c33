"""The conformance suite's model for methods on the KV cache: an untrained decoder with grouped queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.core.knobs import KnobValue
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.methods.own_weights import Learner, trained
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.methods.untrained import untrained_llama
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.residual import RESIDUAL
from isoflop.models.lm import NOT_SCORED, LmBatch, LmInfo, LmModel
from isoflop.models.metering import meter
from isoflop.models.worlds.calibration import CalibrationText

VOCABULARY, PROMPT, TAIL = 48, 40, 8


@dataclass(frozen=True)
class RandomTokens(CalibrationText):
    """Uniform token ids, for models without weights worth calibrating on."""

    vocabulary: int
    length: int

    def batches(self, ctx: StageContext, examples: int, seed: int) -> Iterator[Tensor]:
        """One batch."""
        rng = np.random.default_rng(seed)
        yield torch.from_numpy(rng.integers(0, self.vocabulary, (examples, self.length)))


class Spelling:
    """A tokenizer that has a token for each letter."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        return [ord(letter) % VOCABULARY for letter in text]


def untrained_decoder(seed: int = 0, layers: int = 2, spells: bool = False) -> LmModel:
    """A Llama with 4 query heads on 2 key-value heads, width 64, and weights large enough to attend unevenly."""
    module, n_params, geometry = untrained_llama(
        VOCABULARY, width=64, mlp=96, layers=layers, heads=4, kv_heads=2, positions=256, spread=0.15, seed=seed
    )
    info = LmInfo(
        ref="probe/llama",
        family="probe",
        version="1",
        n_params=n_params,
        hooks=frozenset({ATTENTION, MATRICES, RESIDUAL}),
        geometry=geometry,
        text=RandomTokens(VOCABULARY, PROMPT + TAIL),
        vocabulary="probe",
    )  # fmt: skip
    return LmModel(info, module, Spelling if spells else None)


class KvCacheProbe(Probe):
    """Logits behind a compressed prompt; the cost is what a method's ratio knob is there to change.

    Args:
        cost: ``stored`` bytes of the compressed prompt, or ``read`` bytes of one step.
        layers: of the decoder.
        tried: settings in which a knob shows what it does, where none shows by itself; see ``Probe.settings``.
        spells: the decoder has a tokenizer.
    """

    def __init__(
        self,
        cost: str = "stored",
        examples: int = 4,
        layers: int = 2,
        tried: Mapping[str, Sequence[Mapping[str, KnobValue]]] | None = None,
        spells: bool = False,
    ) -> None:
        self._tried = tried or {}
        self.model: LmModel = untrained_decoder(layers=layers, spells=spells)
        self.ctx = FolderContext.temporary()
        self.examples = examples
        self.exact = False
        self._cost = cost
        rng = np.random.default_rng(1)
        self._ids = torch.from_numpy(rng.integers(0, VOCABULARY, (examples, PROMPT + TAIL)))

    def settings(self, knob: str) -> Sequence[Mapping[str, KnobValue]]:
        """Those given, else any."""
        return self._tried.get(knob) or super().settings(knob)

    def prepared(self, method: Method, seed: int) -> Any:
        """The value of the method's own calibration on this model; weights of its own as they are drawn."""
        if isinstance(method, Learner):
            return method.untrained(self.model.info, seed)
        return method.calibrate(self.model, self.ctx, seed) if hasattr(method, "calibrate") else None

    def trained(self, method: Method, prepared: Any) -> Any:
        """Of methods with weights of their own, how they are trained, and where the first steps lead if texts are long enough to learn from."""
        if not isinstance(method, Learner):
            return None
        recipe = method.learning_rate, method.schedule.steps, method.examples
        few: dict[str, Any] = {"steps": min(3, method.schedule.steps)}
        begun: Learner = replace(method, **few)
        try:
            bare = untrained_decoder(layers=self.model.info.geometry["layers"])  # nothing is in its places
            module, losses = trained(begun, bare, self.ctx, 0)
        except (Infeasible, ValueError):
            return recipe
        return *recipe, losses, dict(module.named_parameters())

    def absolute(self) -> Sequence[AbsoluteCost]:
        """Of 2 layers that keep 40 tokens (of 4: twice that): keys and values of 2 heads, 16 wide, at 2 bytes: 2·2·2·16·2 = 256 bytes
        a token.

        Whole: 40·256. Half of the tokens: 20·256. At 4 bits with grids over 32 values, per layer: codes 2·2·40·16/2; keys
        one grid per channel and 32 tokens, 2·16·2 of them; values one per token, 2·40; 4 bytes a grid.

        Read by a step behind 48 tokens, of 4 layers (512 bytes a token): whole, and labels of 2 channels in the 2 layers
        that are not dense, 2·2·48·2·2; or 12 tokens of each head and labels in all layers.
        """
        from isoflop.methods.base import build

        if self._cost == "read":
            head = {"select_per": "kv-head", "dense_layers": 0}
            return (
                AbsoluteCost(build("double-sparsity", {"k_share": 1.0}), "cost", 48 * 512 + 2 * 2 * 48 * 2 * 2),
                AbsoluteCost(
                    build("double-sparsity", {"k_share": 0.25, **head}), "cost", 12 * 512 + 4 * 2 * 48 * 2 * 2
                ),
            )
        pairs = self.model.info.geometry["layers"] / 2
        packed = pairs * 2 * (2 * 2 * 40 * 16 / 2 + 4 * (2 * 16 * 2) + 4 * (2 * 40))
        return (
            AbsoluteCost(build("full-cache", {}), "cost", pairs * 40 * 256),
            AbsoluteCost(build("kv-random", {"keep": 0.5}), "kv_prompt_bytes", pairs * 20 * 256),
            AbsoluteCost(build("kv-rtn", {"bits": 4}), "kv_prompt_bytes", packed),
        )

    def batch(self, rows: Sequence[int]) -> LmBatch:
        """Some examples."""
        ids_BT = self._ids[list(rows)]
        return LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED), PROMPT)

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits of the tail, (B, tail · vocabulary)."""
        return self.model.logits(self.batch(rows))[:, PROMPT:].flatten(1)

    @torch.no_grad()
    def cost(self) -> float:
        """Bytes of the prompt's cache per example, or bytes read by a step."""
        from isoflop.methods.base import build
        from isoflop.methods.kv_cache.base import KvCacheMethod

        bare = nullcontext()
        if self.model.occupant(ATTENTION) is None:
            dense = build("full-cache", {})
            assert isinstance(dense, KvCacheMethod)
            bare = dense.apply(self.model, None)  # type: ignore[assignment]
        with bare, meter(self.model) as reading:
            self.outputs([0])
        assert reading.cache is not None
        return reading.cache.prompt_stored if self._cost == "stored" else reading.cache.read
