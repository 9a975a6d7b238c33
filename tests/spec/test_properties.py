"""Properties of the foundations: YAML, knobs, hashes, jobs, and the numbers with units that a spec takes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from isoflop.core.errors import UserError, nearest
from isoflop.core.hashing import canonical, content_hash, derive_seed
from isoflop.core.knobs import Knob, check_knobs, knob_specs
from isoflop.core.registry import Registry
from isoflop.core.yaml_source import load_yaml, parse_yaml
from isoflop.jobs import Job, MethodSpec
from isoflop.sweep.blocks import Limits, ResourcesBlock
from isoflop.sweep.spec import load_spec

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=15,
)


def refusal(action: Callable[[], Any]) -> str | None:
    """The message of the user error that ``action`` raises; any other exception passes."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


# YAML


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_with_a_user_error(text: str) -> None:
    message = refusal(lambda: parse_yaml(text, "file.yaml"))
    assert message is None or (message.startswith("file.yaml") and "\n" not in message)


@given(
    st.lists(
        st.sampled_from(
            [
                "a",
                ": ",
                "- ",
                "\n",
                "  ",
                "!!",
                "int ",
                "&x ",
                "*x",
                "[",
                "]",
                "{",
                "}",
                "1",
                "'",
                '"',
                "<<: ",
                "? ",
                "|",
                "%",
                "~",
                "bool ",
            ]
        ),
        max_size=25,
    )
)
def test_any_heap_of_yaml_is_read_or_refused_with_a_user_error(pieces: list[str]) -> None:
    message = refusal(lambda: parse_yaml("".join(pieces), "file.yaml"))
    assert message is None or (message.startswith("file.yaml") and "\n" not in message)


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused_with_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    message = refusal(lambda: load_yaml(path))
    assert message is None or str(path) in message


@given(TREES)
def test_json_like_data_comes_back_as_it_was(data: Any) -> None:
    try:
        text = yaml.safe_dump(data, allow_unicode=True)
    except yaml.YAMLError:
        return
    if "!!" in text or "\\" in text:  # PyYAML quotes what it must; escapes and tags are its business
        return
    assert parse_yaml(text).data == data


@given(TREES)
def test_json_itself_is_read(data: Any) -> None:
    text = json.dumps(data, ensure_ascii=True)
    assert parse_yaml(text).data == data


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(UserError, match=r"f\.yaml:1: a: .* is not a value of the kind str"):
        parse_yaml('a: "\\ud800"', "f.yaml")


def test_lines_of_keys_are_known() -> None:
    source = parse_yaml("a: 1\nb:\n  - c: 2\n    d: {e: 3}\n", "f.yaml")
    assert source.where(("b", 0, "d", "e")) == "f.yaml:4: b[0].d.e"
    assert source.where(("b", 0, "unknown")) == "f.yaml:3: b[0].unknown"
    assert source.where(("a",)) == "f.yaml:1: a"


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e9", 1e9),
        ("010", 10),
        ("1:30", "1:30"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("1_000", 1000),
        (".5", 0.5),
        ("2026-01-01", "2026-01-01"),
        ("~", None),
        ("0x10", "0x10"),
        ("=", "="),
    ],
)
def test_scalars_are_those_of_json(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}").data["a"]
    assert found == value
    assert type(found) is type(value)


@given(TREES)
def test_any_dict_is_a_spec_or_a_user_error(data: Any) -> None:
    for given_ in (
        data,
        {"name": "s", "models": data},
        {"name": "s", "models": ["m"], "methods": data, "tasks": ["t"]},
        {"name": "s", "models": ["m"], "methods": [{"x": {"k": data}}], "tasks": ["t"], "search": data},
    ):
        if not isinstance(given_, dict):
            continue
        message = refusal(lambda given_=given_: load_spec(given_))  # type: ignore[misc]
        assert message is None or message.startswith("<dict>")


# hashes


@given(st.dictionaries(st.text(max_size=5), SCALARS, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(data: dict[str, Any], rng: Any) -> None:
    items = list(data.items())
    rng.shuffle(items)
    assert content_hash(dict(items)) == content_hash(data)


@given(st.integers(-(2**52), 2**52))
def test_whole_numbers_are_one_number_however_written(number: int) -> None:
    assert content_hash(number) == content_hash(float(number))
    assert content_hash({"k": [number]}) == content_hash({"k": (float(number),)})


@given(TREES, TREES)
def test_other_content_gives_another_hash(a: Any, b: Any) -> None:
    same = json.dumps(canonical(a), sort_keys=True) == json.dumps(canonical(b), sort_keys=True)
    assert (content_hash(a) == content_hash(b)) == same


def test_hashes_are_the_same_on_every_machine() -> None:
    assert content_hash({"b": 1, "a": [True, None, "ü", 0.5]}) == "2bde6a97dedb06fc3b98"
    assert 0 <= derive_seed(0, "x", 3) < 2**31
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert content_hash("\ud800")  # half a surrogate pair from a YAML escape
    with pytest.raises(TypeError, match="canonical"):
        content_hash(object())


# knobs


@dataclass(frozen=True)
class Knobs:
    n: Annotated[int, Knob(low=2, high=9)] = 3
    x: Annotated[float, Knob(low=0.5, high=8.0, log=True)] = 1.0
    mode: Annotated[str, Knob(choices=("mean", "max"))] = "mean"
    size: Annotated[int, Knob(choices=(1, 4, 16))] = 4
    on: Annotated[bool, Knob()] = True
    word: Annotated[str, Knob()] = ""
    plain: int = 7


@given(st.sampled_from(["n", "x", "mode", "size", "on", "word"]), SCALARS | st.floats())
def test_a_knob_takes_a_value_of_its_range_or_refuses_it(name: str, value: Any) -> None:
    spec = knob_specs(Knobs)[name]
    message = refusal(lambda: spec.check(value, "here"))
    if message is not None:
        assert message.startswith("here: ")
        assert f"allowed: {spec.describe()}" in message
        return
    found = spec.check(value)
    assert type(found) is spec.type
    assert found == value
    if name == "n":
        assert 2 <= found <= 9  # type: ignore[operator]
    if name == "x":
        assert math.isfinite(found)  # type: ignore[arg-type]
        assert 0.5 <= found <= 8  # type: ignore[operator]
    assert spec.check(found) == found


def test_defaults_are_filled_in_and_other_fields_are_no_knobs() -> None:
    assert check_knobs(Knobs, {"n": 4.0}, "k") == {"n": 4, "x": 1.0, "mode": "mean", "size": 4, "on": True, "word": ""}
    with pytest.raises(UserError, match=r"unknown knob of k 'plain'.*allowed: mode, n, on, size, word, x"):
        check_knobs(Knobs, {"plain": 1}, "k")
    assert [s.describe() for s in knob_specs(Knobs).values()] == [
        "2 … 9",
        "0.5 … 8 (log)",
        "mean | max",
        "1 | 4 | 16",
        "true | false",
        "text",
    ]


# registries


def test_a_registry_refuses_bad_names_and_doubles() -> None:
    registry: Registry[type] = Registry("thing")
    registry.register("a-b.c")(Knobs)
    registry.register("a-b.c")(Knobs)  # the same again, as notebooks do
    with pytest.raises(UserError, match="registered twice"):
        registry.register("a-b.c")(Registry)
    for name in ("A", "", "a b", "-a", "a/b", "a\n"):
        with pytest.raises(UserError, match="lower-case"):
            registry.register(name)
    with pytest.raises(UserError, match=r"unknown thing 'a-b'.*did you mean 'a-b\.c'"):
        registry.get("a-b")
    assert "a-b.c" in registry
    assert list(registry) == ["a-b.c"]
    assert nearest("zzz", ["a"]) is None


# jobs

KNOBS = st.dictionaries(
    st.sampled_from("abcd"), st.booleans() | st.integers(-5, 5) | st.floats(-1, 1) | st.text(max_size=3), max_size=3
)
JOBS = st.builds(
    lambda model, methods, task, repeat, seed, options: Job(
        model,
        tuple(MethodSpec.of(n, k) for n, k in methods),
        task,
        repeat,
        seed,
        tuple(sorted(options.items())),
        (),
        (("model", "1"), ("task", "2")),
    ),
    st.sampled_from(["m", "n"]),
    st.lists(st.tuples(st.sampled_from("xyz"), KNOBS), min_size=1, max_size=3),
    st.sampled_from(["t", "u"]),
    st.integers(0, 3),
    st.integers(0, 3),
    KNOBS,
)


@given(JOBS)
def test_a_job_survives_json(job: Job) -> None:
    back = Job.from_dict(json.loads(json.dumps(job.to_dict())))
    assert back == job
    assert (back.id, back.trial_id) == (job.id, job.trial_id)


@given(JOBS, JOBS)
def test_jobs_have_equal_ids_when_their_content_is_equal(a: Job, b: Job) -> None:
    same = json.dumps(canonical(a.to_dict()), sort_keys=True) == json.dumps(canonical(b.to_dict()), sort_keys=True)
    assert (a.id == b.id) == same


# units


@pytest.mark.parametrize(
    "text, seconds", [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), (5, 5), ("1.5h", 5400)]
)
def test_times(text: Any, seconds: float) -> None:
    assert Limits(timeout=text).timeout == seconds


@pytest.mark.parametrize(
    "text, size", [("512MB", 512 * 10**6), ("4GiB", 4 * 2**30), ("1k", 1000), ("1.5K", 1500), (77, 77)]
)
def test_sizes(text: Any, size: int) -> None:
    assert ResourcesBlock(memory=text).memory == size


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(UserError, match=r"quikstart\.yaml: no such file \(did you mean '.*quickstart\.yaml'"):
        load_yaml(tmp_path / "quikstart.yaml")
    with pytest.raises(UserError, match="not a file name"):
        load_yaml("a\0b")
