"""Public models and data, fetched once into the cache by ``isoflop fetch`` with pinned content: see ``isoflop.fetch.base``."""
