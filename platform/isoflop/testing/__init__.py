"""Tools for testing methods, models and tasks, for this project and for other people's parts."""

from isoflop.core.folder_context import FolderContext
from isoflop.testing.conformance import check_method

__all__ = ["FolderContext", "check_method"]
