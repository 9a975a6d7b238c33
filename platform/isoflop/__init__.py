"""isoflop: which compression, at which ratio, on which model size, gives the least error at a fixed inference budget?"""

from __future__ import annotations

__version__ = "0.1.0"
