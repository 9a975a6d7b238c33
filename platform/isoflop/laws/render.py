"""Fits as text of at most 80 columns and as HTML for notebooks."""

from __future__ import annotations

import html
import math
import textwrap
from typing import TYPE_CHECKING

from isoflop.laws.validation import in_words

if TYPE_CHECKING:
    from isoflop.laws.result import Estimate, Fit

WIDTH = 80
RULE = "ident.: both ends known, and no further apart than 2 × value (floor: range of y)"


def number(value: float) -> str:
    """Six significant digits for people; programs read the JSON, which has them all."""
    if math.isnan(value):
        return "-"
    return ("-∞" if value < 0 else "∞") if math.isinf(value) else f"{value:.6g}"


def span(e: Estimate) -> str:
    """``[low, high]``."""
    return "" if e.interval is None else f"[{e.interval[0]:.4g}, {e.interval[1]:.4g}]".replace("inf", "∞")


def value(e: Estimate) -> str:
    """The number, or the word for one that the data do not determine."""
    return "unidentified" if e.identified is False else number(e.value)


def mark(e: Estimate) -> str:
    """yes / no / - for identified."""
    return {True: "yes", False: "NO", None: "-"}[e.identified]


def title(fit: Fit) -> str:
    """Law, target and group in one line."""
    group = ", ".join(f"{k}={v}" for k, v in fit.key.items())
    return f"{fit.law}: {fit.columns.y} = {fit.form.formula}" + (f"  [{group}]" if group else "")


def numbers_line(fit: Fit) -> str:
    """n, objective, loss, R², RMSE and status."""
    return f"n {fit.n}   {fit.objective} {number(fit.loss)}   R² {fit.r2:.4f}   RMSE {number(fit.rmse)}   {fit.status}"


def fit_text(fit: Fit) -> str:
    """A plain-text summary, 80 columns wide."""
    lines = [
        *_wrap(title(fit)),
        numbers_line(fit),
        f"{'':12}{'value':>13}  {f'{100 * fit.level:g}% interval':24} ident.",
    ]
    for name, e in [*fit.params.items(), *fit.derived.items()]:
        lines.append(f"{name:12}{value(e):>13}  {span(e):24} {mark(e)}")
        if e.identified is False:
            lines += [f"{'':14}{part}" for part in _wrap(e.verdict, WIDTH - 14)]
    if any(e.identified is not None for e in [*fit.params.values(), *fit.derived.values()]):
        lines += _wrap(RULE)
    lines += _wrap(in_words(fit.record.get("validation"))) if fit.record.get("validation") else []
    for warning in fit.warnings:
        lines += [("! " if k == 0 else "  ") + part for k, part in enumerate(_wrap(warning, WIDTH - 2))]
    return "\n".join(lines)


def _wrap(text: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def fit_html(fit: Fit) -> str:
    """A table for notebooks; everything from users is escaped."""
    rows = "".join(
        f"<tr><td><b>{html.escape(name)}</b></td><td style='text-align:right'>{value(e)}</td>"
        f"<td>{html.escape(span(e))}</td><td>{html.escape(e.verdict)}</td></tr>"
        for name, e in [*fit.params.items(), *fit.derived.items()]
    )
    held_out = in_words(fit.record.get("validation"))
    notes = "".join(f"<li>{html.escape(w)}</li>" for w in [held_out, *fit.warnings] if w)
    return (
        f"<div><p><code>{html.escape(title(fit))}</code><br>{html.escape(numbers_line(fit))}</p>"
        f"<table><thead><tr><th></th><th>value</th><th>{100 * fit.level:g}% interval</th><th>what the data say</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>" + (f"<ul>{notes}</ul>" if notes else "") + "</div>"
    )


def wrapped(text: str, first: str = "", rest: str = "  ") -> list[str]:
    """A sentence as lines of a terminal's width; words stay whole, so that names can be copied.

    Args:
        first, rest: what the first line and the others begin with.
    """
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )
