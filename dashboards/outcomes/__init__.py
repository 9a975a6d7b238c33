"""Which published orderings show at small scale: the claims, their test on real rows, and the page about them.

``make outcomes`` runs the sweeps that the claims name (or finds them done), tests every claim on paired examples and writes
``outcomes.json`` and ``outcomes.md`` anew, with the joint frontier of the composed sweep. A claim that does not show is
kept, with its numbers. ``python -m isoflop.dashboards.outcomes --only zip-fit`` does so for some methods and leaves what is
known of the others.
"""

from isoflop.dashboards.outcomes.claims import CLAIMS, Claim, judge, load_claims
from isoflop.dashboards.outcomes.page import composition_page, page
from isoflop.dashboards.outcomes.record import RECORD, Record

__all__ = ["CLAIMS", "RECORD", "Claim", "Record", "composition_page", "judge", "load_claims", "page"]
