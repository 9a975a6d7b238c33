"""Tasks: examples plus a metric. Importing it registers every task found there."""

from isoflop.core.registry import import_all

import_all(__name__, __path__)
