"""Scores that are NaN choose nothing: every rule that sorts them refuses, so that no job ends "ok" on a random choice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from isoflop.methods.activation_sparsity.rules import top_of_each
from isoflop.methods.data_selection.select import Budget, select
from isoflop.methods.gradients.selection import exact_top
from isoflop.methods.kv_cache.select import select as select_tokens
from isoflop.methods.selection import sortable, top_places
from isoflop.methods.weights.rules import keep_pattern

NAN = float("nan")
RULES: dict[str, Callable[[Tensor], object]] = {
    "places": lambda s: top_places(s, 2),
    "tokens of a cache": lambda s: select_tokens(s[:, None], [2, 2]),
    "weights": lambda s: keep_pattern(s, (2, 4)),
    "neurons": lambda s: top_of_each(s, 2),
    "entries of gradients": lambda s: exact_top(s.ravel(), 3),
    "documents": lambda s: select(s.ravel().numpy(), np.ones(8, dtype=np.int64), Budget(fraction=0.5), "tokens"),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("share", [1, 8])
def test_no_rule_sorts_what_is_no_number(name: str, share: int) -> None:
    scores = torch.arange(8.0)
    RULES[name](scores.view(2, 4))
    scores[:share] = NAN
    with pytest.raises(
        (ArithmeticError, ValueError), match=f"{share} of 8 scores by which to choose are no numbers|not finite"
    ):
        RULES[name](scores.view(2, 4))


def test_infinities_and_whole_numbers_are_sorted_and_padding_may_be_anything() -> None:
    assert sortable(torch.tensor([float("inf"), -float("inf")])).numel() == 2
    assert sortable(torch.arange(3)).numel() == 3
    scores, real = torch.tensor([[[NAN, 1.0, 2.0]]]), torch.tensor([[[False, True, True]]])
    assert select_tokens(scores, [1], real).of_heads(3) is not None
