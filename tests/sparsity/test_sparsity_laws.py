"""The laws of activation ratios, fitted on rows as the ledger has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from isoflop.core.errors import UserError
from isoflop.laws import fit
from isoflop.laws.table import column
from isoflop.ledger.schema import to_table

TRUE = {
    "relu": {"A0": 0.07, "exp_b": 0.35, "c": 6.0, "alpha": 0.45},
    "silu": {"A0": 0.42, "c": 0.004, "alpha": 0.5},
}
TOKENS = np.geomspace(2**14, 2**24, 16)


def ratio(act: str, billions: np.ndarray) -> np.ndarray:
    p = TRUE[act]
    if act == "relu":
        return p["A0"] + p["exp_b"] * np.exp(-p["c"] * billions ** p["alpha"])
    return p["A0"] - p["c"] * billions ** -p["alpha"]


def rows() -> pa.Table:
    made: list[dict[str, Any]] = []
    for act in TRUE:
        for tokens, active in zip(TOKENS, ratio(act, TOKENS / 1e9), strict=True):
            made.append(
                {
                    "model": f"tiny-lm/text-d64?act={act}&at=1",
                    "method": "sparsing-law",
                    "task": "bits-per-byte",
                    "error": 2.0,
                    "metrics": [("activation_ratio", active), ("nll", 3.0)],
                    "footprint": [("layers", 4.0), ("train_tokens", tokens), ("width", 64.0)],
                }
            )
    made.append({"model": "tiny-lm/other", "metrics": [("nll", 1.0)], "footprint": None})
    return to_table(made)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_fitter_recovers_planted_coefficients(act: str) -> None:
    found = fit(
        rows(),
        f"sparsing_{act}",
        y="metrics.activation_ratio",
        map={"D": "footprint.train_tokens/1e9"},
        where=f"model like '%act={act}%'",
        bootstrap=0,
        profile=False,
    )
    for name, value in TRUE[act].items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    assert found.r2 > 0.999999


PUBLISHED_RELU = {  # arXiv 2411.02335: alpha, b, c, A0
    "0.1B": (0.101, -0.0151, 3.20, 0.0614),
    "0.2B": (0.449, -3.05, 0.286, 0.0674),
    "0.4B": (0.683, -3.46, 0.0790, 0.0690),
    "0.8B": (1.01, -3.49, 0.00797, 0.0721),
    "1.2B": (1.33, -3.89, 9.03e-4, 0.0782),
    "2.4B": (2.11, -3.82, 9.04e-6, 0.0712),
}
PUBLISHED_SILU = {  # alpha, c, A0
    "0.1B": (0.479, 0.102, 0.409),
    "0.2B": (0.844, 0.208, 0.390),
    "0.4B": (1.03, 0.420, 0.385),
    "0.8B": (0.995, 0.562, 0.383),
    "1.2B": (0.967, 0.538, 0.382),
}
BILLIONS = np.geomspace(0.5, 500.0, 24)


@pytest.mark.parametrize("size", sorted(PUBLISHED_RELU))
def test_the_published_coefficients_of_relu_come_back_over_six_decades_of_c(size: str) -> None:
    alpha, b, c, floor = PUBLISHED_RELU[size]
    share = floor + np.exp(-c * BILLIONS**alpha + b)
    found = fit({"D": BILLIONS, "share": share}, "sparsing_relu", y="share", bootstrap=0, profile=False)
    fitted = (found["alpha"], np.log(found["exp_b"]), found["c"], found["A0"])
    assert fitted == pytest.approx((alpha, b, c, floor), rel=1e-3)


@pytest.mark.parametrize("size", sorted(PUBLISHED_SILU))
def test_the_published_coefficients_of_silu_come_back(size: str) -> None:
    alpha, c, floor = PUBLISHED_SILU[size]
    share = floor - c * BILLIONS**-alpha
    found = fit({"D": BILLIONS, "share": share}, "sparsing_silu", y="share", bootstrap=0, profile=False)
    assert (found["alpha"], found["c"], found["A0"]) == pytest.approx((alpha, c, floor), rel=1e-3)


def test_intervals_hold_the_truth_behind_noise() -> None:
    """Of the size of the paper's own residuals, whose mean square is 2.7e-7 for ReLU at 0.1B."""
    alpha, c, floor = PUBLISHED_SILU["0.1B"]
    share = floor - c * BILLIONS**-alpha + np.random.default_rng(2).normal(0.0, 5.2e-4, len(BILLIONS))
    found = fit({"D": BILLIONS, "share": share}, "sparsing_silu", y="share", bootstrap=100, profile=False)
    for name, value in {"alpha": alpha, "c": c, "A0": floor}.items():
        interval = found.params[name].interval
        assert interval is not None
        assert interval[0] < value < interval[1], name
        assert interval[1] - interval[0] < 0.5 * value, name


def test_the_trends_of_the_two_forms_are_opposite() -> None:
    assert (np.diff(ratio("relu", TOKENS / 1e9)) < 0).all()
    assert (np.diff(ratio("silu", TOKENS / 1e9)) > 0).all()


def test_the_bottleneck_of_width_over_depth_is_recovered() -> None:
    r = np.array([2.0, 8.0, 16.0, 32.0, 64.0, 96.0, 128.0, 256.0, 512.0])
    y = 0.05 + 6e-4 * np.minimum(r, 110.0)
    found = fit({"r": r, "A0": y}, "linear_flat", y="A0", bootstrap=0, profile=False)
    assert {k: found[k] for k in ("a", "b", "r0")} == pytest.approx({"a": 0.05, "b": 6e-4, "r0": 110.0}, rel=1e-4)


def test_entries_of_map_columns_are_columns() -> None:
    table = rows()
    tokens = column(table, "footprint.train_tokens", "y")
    assert tokens[: len(TOKENS)] == pytest.approx(TOKENS)
    assert np.isnan(tokens[-1])
    assert column(table, "footprint.width/footprint.layers", "y")[0] == 16.0
    with pytest.raises(
        UserError, match=r"y: unknown entry of metrics 'activation_ratios' \(did you mean 'activation_ratio'"
    ):
        column(table, "metrics.activation_ratios", "y")
    with pytest.raises(UserError, match=r"unknown column 'metrics.nll'"):
        column(pa.table({"a": [1.0]}), "metrics.nll", "y")
    dotted = pa.table({"metrics.nll": [2.0]})  # a column of that very name, as in a flat file
    assert column(dotted, "metrics.nll", "y").tolist() == [2.0]
    assert column(dotted, "metrics.nll*2", "y").tolist() == [4.0]
