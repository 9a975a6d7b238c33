"""Frontiers: the best configuration at a budget, from a law or from the raw rows."""

from isoflop.frontier.build import frontier
from isoflop.frontier.result import Choice, Frontier, FrontierPoint, Frontiers

__all__ = ["Choice", "Frontier", "FrontierPoint", "Frontiers", "frontier"]
