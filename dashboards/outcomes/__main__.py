"""``make outcomes``: run the sweeps that the claims name, test the claims, write the page."""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

import pyarrow as pa

import isoflop
from isoflop.core.errors import UserError
from isoflop.dashboards.outcomes import HERE, composition_page, judge, load_claims, page, write
from isoflop.frontier.composition import compose, efficient

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"


def main() -> None:
    """Command line: where the rows are kept, and which methods to judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="where sweeps are kept (default: the sweeps' own)")
    parser.add_argument("--only", nargs="*", help="methods to print, without writing the page")
    parser.add_argument("--no-run", action="store_true", help="use the rows that are there")
    given = parser.parse_args()
    claims = [c for c in load_claims() if not given.only or c.method in given.only]

    @cache
    def rows_of(sweep: str) -> pa.Table:
        if given.no_run:
            return isoflop.open(sweep, given.store).results()
        return isoflop.run(SWEEPS / f"{sweep}.yaml", store=given.store).results()

    judged = judge(claims, rows_of)
    print(page(judged))
    if not given.only:
        composed = [compose(rows_of("composed"), cost) for cost in ("bytes", "flops")]
        joint = efficient(rows_of("composed"), ("bytes", "flops"))
        print(composition_page(composed, joint))
        write(judged, composed, joint)
        print(f"wrote {HERE / 'outcomes.md'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
