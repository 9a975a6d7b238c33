"""Paired comparison of numbers that rows hold once: metrics and costs, with an interval over repeats."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from isoflop.core.errors import UserError
from isoflop.frontier.paired import paired
from isoflop.ledger.schema import to_table

SIDES = "method = 'late'", "method = 'early'"


def rows(gaps: dict[int, list[float]], side: str = "metrics") -> pa.Table:
    """A pair of rows for each gap of a repeat: ``share`` is 0.3 early and lower by the gap late; errors say the opposite."""
    found = []
    for repeat, values in gaps.items():
        for budget, gap in enumerate(values):
            for name, share, error in (("early", 0.3, 1.0), ("late", 0.3 - gap, 2.0)):
                found.append(
                    {
                        "job_id": f"{name}{repeat}{budget}",
                        "model": "m",
                        "task": "t",
                        "method": name,
                        "knobs": f'{{"budget": {budget}}}',
                        "repeat": repeat,
                        "status": "ok",
                        "error": error,
                        "scores": [error] * 50,
                        side: [("share", share)],
                    }
                )
    return to_table(found)


@pytest.mark.parametrize("side", ["metrics", "footprint"])
def test_a_column_is_compared_instead_of_the_error(side: str) -> None:
    table = rows({0: [0.05, 0.07], 1: [0.06, 0.06], 2: [0.055, 0.075]}, side)
    share = paired(table, *SIDES, ["budget"], y="share")
    assert (share.verdict, share.pairs, share.repeats) == ("better", 6, 3)
    assert share.a == pytest.approx(0.3 - 0.37 / 6)
    assert share.b == pytest.approx(0.3)
    assert share.difference == pytest.approx(share.a - share.b)
    assert [cell["difference"] for cell in share.cells] == pytest.approx([-0.055, -0.205 / 3])
    assert paired(table, *SIDES, ["budget"]).verdict == "worse"  # the errors', from the same rows


def test_the_interval_is_students_over_the_repeats_not_over_rows_or_examples() -> None:
    gaps = {0: [0.01, 0.03], 1: [0.05, 0.05], 2: [0.02, 0.04]}
    found = paired(rows(gaps), *SIDES, ["budget"], y="share")
    known = stats.ttest_1samp([-np.mean(values) for values in gaps.values()], 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    assert found.verdict == "not separated"  # though every single pair agrees


def test_repeats_weigh_by_their_pairs() -> None:
    found = paired(rows({0: [0.1, 0.1, 0.1], 1: [0.2]}), *SIDES, ["budget"], y="share")
    assert found.difference == pytest.approx(-0.125)
    assert found.low < -0.125 < found.high
    constant = paired(rows({0: [0.1, 0.1, 0.1], 1: [0.1]}), *SIDES, ["budget"], y="share")
    assert (constant.low, constant.high) == pytest.approx((-0.1, -0.1))


def test_a_single_repeat_separates_nothing() -> None:
    found = paired(rows({0: [0.1, 0.1, 0.1]}), *SIDES, ["budget"], y="share")
    assert (found.low, found.high, found.verdict) == (-math.inf, math.inf, "not separated")


def test_what_is_no_number_of_the_rows_is_told() -> None:
    with pytest.raises(UserError, match="no column 'shares'"):
        paired(rows({0: [0.1]}), *SIDES, ["budget"], y="shares")
    with pytest.raises(UserError, match=r"y = 'model' is 'm' in job late00; allowed: .* that is a number"):
        paired(rows({0: [0.1]}), *SIDES, ["budget"], y="model")
