"""Golden numbers of everything that is registered, and what their comparison says when numbers or versions change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from isoflop.methods.base import METHODS
from isoflop.methods.probe import Probe
from isoflop.testing import golden
from isoflop.testing.golden import Golden, check_golden, differences, everything, golden_method, prune, stale, write

FOLDER = Path(__file__).parent
KNOWN = everything()
_PROBES: dict[object, Probe] = {}


@pytest.mark.parametrize("name", KNOWN)
def test_numbers_are_those_of_the_version(name: str) -> None:
    kind, _, which = name.partition(":")
    if kind == "method":
        cls = METHODS.get(which)
        probe = _PROBES.setdefault(cls.probe.__func__, cls.probe())  # type: ignore[attr-defined]
        check_golden(golden_method(cls, probe), FOLDER)
    else:
        check_golden(KNOWN[name](0), FOLDER)


def test_no_numbers_are_kept_of_what_is_gone() -> None:
    assert stale(FOLDER, KNOWN) == []
    assert stale(FOLDER, {name: make for name, make in KNOWN.items() if name != "method:quecc"}) == [
        FOLDER / "method-quecc.json"
    ]


FOUND = Golden("method", "quecc", "2", {"default.outputs.rms": 1.0, "default.outputs.mean": 1e-4, "default.ratio": 4.0})


def kept(tmp_path: Path, found: Golden) -> Path:
    (tmp_path / found.file).write_text(json.dumps(vars(found)))
    return tmp_path


def test_a_newcomer_is_told_how_to_write_its_numbers(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"method:quecc has no golden numbers yet: .*--write method:quecc"):
        check_golden(FOUND, tmp_path)


def test_other_numbers_under_the_same_version_fail_and_are_not_written(tmp_path: Path) -> None:
    kept(tmp_path, FOUND)
    other = replace(FOUND, numbers={**FOUND.numbers, "default.ratio": 4.01})
    with pytest.raises(
        AssertionError, match=r"under the same version '2': default.ratio 4 → 4.01. Raise its `version`"
    ):
        check_golden(other, tmp_path)
    with pytest.raises(AssertionError, match="Raise its `version`"):
        write(lambda shake: other, tmp_path)
    assert write(lambda shake: other, tmp_path, force=True)
    check_golden(other, tmp_path)


def test_a_raised_version_fails_until_its_numbers_are_written(tmp_path: Path) -> None:
    kept(tmp_path, FOUND)
    raised = replace(FOUND, version="3")
    with pytest.raises(
        AssertionError, match=r"has version '3', its golden numbers are of version '2': write them anew"
    ):
        check_golden(raised, tmp_path)
    assert write(lambda shake: raised, tmp_path)
    check_golden(raised, tmp_path)


def test_a_rounding_is_neither_a_difference_nor_written(tmp_path: Path) -> None:
    kept(tmp_path, FOUND)
    rounded = replace(FOUND, numbers={**FOUND.numbers, "default.outputs.mean": 1.3e-4, "default.ratio": 4.0001})
    check_golden(rounded, tmp_path)  # a mean is judged against the root mean square
    assert not write(lambda shake: rounded, tmp_path)
    assert differences(FOUND.numbers, {**FOUND.numbers, "default.outputs.mean": 4e-4})


def test_a_cost_that_goes_is_a_difference_and_one_that_comes_is_none() -> None:
    assert differences({"a": 1.0}, {"b": 1.0}) == {"a": "a is gone"}


def test_what_a_near_tie_decides_is_not_kept(tmp_path: Path) -> None:
    def make(shake: int) -> Golden:
        return replace(FOUND, numbers={"chosen": float(shake == 2), "smooth": 1.0 + 1e-7 * shake})

    assert write(make, tmp_path)
    found = golden.read(tmp_path / FOUND.file)
    assert found is not None
    assert found.numbers == {"smooth": 1.0}
    check_golden(make(2), tmp_path)


def test_what_another_processor_computes_otherwise_is_left_out(tmp_path: Path) -> None:
    kept(tmp_path, FOUND)
    here = replace(FOUND, numbers={**FOUND.numbers, "default.ratio": 5.0})
    assert prune(lambda shake: here, tmp_path) == ["default.ratio 4 → 5"]
    check_golden(here, tmp_path)
    check_golden(FOUND, tmp_path)
    assert prune(lambda shake: here, tmp_path) == []
    with pytest.raises(AssertionError, match="no number holds here"):
        prune(lambda shake: replace(FOUND, numbers={}), tmp_path)
    with pytest.raises(AssertionError, match="has version '3', and '2' is kept"):
        prune(lambda shake: replace(FOUND, version="3"), tmp_path)


def test_the_command_compares_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model:tiny-vit/c48", "--folder", str(tmp_path)]
    assert golden.main(arguments) == 1
    assert "has no golden numbers yet" in capsys.readouterr().err
    assert golden.main([*arguments, "--write"]) == 0
    assert golden.main(arguments) == 0
    with pytest.raises(SystemExit):
        golden.main(["model:tiny-vit/c49"])
    assert "did you mean 'model:tiny-vit/c48'" in capsys.readouterr().err
