"""The ledger: a sweep's results as an append-only Parquet data set, the only source of truth."""

from isoflop.ledger.ledger import Ledger, LedgerBusy
from isoflop.ledger.schema import SCHEMA, VERSION, empty, latest, to_table
from isoflop.ledger.store import Store, default_store

__all__ = ["SCHEMA", "VERSION", "Ledger", "LedgerBusy", "Store", "default_store", "empty", "latest", "to_table"]
