"""isoflop: which compression, at which ratio, on which model size, gives the least error at a fixed inference budget?

``run`` a sweep, ``open`` its results, ``fit`` scaling laws on them, ask for the inference-optimal ``frontier``, ``plot`` any of these; ``answers`` needs no law.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from isoflop.core.result import draw_with
from isoflop.core.version import __version__

if TYPE_CHECKING:
    from isoflop.dashboards.plots import plot
    from isoflop.dashboards.session import run
    from isoflop.sweep.api import SweepResults, sql
    from isoflop.sweep.api import open_sweep as open
    from isoflop.sweep.tables import answers, compare, fit, pareto

# Resolved at first use, so that `import isoflop` costs nothing.
_LAZY = {
    "run": ("isoflop.dashboards.session", "run"),
    "open": ("isoflop.sweep.api", "open_sweep"),
    "SweepResults": ("isoflop.sweep.api", "SweepResults"),
    "fit": ("isoflop.sweep.tables", "fit"),
    "answers": ("isoflop.sweep.tables", "answers"),
    "compare": ("isoflop.sweep.tables", "compare"),
    "plot": ("isoflop.dashboards.plots", "plot"),
    "pareto": ("isoflop.sweep.tables", "pareto"),
    "sql": ("isoflop.sweep.api", "sql"),
}
__all__ = ["SweepResults", "__version__", "answers", "compare", "fit", "open", "pareto", "plot", "run", "sql"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'isoflop' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def _draw(found: Any) -> Any:
    return __getattr__("plot")(found)


draw_with(_draw)  # what results of any room become when they are asked to plot


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
