"""Stages' results on disk and in memory: computed once, found again by content."""

from isoflop.stages.cache import StageCache, default_cache_dir
from isoflop.stages.shared import LARGE_STAGE, SharedStages

__all__ = ["LARGE_STAGE", "SharedStages", "StageCache", "default_cache_dir"]
