"""Tools for testing methods, models and tasks, for this project and for other people's parts."""

from isoflop.testing.conformance import check_method
from isoflop.core.folder_context import FolderContext

__all__ = ["FolderContext", "check_method"]
