"""Tasks: examples plus a metric. Importing it registers the built-in tasks."""

from isoflop.tasks import reading, reasoning

__all__ = ["reading", "reasoning"]
