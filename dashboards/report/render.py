"""The report's JSON as one HTML file that needs nothing else: no network, no server, no store.

Words, tables and the first statement of each slider are in the HTML itself; charts are drawn by the page's own script from
the same JSON. Everything from a sweep is escaped, and the page's content security policy allows the page's own style and
script (by hash) and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib import resources
from typing import Any

from isoflop.core.numbers import short
from isoflop.dashboards.palette import SERIES, stylesheet
from isoflop.dashboards.report.charts import Json

SCRIPTS = ("svg.js", "scale.js", "xy.js", "rows.js", "parallel.js", "main.js")
MOST_BYTES = 5_000_000
_THINNER = (2000, 600, 150)  # points per chart, tried in turn until the page is small enough
_TABLE_ROWS = 150
_DIGITS = 6


def render(report: Json) -> str:
    """The page. Charts of very many points are thinned until it has less than 5 MB; their captions say so."""
    page = ""
    for most in _THINNER:
        page = _Page(report, most).html()
        if len(page.encode()) < MOST_BYTES:
            break
    return page


class _Page:
    """One rendering; collects what the script needs while it writes what the reader needs."""

    def __init__(self, report: Json, most: int) -> None:
        self.report = report
        self.most = most
        self.charts: list[Json] = []
        self.sliders: list[Json] = []
        self.texts: dict[str, int] = {}

    def html(self) -> str:
        """The whole file."""
        report = self.report
        body = "\n".join(self._section(s) for s in report["sections"])
        data = {"charts": self.charts, "sliders": self.sliders, "texts": list(self.texts)}
        style = stylesheet() + _asset("page.css")
        colours = f"const COLOURS = {len(SERIES)};"
        script = "(() => {\n" + "\n".join([colours, *(_asset(name) for name in SCRIPTS)]) + "})();\n"
        values = {
            "policy": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'",
            "title": escape(f"{report['name']}: sweep report"),
            "name": escape(report["name"]),
            "description": escape(report["description"]),
            "facts": escape(" · ".join(report["facts"])),
            "headline": "".join(f"<p>{escape(line)}.</p>" for line in report["headline"]),
            "contents": "".join(f'<li><a href="#{s["id"]}">{escape(s["title"])}</a></li>' for s in report["sections"]),
            "sections": body,
            "left_out": _left_out(report["left_out"]),
            "style": style,
            "script": script,
            "data": _json(data),
        }
        page = _asset("page.html")
        parts = page.split("{{")
        return parts[0] + "".join(values[key] + rest for key, _, rest in (p.partition("}}") for p in parts[1:]))

    def _section(self, section: Json) -> str:
        groups = "".join(
            f'<div class="group" data-name="{escape(g["name"])}"><div class="panels">'
            + "".join(self._panel(p) for p in g["panels"])
            + "</div></div>"
            for g in section["groups"]
        )
        lead = f'<p class="lead">{escape(section["lead"])}</p>' if section["lead"] else ""
        notes = "".join(f"<li>{escape(n)}</li>" for n in section["notes"])
        notes = f"<ul>{notes}</ul>" if notes else ""
        title = escape(section["title"])
        return f'<section id="{section["id"]}" aria-label="{title}"><h2>{title}</h2>{lead}{groups}{notes}</section>'

    def _panel(self, panel: Json) -> str:
        parts = [f"<h3>{escape(panel['title'])}</h3>"]
        chart, slider = panel["chart"], panel.get("slider")
        if chart is not None:
            chart, note = _thin(chart, self.most)
            parts.append(f'<figure data-chart="{len(self.charts)}"{self._slider_attribute(slider)}></figure>')
            self.charts.append(self._interned(chart))
            parts.append(f'<p class="faint">{escape(note)}</p>' if note else "")
        if slider is not None:
            parts.append(_slider(slider, len(self.sliders)))
        if panel["text"]:
            parts.append(f'<p class="faint">{escape(panel["text"])}</p>')
        body = _table(panel["table"]) if panel.get("table") else ""
        body += f"<pre>{escape(panel['pre'])}</pre>" if panel.get("pre") else ""
        if panel.get("folded"):
            return f'<details class="panel"><summary>{escape(panel["title"])}</summary>{body}</details>'
        parts.append(body)
        if chart is not None:
            parts.append(f"<details><summary>the chart as a table</summary>{_table(chart_table(chart))}</details>")
        return f'<div class="panel">{"".join(parts)}</div>'

    def _slider_attribute(self, slider: Json | None) -> str:
        if slider is None:
            return ""
        self.sliders.append(slider)
        return f' data-slider="{len(self.sliders) - 1}"'

    def _interned(self, chart: Json) -> Json:
        """The chart with each tooltip's text as a number: texts repeat in chart after chart."""

        def number(item: Json) -> Json:
            if not isinstance(item.get("text"), str):
                return item
            return {**item, "text": self.texts.setdefault(item["text"], len(self.texts))}

        out = dict(chart)
        if "series" in out:
            out["series"] = [{**s, "points": [number(p) for p in s["points"]]} for s in out["series"]]
        for key in ("lines", "rows"):
            if key in out:
                out[key] = [number(item) for item in out[key]]
        return out


def _asset(name: str) -> str:
    return resources.files("isoflop.dashboards.report").joinpath("static", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: Any) -> str:
    """JSON that cannot end its script element, numbers to six digits."""
    text = json.dumps(_rounded(data), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character, code in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, code)
    return text


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if abs(value) < float("inf") else None
    return value


def _left_out(lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section id="left-out" aria-label="Left out"><h2>Left out</h2><ul>{items}</ul></section>'


def _slider(slider: Json, number: int) -> str:
    """A range input, native and so usable by keyboard; without the script it shows the first statement, disabled."""
    states, start = slider["states"], slider["start"]
    name = f"budget-{number}"
    return (
        f'<div class="slider"><label for="{name}">{escape(slider["label"])}</label> '
        f'<output class="budget" for="{name}">{escape(states[start]["label"])}</output>'
        f'<input class="budget" id="{name}" type="range" min="0" max="{len(states) - 1}" step="1" value="{start}" disabled></div>'
        f'<p class="statement" aria-live="polite">{escape(states[start]["text"])}</p>'
    )


def _thin(chart: Json, most: int) -> tuple[Json, str]:
    """At most so many points and lines, evenly; curves stay whole."""
    if chart["kind"] == "parallel" and len(chart["lines"]) > most:
        step = -(-len(chart["lines"]) // most)
        kept = chart["lines"][::step]
        return {**chart, "lines": kept}, f"{len(kept)} of {len(chart['lines'])} lines are drawn."
    if chart["kind"] != "xy":
        return chart, ""
    loose = sum(len(s["points"]) for s in chart["series"] if not s["line"])
    if loose <= most:
        return chart, ""
    step = -(-loose // most)
    thinned = [s if s["line"] else {**s, "points": s["points"][::step]} for s in chart["series"]]
    kept_points = sum(len(s["points"]) for s in thinned if not s["line"])
    return {**chart, "series": thinned}, f"{kept_points} of {loose} points are drawn."


def chart_table(chart: Json) -> Json:
    """What a chart shows as a table: for screen readers, for copying, and where scripts do not run."""
    head: list[str]
    if chart["kind"] == "xy":
        head = ["series", "what", _axis_head(chart["x"]), _axis_head(chart["y"]), "low", "high"]
        rows = [
            [s["name"], p["text"], p["x"], p["y"], p["low"], p["high"]] for s in chart["series"] for p in s["points"]
        ]
    elif chart["kind"] == "bars":
        unit = f" ({chart['x']['unit']})" if chart["x"]["unit"] else ""
        head = ["what", *(part + unit for part in chart["parts"])]
        rows = [[r["label"], *r["values"]] for r in chart["rows"]]
    elif chart["kind"] == "forest":
        head = ["what", "difference", "low", "high", "verdict"]
        rows = [[r["label"], r["value"], r["low"], r["high"], r["text"]] for r in chart["rows"]]
    else:
        head = [a["name"] for a in chart["axes"]]
        rows = [[_level(v, a) for v, a in zip(r["values"], chart["axes"], strict=True)] for r in chart["lines"]]
    more = f"the first {_TABLE_ROWS} of {len(rows)} rows" if len(rows) > _TABLE_ROWS else ""
    return {"caption": more, "head": head, "rows": rows[:_TABLE_ROWS]}


def _axis_head(axis: Json) -> str:
    return f"{axis['label']} ({axis['unit']})" if axis["unit"] else str(axis["label"])


def _level(value: Any, axis: Json) -> Any:
    return value if value is None or axis["levels"] is None else axis["levels"][value]


def _table(table: Json) -> str:
    caption = f"<caption>{escape(table['caption'])}</caption>" if table["caption"] else ""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in table["head"])
    body = "".join("<tr>" + "".join(_cell(v) for v in row) + "</tr>" for row in table["rows"])
    return f'<div class="scroll" tabindex="0"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = str(value) if isinstance(value, int) else short(value, 4)
        return f'<td class="number">{escape(text)}</td>'
    text = "–" if value is None else str(value)
    return f"<td{' class=span' if _is_span(text) else ''}>{escape(text)}</td>"


def _is_span(text: str) -> bool:
    """An interval, which must not be broken over lines."""
    return " … " in text and len(text) < 30
