"""The one palette: every figure, the report's page and the notebooks take their colours from here.

Okabe and Ito's colours, which colour-blind readers can tell apart; darker or lighter where the ground asks for it. Nothing else
in this package names a colour; a test holds that.
"""

from __future__ import annotations

SERIES = ("#0072b2", "#d55e00", "#00805e", "#b8538f", "#a87400", "#2e93c9", "#4b3f9e", "#6b7280")
SERIES_ON_DARK = ("#4aa8e0", "#f08a3c", "#2fc79a", "#e08fbf", "#e6b422", "#8fd0f5", "#a99cf0", "#a3acb7")
RAMP = ("#00204d", "#17366f", "#41486d", "#5f5d70", "#7a7476", "#978c76", "#b6a66e", "#d5c15e", "#eedb4f")
RAMP_ON_DARK = ("#fde84a", "#e2cb5a", "#c6b169", "#aa9a72", "#8f8576", "#777175", "#615f72", "#4c4f70", "#3a4470")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")  # beside colours, in print

LIGHT = {
    "ground": "#ffffff", "raised": "#f6f7f9", "ink": "#1b1f24", "faint": "#5c6570",
    "rule": "#d5dae0", "grid": "#e8ebef", "link": "#0b5cad",
}  # fmt: skip
DARK = {
    "ground": "#14171b", "raised": "#1d2126", "ink": "#e6e9ed", "faint": "#a3acb7",
    "rule": "#3a414a", "grid": "#282d34", "link": "#7cb8f2",
}  # fmt: skip
PRINT = {
    "ground": "#ffffff", "raised": "#ffffff", "ink": "#000000", "faint": "#444444",
    "rule": "#bbbbbb", "grid": "#e3e3e3", "link": "#000000",
}  # fmt: skip


def series(k: int) -> str:
    """Colour of the k-th series."""
    return SERIES[k % len(SERIES)]


def symbol(k: int) -> str:
    """Marker of the k-th series, as Plotly calls it."""
    return SYMBOLS[k % len(SYMBOLS)]


def faded(colour: str, alpha: float = 0.18) -> str:
    """The colour as it lies under a band."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def stylesheet() -> str:
    """Custom properties for light, dark and printed pages, and the classes ``c0 …`` (series) and ``r0 …`` (ramp)."""
    light = _properties(LIGHT, SERIES, RAMP)
    dark = _properties(DARK, SERIES_ON_DARK, RAMP_ON_DARK)
    printed = _properties(PRINT, SERIES, RAMP)
    names = [*(f"c{k}" for k in range(len(SERIES))), *(f"r{k}" for k in range(len(RAMP)))]
    return "\n".join(
        [
            f":root {{ color-scheme: light dark; {light} }}",
            f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}",
            f"@media print {{ :root {{ {printed} }} }}",
            *(f".{name} {{ --s: var(--{name}); }}" for name in names),
            "",
        ]
    )


def _properties(ground: dict[str, str], colours: tuple[str, ...], ramp: tuple[str, ...]) -> str:
    named = [
        *ground.items(),
        *((f"c{k}", c) for k, c in enumerate(colours)),
        *((f"r{k}", c) for k, c in enumerate(ramp)),
    ]
    return " ".join(f"--{name}: {value};" for name, value in named)
