"""Scaling laws on tables: forms, fitting, intervals, verdicts, comparison, extrapolation and design of runs."""

from isoflop.laws.base import LAWS, LawForm, Parameter, Variable, custom_form
from isoflop.laws.compared import Comparison
from isoflop.laws.comparison import compare
from isoflop.laws.engine import NotEstimable
from isoflop.laws.fitting import fit
from isoflop.laws.result import Estimate, Fit, GroupedFit
from isoflop.laws.sensitivity import sensitivity

__all__ = [
    "Comparison",
    "compare",
    "Estimate",
    "Fit",
    "GroupedFit",
    "LAWS",
    "LawForm",
    "NotEstimable",
    "Parameter",
    "Variable",
    "custom_form",
    "fit",
    "sensitivity",
]
