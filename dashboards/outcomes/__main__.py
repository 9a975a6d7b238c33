"""``make outcomes``: run the sweeps that the claims name, test the claims, write the page."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pyarrow as pa

import isoflop
from isoflop.core.errors import UserError, unknown
from isoflop.dashboards.outcomes import RECORD, Claim, Record, judge, load_claims, page
from isoflop.frontier.composition import compose, efficient

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
PAGE = RECORD.with_suffix(".md")
COMPOSED = "composed"


def main() -> None:
    """Command line: where the rows are kept, and which methods to judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="where sweeps are kept (default: the sweeps' own)")
    parser.add_argument(
        "--only", nargs="*", default=(), help="judge these methods, or sections; the others keep their numbers"
    )
    parser.add_argument("--no-run", action="store_true", help="use the rows that are there")
    parser.add_argument("--print", action="store_true", help="print the page of what was judged, without writing it")
    given = parser.parse_args()
    claims = load_claims()
    judged = dict.fromkeys(name for claim in claims for name in sorted(_names(claim)))
    for name in given.only:
        if name not in (*judged, COMPOSED):
            raise unknown("--only", name, (*judged, COMPOSED))

    @cache
    def rows_of(sweep: str) -> pa.Table:
        if given.no_run:
            return isoflop.open(sweep, given.store).results()
        return isoflop.run(SWEEPS / f"{sweep}.yaml", store=given.store).results()

    chosen = [c for c in claims if not given.only or not _names(c).isdisjoint(given.only)]
    record = Record.load().with_numbers(judge(chosen, rows_of))
    if not given.only or COMPOSED in given.only:
        composition = [compose(rows_of(COMPOSED), cost) for cost in ("bytes", "flops")]
        record = replace(record, composition=composition, joint=efficient(rows_of(COMPOSED), ("bytes", "flops")))
    if given.print:
        print(page(chosen, replace(record, composition=(), joint=())))
        return
    record.save(claims)
    PAGE.write_text(page(claims, record))
    print(f"wrote {PAGE}")


def _names(claim: Claim) -> set[str]:
    """What ``--only`` may call it by: its method, and its section."""
    return {claim.method, claim.heading}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
