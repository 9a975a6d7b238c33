"""Stages' results on disk and in memory: computed once, found again by content."""

from isoflop.stages.cache import StageCache, default_cache_dir

__all__ = ["StageCache", "default_cache_dir"]
