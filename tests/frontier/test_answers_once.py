"""What answers of rows say where little was measured, and that they say it once, in words that can be acted on."""

from __future__ import annotations

from typing import Any

import pytest

import isoflop
from isoflop.core.errors import UserError

ALONE = {"method": ["none"] * 6, "example": list("abcdef"), "error": [0.0, 1, 0, 0, 1, 0], "kv_bytes": [8.0] * 6}


def rows(**more: list[Any]) -> dict[str, list[Any]]:
    """Three settings of a method beside the uncompressed model, whose column ``keep`` nothing asks for."""
    keep = [1.0] * 4 + [0.5] * 4 + [0.25] * 4
    return {
        "method": ["none"] * 4 + ["snap"] * 8,
        "keep": keep,
        "example": [1, 2, 3, 4] * 3,
        "error": [0.0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0],
        **more,
    }


@pytest.mark.parametrize(
    "question", [{"share": 0.5}, {"within": 0.01}, {"speed_up": True}, {"share": 0.5, "within": 0.1, "speed_up": True}]
)
@pytest.mark.parametrize("cost", ["kv_bytes", None])
def test_only_the_uncompressed_model_was_measured(question: dict[str, Any], cost: str | None) -> None:
    found = isoflop.answers({**ALONE, "model": ["m"] * 6}, cost=cost, **question)
    assert str(found).count("only the uncompressed baseline was measured") == 1
    for answer in found:
        assert answer.unknown == "only the uncompressed baseline was measured"
        assert answer.to_dict()["model"] == "m"
    assert found.to_arrow()["model"].to_pylist() == ["m"] * len(found)


def test_words_agree_with_what_is_counted() -> None:
    dear = {"method": ["none", "a"], "error": [0.1, 0.2], "kv_bytes": [1.0, 2.0]}
    assert "nothing takes fewer bytes of the KV cache than uncompressed" in str(isoflop.answers(dear, within=0.5))
    tight = {**ALONE, "method": ["a"] * 3 + ["none"] * 3, "example": list("abcabc")}
    assert "takes all of them" in str(isoflop.answers(tight, share=0.25))


@pytest.mark.parametrize("question", [{"speed_up": True}, {}])
def test_a_note_that_several_answers_share_is_told_once(question: dict[str, Any]) -> None:
    seconds = [8.0] * 4 + [4.0] * 4 + [2.0] * 4
    method = ["none"] * 4 + ["snap"] * 4 + ["rtn"] * 4
    found = isoflop.answers(rows(seconds=seconds, method=method), cost="seconds", map={"knob.keep": "keep"}, **question)
    assert len(found) > 1
    said = str(found).splitlines()
    assert sum("measured once" in line for line in said) == 1
    assert found._repr_html_().count("measured once") == 1
    assert all(any("measured once" in note for note in a.notes) for a in found)  # each has it for programs
    paragraphs = found.told()[0]
    assert len({sentence for sentence, _ in paragraphs}) == len(paragraphs)


def test_rows_that_nothing_tells_apart_name_the_columns_that_would() -> None:
    said = "where keep or size is a setting of the method, say so: --map knob.keep=keep,knob.size=size"
    same = [7] * 12
    with pytest.raises(UserError, match="example '1' stands twice") as caught:
        isoflop.answers(rows(size=[1] * 8 + [2] * 4, same=same), share=0.5)
    assert said in str(caught.value)
    alone = {k: v for k, v in rows(size=[1] * 8 + [2] * 4, same=same).items() if k != "example"}
    alone["repeat"] = [1, 2, 3, 4] * 3
    with pytest.raises(UserError, match="and one repeat") as caught:
        isoflop.answers(alone, share=0.5)
    assert said in str(caught.value)
    with pytest.raises(UserError, match=r"tell settings apart with a column knob\.NAME"):
        isoflop.answers({k: v for k, v in rows().items() if k != "keep"}, share=0.5)


def test_a_cost_that_no_row_has_names_those_that_rows_have() -> None:
    with pytest.raises(UserError) as caught:
        isoflop.answers(rows(flops=[1.0] * 12, N=[5.0] * 12), cost="flop", share=0.5, map={"knob.keep": "keep"})
    assert str(caught.value) == "unknown cost 'flop' (did you mean 'flops'?); allowed: N, flops"
