"""The README's pictures, drawn anew from a sweep: ``make pictures``.

Uses a headless Chromium, since what people look at is what a browser makes of a figure.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import plotly.graph_objects as go

from isoflop.core.errors import UserError
from isoflop.dashboards.figures import frontier_figure
from isoflop.sweep.api import open_sweep

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Headless Chromium would otherwise call home at every start.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=8000",
)  # fmt: skip


def photograph(figure: go.Figure, target: Path) -> None:
    """Save a figure as the PNG that a browser shows. Raises UserError without a browser."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise UserError(
            f"pictures need a browser: install one of {', '.join(_BROWSERS)} (Debian: apt-get install chromium)"
        )
    width, height = int(figure.layout.width), int(figure.layout.height)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.update_layout(margin_l=60)
        page.write_text(
            f"<body style='margin:0'>{figure.to_html(full_html=False, include_plotlyjs=True, config={'displayModeBar': False})}</body>"
        )
        command = [
            browser,
            *_FLAGS,
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height + 10}",
            f"--screenshot={target}",
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not target.is_file():
        raise UserError(f"{browser} made no picture: {done.stderr.strip().splitlines()[-1:]}")


def main() -> None:
    """Command line: the sweep to draw, and where to put the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", default="quickstart")
    parser.add_argument("--store")
    parser.add_argument("--out", type=Path, default=Path("dashboards/pictures/frontier.png"))
    arguments = parser.parse_args()
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        photograph(
            frontier_figure(open_sweep(arguments.sweep, arguments.store)),
            arguments.out.resolve(),
        )
    except UserError as error:
        sys.exit(f"isoflop: {error}")


if __name__ == "__main__":
    main()
