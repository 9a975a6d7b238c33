"""The catalogue of laws: one registry entry per form, each written as one formula."""

from isoflop.laws.forms import broken, classic, compression, data, downstream

__all__ = ["broken", "classic", "compression", "data", "downstream"]
