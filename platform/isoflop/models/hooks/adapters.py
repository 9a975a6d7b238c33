"""The hook ``adapters``: what is added to what matrices of the blocks give, whoever serves the matrices themselves."""

from __future__ import annotations

from isoflop.core.hook import Hook
from isoflop.models.hooks.occupant import Occupant

ADAPTERS: Hook[Occupant] = Hook("adapters", 2, "adds to the outputs of matrices of the blocks")
"""Its occupant taps the modules that hold the matrices (``at_work``); it tells what it keeps besides the model (``tensors``)."""
