"""Frontiers: the best configuration at a budget, from a law or from the raw rows."""

from isoflop.frontier.build import frontier
from isoflop.frontier.methods import MethodComparison, compare_methods, extra_compute
from isoflop.frontier.query import sql
from isoflop.frontier.rate_curves import RateCurve
from isoflop.frontier.rate_tables import RateCurves, rate_curves
from isoflop.frontier.raw import ParetoSet, best_under_budget, hypervolume, non_dominated, pareto
from isoflop.frontier.result import Choice, Frontier, FrontierPoint, Frontiers

__all__ = [
    "Choice",
    "Frontier",
    "FrontierPoint",
    "Frontiers",
    "MethodComparison",
    "ParetoSet",
    "RateCurve",
    "RateCurves",
    "best_under_budget",
    "compare_methods",
    "extra_compute",
    "frontier",
    "hypervolume",
    "non_dominated",
    "pareto",
    "rate_curves",
    "sql",
]
