"""isoflop.dashboards"""

if __name__ != "isoflop.dashboards":
    raise ImportError(
        f"import isoflop.dashboards, not {__name__}: a second copy of the package would hold different classes"
    )
