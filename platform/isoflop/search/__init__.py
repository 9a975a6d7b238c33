"""Search: proposes trials. The one room that knows Optuna; it knows neither Ray nor MLflow nor the ledger."""

from isoflop.search.proposer import Proposal, Proposer, Tell
from isoflop.search.pruners import make_pruner
from isoflop.search.space import Branch, Config, Param, SearchSpace, Zip, values_key
from isoflop.search.strategies import make_proposer
from isoflop.search.strategy import STRATEGIES, Aim, Problem, Shelf, Strategy

__all__ = [
    "STRATEGIES",
    "Aim",
    "Branch",
    "Config",
    "Param",
    "Problem",
    "Proposal",
    "Proposer",
    "Shelf",
    "SearchSpace",
    "Strategy",
    "Tell",
    "Zip",
    "make_proposer",
    "make_pruner",
    "values_key",
]
