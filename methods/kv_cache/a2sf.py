"""A2SF: accumulated attention with a forgetting factor (arXiv 2407.20485)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.accumulated import Accumulated
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore


@METHODS.register("a2sf")
@dataclass(frozen=True)
class A2SF(Accumulated):
    """Scores forget exponentially, so that early tokens have no head start from having been seen by more queries.

    S_n[j] = sum over queries q from j to n of alpha^(n-q) A[q, j], added up over a key-value head's query heads. The budget
    holds the newest tokens, and the highest scores of the others. alpha = 1 is H2O; alpha = 0 knows the last query only.

    ``prompt: exact`` scores a prompt that was read in full, once (released code); ``sequential`` is the paper's
    evaluation: from the moment the budget is full, each token of the prompt evicts one, and attention is normalised over the
    survivors. The paper's window of a fixed length is a share of the budget here, half of it as in H2O.
    """

    paper: ClassVar[str] = "arXiv 2407.20485"

    alpha: Annotated[float, Knob(low=0.0, high=1.0, doc="what is left of a score after one more query")] = 0.95
    recent: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the budget for the newest tokens")] = 0.5
    sinks: Annotated[int, Knob(low=0, high=64, unit="tokens", doc="first tokens that always stay")] = 0
    scope: Annotated[str, Knob(choices=("head", "layer"), doc="whether each head or each layer chooses its tokens")] = (
        "head"
    )
    prompt: Annotated[
        str, Knob(choices=("exact", "sequential"), doc="evict after the prompt was read, or while it is read")
    ] = "exact"

    @property
    def forgets(self) -> float:
        """The knob ``alpha``."""
        return self.alpha

    @property
    def per_layer(self) -> bool:
        """The knob ``scope``."""
        return self.scope == "layer"

    @property
    def protects(self) -> tuple[int, float]:
        """The knobs ``sinks`` and ``recent``."""
        return self.sinks, self.recent

    @property
    def exact_prompt(self) -> bool:
        """Not where the prompt itself is read under the budget."""
        return self.prompt == "exact"

    def prefill(self, prompt: AttentionCall, prepared: Any) -> tuple[Tensor, LayerStore]:
        """Exact attention and one eviction, or token by token under the budget."""
        return super().prefill(prompt, prepared) if self.prompt == "exact" else self.sequential(prompt)
