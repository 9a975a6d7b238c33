"""Search: proposes trials. The one room that knows Optuna; it knows neither Ray nor MLflow nor the ledger."""

from isoflop.search.proposer import Proposal, Proposer, Tell, make_proposer, make_pruner, make_sampler
from isoflop.search.space import Branch, Config, Param, Space, Zip, values_key

__all__ = [
    "Branch",
    "Config",
    "Param",
    "Proposal",
    "Proposer",
    "Space",
    "Tell",
    "Zip",
    "make_proposer",
    "make_pruner",
    "make_sampler",
    "values_key",
]
