"""Where rows come from: files of every kind and every fault, sweeps by name, tables at hand; the same from Python and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from law_cases import product_table

import isoflop
from isoflop.core.errors import UserError
from isoflop.frontier import frontier
from isoflop.laws import compare, fit
from isoflop.laws.table import column, label_rows, of_group, where
from isoflop.sweep.tables import read_file

FAST = {"bootstrap": 0, "profile": False}


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return pa.table(product_table(0))


WRITERS = {
    "rows.csv": lambda t, p: t.to_pandas().to_csv(p, index=False),
    "rows.tsv": lambda t, p: t.to_pandas().to_csv(p, index=False, sep="\t"),
    "rows.txt": lambda t, p: t.to_pandas().to_csv(p, index=False),
    "rows.csv.gz": lambda t, p: t.to_pandas().to_csv(p, index=False),
    "rows.parquet": lambda t, p: pa.parquet.write_table(t, p),
    "rows.arrow": lambda t, p: pa.feather.write_feather(t, p),
    "rows.jsonl": lambda t, p: t.to_pandas().to_json(p, orient="records", lines=True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_takes_a_table_takes_a_file(name: str, rows: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](rows, path)
    wanted = fit(rows, **FAST)
    for source in (str(path), path):
        np.testing.assert_allclose(isoflop.fit(source, **FAST).p, wanted.p, rtol=1e-6)
    assert len(isoflop.pareto(str(path), {"N": "min", "error": "min"})) > 0
    assert isoflop.compare(str(path), "product")["product"].fit is not None
    assert isoflop.fit(table=str(path), **FAST).n == wanted.n


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no.csv", None, ["no.csv: no such file"]),
        ("empty.csv", b"", ["empty.csv: cannot be read", "Empty"]),
        ("semicolon.csv", b"N;V;error\n1;1;.5\n", ["separated by ';'", "--separator ';'"]),
        ("commas.tsv", b"N,V,error\n1,1,.5\n", ["separated by ','"]),
        ("tabs.csv", b"N\tV\terror\n1\t1\t.5\n", ["separated by '\\t'"]),
        ("ragged.csv", b"N,V,error\n1,1\n", ["ragged.csv: cannot be read", "Expected 3 columns, got 2"]),
        ("latin.csv", "N,V,größe\n1,1,2\n".encode("latin-1"), ["latin.csv: not UTF-8"]),
        ("twice.csv", b"N, N,error\n1,1,.5\n", ["twice.csv", "'N' occurs more than once"]),
        ("not.parquet", b"PAR1 nothing", ["not.parquet: cannot be read"]),
        ("not.arrow", b"nothing", ["not.arrow: cannot be read"]),
        ("not.json", b"{[", ["not.json: cannot be read"]),
        ("a" * 300 + ".csv", None, ["file name too long"]),
        ("zero\0byte.csv", None, ["no such file"]),
    ],
)
def test_a_file_that_is_no_table_is_named_in_one_line(
    name: str, content: bytes | None, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        isoflop.fit(str(path))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_separators_and_blanks_in_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(" N ; V;error \n1;2;.5\n")
    assert read_file(path, ";").column_names == ["N", "V", "error"]
    path.write_text("N, V ,error\n1, 2,.5\n")
    assert read_file(path).to_pylist() == [{"N": 1, "V": 2, "error": 0.5}]
    for separator in ("", ";;", "ä", '"', "\n"):
        with pytest.raises(UserError, match="separator"):
            read_file(path, separator)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["1", "2", "n/a", "4"], ["row 2", "'n/a'"]),
        (["1", None, "2,5"], ["row 2", "'2,5'", "comma"]),
        (["1", "2"], ["its numbers are text", "'1' in row 0"]),
        ([None, None], ["has no values"]),
        ([[1.0], [2.0]], ["list"]),
        ([{"a": 1}], ["struct"]),
        ([b"\xff"], ["binary"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["row 0", "'x'"]),
        (pd.to_datetime(["2026-01-01"]), ["timestamp"]),
        (["x" * 500], ["row 0", "…"]),
    ],
)
def test_a_column_without_numbers_says_which_row_and_value(values: object, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        column(pa.table({"c": values}), "c", "y")
    assert "y: column 'c'" in str(error.value)
    assert len(str(error.value)) < 200
    for word in words:
        assert word in str(error.value)


def test_numbers_of_every_type_are_numbers() -> None:
    big = 2**53 + 1
    for array in (
        pa.array([big, -big], pa.int64()),
        pa.array([2**64 - 1, 1], pa.uint64()),
        pa.array([10**30, 1], pa.decimal256(40)),
        pa.array([True, None]),
        pa.array([1, 2], pa.float16()) if hasattr(np, "float16") else pa.array([1.0]),
        pa.array([3, 4, 3]).dictionary_encode(),
    ):
        found = column(pa.table({"c": array}), "c", "y")
        np.testing.assert_allclose(found, [np.nan if v is None else float(v) for v in array.to_pylist()], rtol=1e-15)


LABELS: dict[str, pa.Array] = {
    "floats with NaN and null": pa.array([1.0, float("nan"), None, 1.0, float("nan")], from_pandas=False),
    "text": pa.array(["a", None, None, "a", None]),
    "dictionary": pa.array(["a", None, None, "a", None]).dictionary_encode(),
    "dates": pa.array(pd.to_datetime(["2026-01-01", None, None, "2026-01-01", None])),
    "whole numbers": pa.array([2**62, None, None, 2**62, None]),
    "booleans": pa.array([True, None, None, True, None]),
    "bytes": pa.array([b"\xff", None, None, b"\xff", None]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_rows_without_a_value_are_one_group(kind: str) -> None:
    table = pa.table({"g": LABELS[kind]})
    labels, keys = label_rows(table, ["g"], "by")
    assert labels.tolist() == [0, 1, 1, 0, 1]
    assert keys[1] == {"g": None}
    assert of_group(table, keys[1]).tolist() == [False, True, True, False, True]
    assert of_group(table, keys[0]).tolist() == [True, False, False, True, False]
    assert of_group(table, {"other": 1}).all()


def grouped(rows: pa.Table, missing: float | None) -> dict[str, list]:
    data = rows.to_pydict()
    return {
        **{k: v * 3 for k, v in data.items()},
        "lr": [0.1] * rows.num_rows + [missing] * rows.num_rows + [0.3] * rows.num_rows,
        "Q": [50.0] * rows.num_rows + [100.0] * rows.num_rows + [None] * rows.num_rows,
        "when": list(pd.date_range("2026-01-01", periods=3, freq="D").repeat(rows.num_rows)),
    }


@pytest.mark.parametrize("missing", [float("nan"), None])
def test_missing_labels_are_one_group_everywhere(missing: float | None, rows: pa.Table) -> None:
    table = grouped(rows, missing)
    for found in (fit(table, by="lr", **FAST), compare(table, "product", by="lr")):
        assert [f.key["lr"] for f in found] == [0.1, None, 0.3]
        assert '"lr": null' in json.dumps(found.to_dict())
        assert found.to_arrow().num_rows > 0
        assert "lr=None" in str(found)
    answers = frontier(pa.table(table), where="lr is null or lr = 0.1 or isnan(lr)", budget=1e12, by="lr", **FAST)
    assert [f.constants["Q"] for f in answers] == [50.0, 100.0]


def test_groups_of_dates_are_json(rows: pa.Table) -> None:
    found = fit(grouped(rows, None), by="when", **FAST)
    back = type(found).from_dict(json.loads(json.dumps(found.to_dict())))
    assert [f.key["when"][:10] for f in back] == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert found.to_arrow().num_rows > 0


def test_a_group_without_numbers_does_not_keep_the_others_from_a_fit(rows: pa.Table) -> None:
    table = grouped(rows, None)
    table["error"] = [float("nan") if lr is None else e for lr, e in zip(table["lr"], table["error"], strict=True)]
    for found in (fit(table, by="lr", **FAST), compare(table, "product", by="lr")):
        assert [f.key["lr"] for f in found] == [0.1, 0.3]
        (key, why), *_ = found.refused
        assert key == {"lr": None}
        assert "no finite rows" in why
        assert "refused" in str(found)


def test_clusters_without_a_name_are_left_out_and_said(rows: pa.Table) -> None:
    names = [None if i < 4 else f"run {i % 9}" for i in range(rows.num_rows)]
    found = fit({**rows.to_pydict(), "run": names}, cluster="run", bootstrap=50, profile=False)
    assert found.n == rows.num_rows - 4
    assert any("4 rows without a run" in w for w in found.warnings)


@pytest.mark.parametrize("option", ["by", "cluster"])
def test_a_list_names_no_group(option: str, rows: pa.Table) -> None:
    table = {**rows.to_pydict(), "g": [[1]] * rows.num_rows}
    with pytest.raises(UserError, match=f"{option}: column 'g' is of type list"):
        fit(table, **{option: "g"}, **FAST)


@pytest.mark.parametrize("name", ["seed", "bootstrap"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", True, None])
def test_counts_are_whole_numbers(name: str, value: object, rows: pa.Table) -> None:
    for function in (fit, compare):
        with pytest.raises(UserError, match=f"{name} = .*whole numbers from 0"):
            function(rows, **{name: value})


def test_text_that_is_no_utf8_is_refused(rows: pa.Table) -> None:
    for condition in ("N > \udcff", "\ud800"):
        with pytest.raises(UserError, match=r"where: .*not UTF-8"):
            where(rows, condition)
    with pytest.raises(UserError, match=r"sql: .*not UTF-8"):
        isoflop.sql("select '\udcff'", rows)


def test_a_cost_with_q_needs_a_q(rows: pa.Table) -> None:
    fitted = fit(rows, **FAST)
    for source in (rows, fitted):
        with pytest.raises(UserError, match=r"needs Q.*--q"):
            frontier(source, budget=1e12, **({} if source is fitted else FAST))
        assert frontier(source, q=0, budget=1e12, **({} if source is fitted else FAST))[0].budget == 1e12
        assert frontier(source, "2*N*V", budget=1e12, **({} if source is fitted else FAST))[0].budget == 1e12
    with_q = rows.append_column("Q", pa.array([30.0, 50.0] * (rows.num_rows // 2) + [40.0] * (rows.num_rows % 2)))
    assert frontier(with_q, budget=1e12, **FAST).constants["Q"] == pytest.approx(40)
    assert frontier(with_q, budget=1e12, q=7, **FAST).constants["Q"] == 7
    assert frontier(with_q, budget=1e12, where="Q > 40", **FAST).constants["Q"] == 50


def test_q_may_be_a_variable_of_the_law(rows: pa.Table) -> None:
    table = {**rows.to_pydict(), "Q": rows["V"].to_pylist()}
    found = frontier(table, "2*N*Q", budget=1e12, law="c*N**-a*Q**-b", map={"N": "N", "Q": "Q"}, **FAST)
    assert found.constants == {}
    assert found[0].continuous["Q"].value >= 1
