"""Whatever is wrong with the input gives one clear line, or a clear verdict; never a silent number."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from law_cases import additive_table, published

from isoflop.core.errors import UserError
from isoflop.core.expressions import Program, parse
from isoflop.frontier import frontier
from isoflop.laws import custom_form, fit
from isoflop.laws.inference import _nearest_bound
from isoflop.laws.table import query, where

MAP = {"N": "params_b", "V": "visual_tokens"}


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"y": "eror"}, ["y: unknown column 'eror'", "did you mean 'error'"]),
        ({"map": {"N": "params", "V": "visual_tokens"}}, ["map N: unknown column 'params'", "did you mean 'params_b'"]),
        ({"map": {**MAP, "W": "params_b"}}, ["unknown variable of law 'product' 'W'", "allowed: N, V"]),
        ({"law": "prodct"}, ["unknown law 'prodct'", "did you mean 'product'"]),
        ({"objective": "hubr"}, ["unknown objective 'hubr'", "did you mean 'huber'"]),
        ({"delta": 0.0, "objective": "huber"}, ["delta = 0.0 must be a positive number"]),
        ({"level": 95}, ["level = 95 must lie between 0 and 1"]),
        ({"bounds": {"gamma": (0, 1)}}, ["unknown parameter of law 'product' 'gamma'"]),
        ({"bounds": {"alpha": (1, 0)}}, ["bounds of alpha", "is empty"]),
        ({"fixed": {"alfa": 1}}, ["unknown parameter of law 'product' 'alfa'", "did you mean 'alpha'"]),
        ({"by": "tsk"}, ["by: unknown column 'tsk'"]),
        ({"weights": "w"}, ["weights: unknown column 'w'"]),
        ({"where": "params_b > 100"}, ["no rows to fit after where 'params_b > 100'"]),
        ({"where": "nonsense("}, ["where:"]),
        ({"where": "nosuch > 1"}, ["where:", "nosuch"]),
        ({"where": "1=1; copy results to '/tmp/x.csv'"}, ["where:"]),
        ({"scheme": "jackknife", "bootstrap": 10}, ["unknown bootstrap scheme 'jackknife'"]),
        ({"scheme": "cluster", "bootstrap": 10}, ["needs cluster=<column>"]),
        ({"law": "E + f(N)"}, ["unknown function in 'E + f(N)' 'f'"]),
        ({"law": "E + N.real"}, ["'N.real' is not allowed"]),
        ({"law": "E + __import__('os').system('x')"}, ["not allowed"]),
        ({"law": "E + A*(N"}, ["is not an expression"]),
        ({"law": "N*V"}, ["has no parameters to fit"]),
        ({"law": "A + B*X"}, ["contains none of the variables"]),
        ({"map": {"N": "params_b*1e9 +", "V": "visual_tokens"}}, ["map N", "is not an expression"]),
        ({"map": {"N": "3", "V": "visual_tokens"}}, ["names no column"]),
        (
            {"map": {"N": "-params_b", "V": "visual_tokens"}},
            ["map N: '-params_b' is -0.5 in row 0; a size must be > 0"],
        ),
        ({"map": {"N": "params_b-0.5", "V": "visual_tokens"}}, ["a size must be > 0"]),
        ({"y": "error-0.6", "objective": "huber-log"}, ["a log objective needs y > 0"]),
    ],
)
def test_one_line_says_what_is_wrong(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        fit(published(), **{"map": MAP, "bootstrap": 0, **options})
    text = one_line(error)
    for word in words:
        assert word in text, text


def test_duplicate_and_textual_columns_are_refused() -> None:
    twice = pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0])], names=["error", "error"])
    with pytest.raises(UserError, match="'error' occurs more than once"):
        fit(twice)
    with pytest.raises(UserError, match="column 'error' is of type string"):
        fit({"error": ["a", "b"], "N": [1.0, 2.0], "V": [1.0, 2.0]})
    with pytest.raises(UserError, match="allowed: Arrow table"):
        fit(42)


def test_missing_values_are_left_out_and_said() -> None:
    table = additive_table(0, 60)
    table["loss"] = table["loss"].copy()
    table["loss"][:3] = np.nan
    fitted = fit(table, "chinchilla", y="loss", bootstrap=0)
    assert fitted.n == 57
    assert "left out: 3 rows not finite" in fitted.warnings
    assert fitted.record["data"]["dropped"] == {"not finite": 3}
    with pytest.raises(UserError, match="no finite rows"):
        fit({**table, "loss": np.full(60, np.nan)}, "chinchilla", y="loss")


def test_pandas_dicts_and_arrow_give_the_same_fit() -> None:
    table = additive_table(0, 60)
    fits = [
        fit(t, "chinchilla", y="loss", bootstrap=0, profile=False)
        for t in (table, pd.DataFrame(table), pa.table(table))
    ]
    assert len({f.data_hash for f in fits}) == 1
    np.testing.assert_array_equal(fits[0].p, fits[1].p)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": 1e9}, "below the cheapest configuration at hand, which costs 5.1e+10"),
        ({"budget": math.nan}, "below the cheapest"),
        ({"cost": "2*M*(Q+V)"}, "name in cost 'M'"),
        ({"cost": "Q*2"}, "contains no variable of the law"),
        ({"cost": "open('x')"}, "unknown function"),
        ({"q": -1}, "q = -1; allowed"),
        ({"q": math.nan}, "q = nan; allowed"),
        ({"q": None}, "needs Q"),
        ({"limits": {"V": (10, 1)}}, "limits of V"),
        ({"limits": {"W": (1, 10)}}, "unknown variable of law 'product' 'W'"),
        ({"sizes": []}, "menu of N"),
        ({"tokens": []}, "menu of V"),
        ({"tokens": [4, math.inf]}, "menu of V"),
        ({"sizes": [math.nan]}, "menu of N"),
    ],
)
def test_frontier_refuses_in_one_line(options: dict, words: str) -> None:
    fitted = fit(published(), map={"N": "params_b*1e9", "V": "visual_tokens"}, bootstrap=0, profile=False)
    with pytest.raises(UserError) as error:
        frontier(fitted, **{"q": 50, "budget": 1e12, **options})
    assert words in one_line(error)


def test_parameters_with_few_digits_are_flagged_at_the_optimum() -> None:
    from isoflop.laws import Fit

    fitted = fit(published(), map={"N": "params_b*1e9", "V": "visual_tokens"}, bootstrap=0, profile=False)
    data = fitted.to_dict()
    for name, digits in (("alpha", 3), ("beta", 3), ("A", 3)):
        data["params"][name]["value"] = round(data["params"][name]["value"], digits)
    point = frontier(Fit.from_dict(json.loads(json.dumps(data))), q=50, budget=1e12)[0]
    assert any("look rounded" in note for note in point.notes)
    assert not any("look rounded" in note for note in frontier(fitted, q=50, budget=1e12)[0].notes)


def test_expressions_evaluate_and_differentiate() -> None:
    x = np.linspace(0.3, 2, 7)
    for text, value in {
        "2*x**2 - 3": 2 * x**2 - 3,
        "x**-0.5": x**-0.5,
        "exp(-x)/log(1+x)": np.exp(-x) / np.log1p(x),
        "min(x, 1) + max(x, 1)": x + 1,
        "abs(x-1)": np.abs(x - 1),
        "softplus(x) - x": np.log1p(np.exp(-x)),
        "sigmoid(x)": 1 / (1 + np.exp(-x)),
        "sqrt(x) + expm1(x)": np.sqrt(x) + np.expm1(x),
        "+x - -x": 2 * x,
        "a**x": 1.7**x,
    }.items():
        parsed = parse(text)
        np.testing.assert_allclose(parsed({"x": x, "a": 1.7}), value, rtol=1e-13)
        h = 1e-6
        numeric = (parsed({"x": x + h, "a": 1.7}) - parsed({"x": x - h, "a": 1.7})) / (2 * h)
        smooth = np.abs(x - 1) > 1e-3
        np.testing.assert_allclose(
            np.broadcast_to(parsed.derivative("x")({"x": x, "a": 1.7}), x.shape)[smooth], numeric[smooth], rtol=1e-7
        )


def test_equal_subexpressions_are_computed_once() -> None:
    parsed = parse("A*N**-a + B*N**-a")
    program = Program(parsed.graph, [parsed.root, parsed.graph.diff(parsed.root, "a")])
    assert sum(parsed.graph.nodes[i][0] == "exp" for i in program.order) == 1


@pytest.mark.parametrize(
    "text",
    [
        "x" * 5000,
        "(" * 900 + "x" + ")" * 900,
        "1 if x else 2",
        "[x]",
        "x and y",
        "x == y",
        "'a'",
        "lambda: x",
        "x := 2",
        "{x}",
        "min(*x)",
        "exp(x=1)",
        "1j*x",
        "",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text)
    one_line(error)


def test_custom_forms_find_their_linear_parameters() -> None:
    form = custom_form("E + A*N**-alpha + B*D**-beta", ["N", "D"])
    assert [form.names[i] for i in form.linear] == ["E", "A", "B"]
    product = custom_form("c*d*N", ["N"])
    assert len(product.linear) == 1


def test_a_narrow_design_gives_the_verdict_not_a_number() -> None:
    rng = np.random.default_rng(0)
    n, v = (a.ravel() for a in np.meshgrid([1.0e9, 1.02e9, 1.04e9], [1.0, 16, 144, 576]))
    table = {"N": n, "V": v, "error": 0.6 * (n / 1e9) ** -0.1 * v**-0.1 + 0.01 * rng.standard_normal(12)}
    fitted = fit(table, bootstrap=200, scheme="parametric")
    assert fitted.params["alpha"].identified is False
    assert fitted.params["beta"].identified is True
    assert fitted.derived["alpha/beta"].identified is False
    assert any("N spans only a factor of 1.04" in w for w in fitted.warnings)
    assert "unidentified" in next(line for line in str(fitted).splitlines() if line.startswith("alpha "))


def test_many_rows_are_fitted_without_many_copies() -> None:
    table = additive_table(0, 60_000)
    fitted = fit(table, "chinchilla", y="loss", objective="squared-log", bootstrap=0, profile=False)
    assert fitted["alpha"] == pytest.approx(0.35, rel=0.02)
    assert fitted["beta"] == pytest.approx(0.365, rel=0.02)


@pytest.mark.parametrize(
    "condition",
    [
        "1=1 union all select * from results",
        "1=1) union all select * from results where (1=1",
        "1=0; select * from results",
        "1=1, 2=2",
        "V > 1 limit 3",
        "--",
    ],
)
def test_a_condition_can_only_choose_rows(condition: str) -> None:
    with pytest.raises(UserError, match="where: ") as error:
        where(pa.table({"V": [1.0, 2.0]}), condition)
    one_line(error)


def test_a_condition_may_hold_subqueries_and_comments() -> None:
    table = pa.table({"V": [1.0, 2.0, 6.0]})
    assert where(table, "V > (select avg(results.V) from results)").num_rows == 1
    assert where(table, "results.V < 3 -- small").num_rows == 2


@pytest.mark.parametrize("text", ["", "  ", "-- nothing", "select 1; select 2", "set threads = 1"])
def test_a_query_is_one_statement_that_returns_rows(text: str) -> None:
    with pytest.raises(UserError, match="sql: "):
        query(text, pa.table({"V": [1.0]}))


def test_the_verdict_names_the_bound_itself() -> None:
    fitted = fit(published(), map=MAP, bounds={"E": (0.02, 1.0)}, bootstrap=0)
    assert "on its bound 0.02;" in fitted.params["E"].verdict
    assert _nearest_bound(fitted.box, 0, 0.02 + 1e-13) == 0.02
