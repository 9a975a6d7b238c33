"""A result as a file: the ending says what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isoflop.core.errors import UserError, nearest

FIGURES = (".png", ".pdf", ".svg", ".html")
TABLES = (".csv", ".tex", ".parquet", ".json")


def ending(path: Path) -> str:
    """The ending of a file to be written. Raises UserError for one that stands for nothing here."""
    suffix = path.suffix.lower()
    if suffix not in (*FIGURES, *TABLES):
        hint = nearest(suffix, (*FIGURES, *TABLES))
        guess = f" (did you mean {hint!r}?)" if hint else ""
        raise UserError(
            f"--save {path}: ending {suffix!r}{guess}; allowed: {', '.join(FIGURES)} for the figure, {', '.join(TABLES)} for the table"
        )
    if not path.parent.is_dir():
        raise UserError(f"--save {path}: no folder {str(path.parent)!r}")
    return suffix


def save_result(result: Any, path: str | Path) -> None:
    """Write a result as what the file's ending says.

    Args:
        result: of ``isoflop.fit``, ``compare``, ``pareto``, ``answers`` or a sweep's ``frontier``.
        path: a figure (.png, .pdf, .svg, .html) or a table (.csv, .tex, .parquet, .json).

    Raises:
        UserError: another ending, a place that cannot be written to, or a result without a figure.
    """
    path = Path(path)
    content = _content(result, ending(path))
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"--save {path}: {(error.strerror or str(error)).lower()}") from None


def _content(result: Any, suffix: str) -> bytes:
    if suffix in FIGURES:
        figure = result.plot()
        if suffix == ".html":
            return str(figure.to_html(include_plotlyjs=True)).encode()
        from isoflop.dashboards.static_figures import drawn

        return drawn(figure, suffix[1:])
    if suffix == ".csv":
        return str(result.to_pandas().to_csv(index=False)).encode()
    if suffix == ".tex":
        return str(result.to_latex()).encode()
    if suffix == ".json":
        return (json.dumps(finite(result.to_dict()), indent=1, allow_nan=False, default=str) + "\n").encode()
    import pyarrow as pa
    import pyarrow.parquet

    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(result.to_arrow(), sink)
    return bytes(sink.getvalue())


def finite(value: Any) -> Any:
    """``value`` with None for numbers that JSON cannot say."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
