"""The claims that the outcomes page tests: well-formed, about rows that their sweeps have, judged as they say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from fetched_cases import stand_ins

from isoflop.core.errors import UserError
from isoflop.dashboards.outcomes import RECORD, Claim, Record, judge, load_claims, page
from isoflop.dashboards.outcomes.record import PERCENTILE
from isoflop.frontier.composition import compose
from isoflop.frontier.paired import Paired
from isoflop.jobs import Job
from isoflop.ledger.schema import to_table
from isoflop.methods.base import METHODS

SWEEPS = Path(__file__).parents[2] / "sweeps"


def test_every_claim_names_a_sweep_and_a_method_that_exist() -> None:
    claims = load_claims()
    assert claims
    for claim in claims:
        assert (SWEEPS / f"{claim.sweep}.yaml").is_file(), claim.sweep
        assert claim.method in METHODS.names()


@pytest.mark.parametrize("sweep", sorted({c.sweep for c in load_claims()}))
def test_both_sides_of_every_claim_select_jobs_of_the_sweep(
    sweep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rows made of the sweep's own jobs, so that a misspelt knob or an excluded value is found without running it."""
    if "public:" in (SWEEPS / f"{sweep}.yaml").read_text():
        monkeypatch.setenv("ISOFLOP_CACHE", str(tmp_path))
        stand_ins()
    from isoflop.frontier import sql
    from isoflop.jobs.runner import Outcome
    from isoflop.sweep.resolve import resolve
    from isoflop.sweep.rows import make_row

    resolved = resolve(SWEEPS / f"{sweep}.yaml")
    jobs: list[Job] = [job for config in resolved.space.grid() for job in resolved.jobs_of(config)]
    table = to_table([make_row(sweep, 0, job, Outcome("ok"), 1) for job in jobs])
    for claim in (c for c in load_claims() if c.sweep == sweep):
        for side in (claim.a, claim.b):
            assert sql(f"SELECT job_id FROM results WHERE {side}", table).num_rows, (
                f"{claim.claim}: no job where {side}"
            )


@pytest.mark.parametrize(
    ("expect", "low", "high", "outcome"),
    [
        ("better", -0.2, -0.1, "shows"),
        ("better", -0.2, 0.1, "not separated"),
        ("better", 0.1, 0.2, "reversed"),
        ("worse", 0.1, 0.2, "shows"),
        ("equal", -0.1, 0.01, "shows"),
        ("equal", -0.1, 0.03, "not separated"),
        ("equal", 0.03, 0.05, "reversed"),
    ],
)
def test_outcomes_follow_the_interval(expect: str, low: float, high: float, outcome: str) -> None:
    claim = Claim("m", "p", "s", "c", "a", "b", expect=expect, margin=0.02)
    assert claim.shows(Paired(0.1, 0.2, (low + high) / 2, low, high, 3, 3, [])) == outcome


def _numbers(low: float, high: float) -> Paired:
    middle = (low + high) / 2 if math.isfinite(low + high) else -0.1
    return Paired(0.1, 0.2, middle, low, high, 3, 3, [{"task": "t", "a": 0.1, "b": 0.2, "difference": -0.1}])


def test_the_page_holds_every_claim_with_its_numbers() -> None:
    rows = [
        {"job_id": m + str(r), "model": "x", "task": "t", "method": m, "repeat": r, "status": "ok", "error": e, "scores": [e, e + 0.1]}
        for r in range(2)
        for m, e in (("new", 0.1), ("old", 0.3 + r * 0.002))
    ]  # fmt: skip
    claim = Claim("new", "arXiv 1", "s", "new beats old", "method = 'new'", "method = 'old'")
    record = Record(judge([claim], lambda name: to_table(rows)))
    assert claim.shows(record.numbers[claim.test]) == "shows"
    shown = page([claim], record)
    assert "| new beats old | **shows** | 0.1000 | 0.3010 | -0.2010 [-0.2137, -0.1883] | 2 in 2 repeats | s |" in shown


def test_a_claim_about_another_column_is_judged_on_it_and_says_so() -> None:
    rows = [
        {"job_id": m + str(r), "model": "x", "task": "t", "method": m, "repeat": r, "status": "ok", "error": 1.0, "scores": [1.0],
         "metrics": [("share", s + 0.01 * r)]}
        for r in range(3)
        for m, s in (("new", 0.1), ("old", 0.3))
    ]  # fmt: skip
    claim = Claim("new", "arXiv 1", "s", "new has less", "method = 'new'", "method = 'old'", y="share")
    record = Record(judge([claim], lambda name: to_table(rows)))
    row = "| new has less (compared: share) | **shows** | 0.1100 | 0.3100 | -0.2000 [-0.2000, -0.2000] | 3 in 3 repeats | s |"
    assert row in page([claim], record)
    assert "| new has less (compared: share) | not judged |" in page([claim], Record())


def test_a_claim_of_one_repeat_is_judged_over_examples_and_says_so() -> None:
    rows = [
        {"job_id": f"{m}-{t}", "model": "x", "task": t, "method": m, "repeat": 0, "status": "ok", "error": 0.5,
         "scores": [e] * n}
        for t, n in (("one", 30), ("two", 20))
        for m, e in (("new", 0.0), ("old", 1.0))
    ]  # fmt: skip
    claim = Claim("new", "arXiv 1", "s", "new beats old", "method = 'new'", "method = 'old'")
    record = Record(judge([claim], lambda name: to_table(rows)))
    assert claim.shows(record.numbers[claim.test]) == "shows"
    assert "] | 2, over 50 examples | s |" in page([claim], record)


def test_claims_of_a_section_stand_together_whatever_their_method(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text(
        "title: A real model\nabout: Deterministic.\nclaims:\n"
        + "".join(f"- {{method: {m}, paper: p, sweep: s, claim: {m} wins, a: {m}, b: x}}\n" for m in ("one", "two"))
    )
    (tmp_path / "other.yaml").write_text("- {method: one, paper: p, sweep: s, claim: one elsewhere, a: c, b: x}\n")
    claims = load_claims(tmp_path)
    record = Record({claim.test: _numbers(-0.2, -0.1) for claim in claims})
    shown = page(claims, record)
    section = shown.partition("## A real model\n\nDeterministic.\n")[2].partition("\n## ")[0]
    assert [f"{m} wins" in section for m in ("one", "two")] == [True, True]
    assert "one elsewhere" in shown.partition("## one (p)")[2].partition("\n## ")[0]
    assert "| one | 1 |  |  |" in shown
    assert "| real | 2 |  |  |" in shown


def test_numbers_written_before_a_field_was_known_are_read(tmp_path: Path) -> None:
    claim = Claim("m", "p", "s", "c", "a", "b")
    Record({claim.test: _numbers(-0.2, -0.1)}).save([claim], tmp_path / "outcomes.json")
    data = json.loads((tmp_path / "outcomes.json").read_text())
    del data["claims"][0]["examples"]
    (tmp_path / "outcomes.json").write_text(json.dumps(data))
    assert Record.load(tmp_path / "outcomes.json").numbers == {claim.test: _numbers(-0.2, -0.1)}


def test_what_was_not_judged_says_so() -> None:
    claim = Claim("new", "arXiv 1", "s", "new beats old", "method = 'new'", "method = 'old'")
    assert "| new beats old | not judged |" in page([claim], Record())


def test_judging_some_methods_keeps_the_numbers_of_the_others(tmp_path: Path) -> None:
    first, second = (Claim(m, "p", "s", f"{m} wins", f"method = '{m}'", "method = 'x'") for m in ("one", "two"))
    path = tmp_path / "outcomes.json"
    Record({first.test: _numbers(-0.2, -0.1), second.test: _numbers(0.1, math.nan)}).save([first, second], path)
    assert path.read_text().count("NaN") == 0
    record = Record.load(path).with_numbers({second.test: _numbers(-0.3, -0.2)})
    assert record.numbers == {first.test: _numbers(-0.2, -0.1), second.test: _numbers(-0.3, -0.2)}
    record.save([second], path)  # the first claim is gone from the claims
    assert set(Record.load(path).numbers) == {second.test}


def test_a_claim_that_compares_something_else_is_not_taken_for_judged() -> None:
    claim = Claim("m", "p", "s", "c", "a", "b", match={"V": 0.0})
    assert dataclasses.replace(claim, claim="other words", why="reason").test == claim.test
    for change in (
        {"a": "c"},
        {"b": "c"},
        {"sweep": "t"},
        {"match": {"V": 0.1}},
        {"expect": "worse"},
        {"margin": 0.1},
        {"y": "nll"},
    ):
        assert dataclasses.replace(claim, **change).test != claim.test  # type: ignore[arg-type]


def test_the_composition_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [
        {"job_id": f"{m}{r}", "model": "x", "task": "t", "method": m, "repeat": r, "status": "ok", "error": e,
         "scores": [e, e], "knobs": "{}", "footprint": [("bytes", cost)]}
        for r in range(2)
        for m, e, cost in (("none", 0.1, 9.0), ("a", 0.12, 5.0), ("b", 0.11, 6.0), ("a+b", 0.13, 4.0))
    ]  # fmt: skip
    record = Record(composition=[compose(to_table(rows), "bytes")])
    record.save([], tmp_path / "outcomes.json")
    assert page([], Record.load(tmp_path / "outcomes.json")) == page([], record)


def test_the_committed_page_is_the_record_of_the_committed_claims() -> None:
    claims, record = load_claims(), Record.load()
    assert RECORD.with_suffix(".md").read_text() == page(claims, record)
    assert [claim.claim for claim in claims if claim.test not in record.numbers] == []


_GOOD = "method: a, paper: p, sweep: s, claim: c, a: x, b: y"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"- {{{_GOOD}, expects: better}}", r"entry 1 \(c\): .*'expects'.*expect"),
        (f"- {{{_GOOD}}}\n- {{{_GOOD}, expect: beter}}", "entry 2: .*'beter'.*better"),
        ("- {method: a}", r"entry 1 \(\?\): .*missing"),
        ("- some words", "entry 1 is 'some words'"),
        ("method: a", "a dict; wanted is a list"),
        ("- {method: [a", "no YAML"),
        (f"- {{{_GOOD}, match: [rate]}}", r"entry 1: match = \['rate'\]"),
        (f"- {{{_GOOD}, match: {{rate: much}}}}", "entry 1: match = "),
        (f"- {{{_GOOD}, expect: equal, margin: '0.05'}}", "entry 1: margin = '0.05'"),
        (f"- {{{_GOOD}, expect: equal, margin: -1}}", "entry 1: margin = -1"),
        (f"- {{{_GOOD}, margin: 0.1}}", "entry 1: margin = 0.1; .*expect: equal"),
        (f"- {{{_GOOD}, why: 3}}", "entry 1: why = 3"),
        (f"- {{{_GOOD}, section: s}}", "'section'"),
        (f"claims: [{{{_GOOD}}}]", "need its title"),
        (f"titel: a\nclaims: [{{{_GOOD}}}]", "'titel'.*title"),
        ("title: a\nabout: [b]\nclaims: []", "about = "),
        ("title: a\nclaims: b", "a str; wanted is a list"),
    ],
)
def test_a_wrong_entry_is_told_by_file_and_number(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=told) as error:
        load_claims(path)
    assert "some.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_claims_has_none(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("# nothing yet\n")
    assert load_claims(tmp_path) == []


def test_an_interval_without_ends_is_written_read_and_shown(tmp_path: Path) -> None:
    claim = Claim("m", "p", "s", "c", "a", "b", y="ratio")
    record = Record({claim.test: _numbers(-math.inf, math.inf)})
    record.save([claim], tmp_path / "outcomes.json")
    assert json.loads((tmp_path / "outcomes.json").read_text(), parse_constant=pytest.fail)
    assert page([claim], Record.load(tmp_path / "outcomes.json")) == page([claim], record)
    assert "(one repeat: no interval)" in page([claim], record)


def test_numbers_of_the_older_interval_are_marked() -> None:
    claim = Claim("m", "p", "s", "c", "a", "b")
    new = _numbers(-0.2, -0.1)
    assert "†" not in page([claim], Record({claim.test: new}))
    old = page([claim], Record({claim.test: dataclasses.replace(new, interval=PERCENTILE)}))
    assert old.count("†") == 2  # behind the number, and what it means
