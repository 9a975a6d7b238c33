"""The figure of answers: what its axis counts, plain ticks, and where the uncompressed model is."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

import isoflop
from isoflop.dashboards import static_figures
from isoflop.dashboards.plots import plot

SHARE = "bytes of the KV cache, as a share of the uncompressed model's"


def rows(methods: tuple[str, ...] = ("snap", "rtn")) -> dict[str, list[Any]]:
    """Two settings of each method beside the uncompressed model, on three examples."""
    out: dict[str, list[Any]] = {k: [] for k in ("method", "knob.keep", "example", "error", "kv_bytes", "flops")}
    for method, keep in [("none", 1.0), *((m, k) for m in methods for k in (0.5, 0.25))]:
        for example in range(3):
            row = (method, keep, example, float(example == 0), 4000 * keep, 2e9 * keep)
            for name, value in zip(out, row, strict=True):
                out[name].append(value)
    return out


@pytest.mark.parametrize(
    ("asked", "label", "cost"),
    [
        ({"share": 0.5, "cost": "kv_bytes"}, SHARE, 1.0),
        ({"within": 0.1, "cost": "kv_bytes"}, "bytes of the KV cache", 4000.0),
        ({"speed_up": True, "cost": "flops"}, "FLOPs of an answer", 2e9),
        ({"budget": 1e9, "cost": "flops"}, "FLOPs of an answer", 2e9),
        ({"share": 0.1, "cost": "kv_bytes"}, SHARE, 1.0),  # nothing fits: the reference alone
    ],
)
def test_the_axis_says_what_it_counts_and_the_reference_is_marked(
    asked: dict[str, Any], label: str, cost: float
) -> None:
    figure = plot(isoflop.answers(rows(), **asked))
    assert figure.layout.xaxis.title.text == label
    (mark,) = [t for t in figure.data if t.name == "uncompressed"]
    assert (list(mark.x), list(mark.y)) == ([cost], [pytest.approx(1 / 3)])
    assert mark.marker.symbol == "star"
    named = [t.name for t in figure.data if t.showlegend is not False]
    assert sorted(named) == sorted(set(named))
    assert "none" not in named


def test_without_an_uncompressed_model_nothing_is_marked() -> None:
    data = rows()
    alone = {k: [v for v, m in zip(values, data["method"], strict=True) if m != "none"] for k, values in data.items()}
    figure = plot(isoflop.answers(alone, budget=1e9, cost="flops"))
    assert [t.name for t in figure.data] == ["snap", "rtn"] or [t.name for t in figure.data] == ["rtn", "snap"]


@pytest.mark.parametrize("low", [0.25, 3.0, 900.0, 2e8])
@pytest.mark.parametrize("span", [1.3, 4.0, 50.0, 1e4, 1e9])
def test_ticks_of_a_logarithmic_axis_are_few_and_plain(low: float, span: float) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([low, low * span], [0.1, 0.2])
    axes.set_xscale("log")
    static_figures._tick(axes.xaxis, *axes.get_xlim())
    figure.canvas.draw()
    left, right = axes.get_xlim()
    texts = [t.get_text() for t in axes.get_xticklabels() if left <= t.get_position()[0] <= right]
    assert 1 <= len(texts) <= 12
    assert all(text and "$" not in text for text in texts)
    assert not any(t.get_text() for t in axes.get_xticklabels(minor=True))


@pytest.mark.parametrize("tasks", [1, 4])
def test_many_names_stand_beside_the_curves_and_say_only_what_differs(
    tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Figure] = []
    monkeypatch.setattr(static_figures, "Figure", lambda **given: made.append(Figure(**given)) or made[-1])
    data = rows()
    many = {name: values * tasks for name, values in data.items()}
    many["task"] = [f"t{n}" for n in range(tasks) for _ in data["error"]]
    many["model"] = ["hf:a/very-long-name"] * len(many["task"])
    figure = plot(isoflop.answers(many, share=0.5, cost="kv_bytes"))
    static_figures.drawn(figure, "png", dpi=30)
    (still,) = made
    (axes,) = still.axes
    assert not any("very-long-name" in str(t.name) for t in figure.data)
    assert (axes.get_legend() is None, len(still.legends)) == ((True, 1) if tasks > 1 else (False, 0))
    if tasks > 1:
        still.canvas.draw()
        assert still.legends[0].get_window_extent().x0 >= axes.get_window_extent().x1
