"""What every result can do: become a data frame, a table of LaTeX, a figure.

Results are numbers, and rooms of numbers draw nothing. Whoever draws says so once (:func:`draw_with`; the package ``isoflop`` itself
does, when it is imported), so that ``fit.plot()`` works without any of these rooms knowing of figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

_drawer: list[Callable[[Any], Any]] = []
_ESCAPED = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "\\": "\\textbackslash{}",
}
_SYMBOLS = {"×": "$\\times$", "…": "\\dots{}", "−": "$-$", "∞": "$\\infty$", "≥": "$\\geq$", "≤": "$\\leq$"}
_UNSHOWN = ("data_hash", "sentence")  # long, and no numbers


def draw_with(drawer: Callable[[Any], Any]) -> None:
    """Say what draws results."""
    _drawer[:] = [drawer]


class Result:
    """Base of results that are tables."""

    def to_arrow(self) -> pa.Table:
        """The result as a table."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """:meth:`to_arrow` as a ``pandas.DataFrame``."""
        return self.to_arrow().to_pandas()

    def to_latex(self, digits: int = 4) -> str:
        """:meth:`to_arrow` as a ``tabular`` for the package booktabs: numbers to ``digits`` significant digits, text escaped."""
        table = self.to_arrow()
        names = [n for n in table.column_names if n not in _UNSHOWN]
        columns = {n: table[n].to_pylist() for n in names}
        places = "".join("r" if _numeric(columns[n]) else "l" for n in names)
        lines = [" & ".join(map(_text, names))]
        lines += [" & ".join(_cell(columns[n][i], digits) for n in names) for i in range(table.num_rows)]
        head, *body = [f"{line} \\\\" for line in lines]
        return "\n".join([f"\\begin{{tabular}}{{{places}}}", "\\toprule", head, "\\midrule", *body, "\\bottomrule", "\\end{tabular}", ""])  # fmt: skip

    def plot(self) -> Any:
        """A Plotly figure; see :func:`isoflop.plot`."""
        return _drawer[0](self)


def _numeric(values: list[Any]) -> bool:
    return all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values)


def _cell(value: Any, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "--"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, float):
        return _text(value)
    if math.isinf(value):
        return "$\\infty$" if value > 0 else "$-\\infty$"
    mantissa, _, power = f"{value:.{digits}g}".partition("e")
    return f"${mantissa}$" if not power else f"${mantissa} \\times 10^{{{int(power)}}}$"


def _text(value: Any) -> str:
    return "".join(_ESCAPED.get(c) or _SYMBOLS.get(c) or c for c in " ".join(str(value).split()))
