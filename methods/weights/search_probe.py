"""The conformance suite's model for methods that search: that of all weight methods, on which searches are cut short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from isoflop.core.knobs import KnobValue
from isoflop.methods.base import Method
from isoflop.methods.weights.probe import WeightProbe
from isoflop.methods.weights.search_base import SearchMethod

GENERATIONS, OFFSPRING, CALIBRATION = 2, 4, 8
"""A search of the conformance suite, and its calibration examples; a method's many knobs ask for a hundred of them."""


class SearchProbe(WeightProbe):
    """Searches with at most ``GENERATIONS`` of ``OFFSPRING``; what levels stand for is computed once for each setting of its knobs."""

    def __init__(self, examples: int = 4, layers: int = 1) -> None:
        super().__init__(examples, layers)
        self._parts: dict[str, Any] = {}

    def prepared(self, method: Method, seed: int) -> Any:
        """What a short search finds."""
        if not isinstance(method, SearchMethod):
            return super().prepared(method, seed)
        limits = {"generations": GENERATIONS, "offspring": OFFSPRING, "n_calib": CALIBRATION}
        knobs = {name: value for name, value in method.knobs().items() if name in limits}
        short = replace(method, **{name: min(value, limits[name]) for name, value in knobs.items()})  # type: ignore[arg-type]
        key = f"{method.name} {short.knobs()} {seed}"
        if key not in self._calibrated:
            parts = f"{method.name} {short.parts_knobs()} {seed}"
            if parts not in self._parts:
                self._parts[parts] = short.compute_parts(self.model, self.ctx, seed)
            self._calibrated[key] = short.search(self.model, self.ctx, self._parts[parts], seed)
        return self._calibrated[key]

    def settings(self, knob: str) -> Sequence[Mapping[str, KnobValue]]:
        """Which matrices exchange bits shows, without a search's luck, in the exact allocation of a fraction of bits."""
        if knob != "exchange":
            return super().settings(knob)
        return [{"exchange": exchange, "allocation": "dp", "bits": 2.25} for exchange in ("size", "any")]

    def forget(self) -> None:
        """Search anew."""
        super().forget()
        self._parts.clear()
