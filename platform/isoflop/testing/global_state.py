"""The random generators that everybody shares, which nobody may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

OWN = 71093
"""A seed that nobody else sets, so that setting one shows."""


@contextmanager
def random_state_untouched(what: str) -> Iterator[None]:
    """Raise AssertionError when the block draws from the global generators of torch, NumPy or Python, or seeds one."""
    kept = np.random.get_state(legacy=False), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(OWN)
        np.random.seed(OWN)
        random.seed(OWN)
        before = _states()
        try:
            yield
            after = _states()
        finally:
            np.random.set_state(kept[0])
            random.setstate(kept[1])
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"{what} touches the global random state of {', '.join(changed)}"


def _states() -> dict[str, bytes]:
    state = np.random.get_state(legacy=False)["state"]
    return {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "numpy": state["key"].tobytes() + bytes(str(state["pos"]), "ascii"),
        "random": repr(random.getstate()).encode(),
    }
