"""Tools for testing methods, models and tasks, for this project and for other people's parts."""

from isoflop.core.folder_context import FolderContext
from isoflop.testing.methods import check_method, method_checks
from isoflop.testing.suites import Case, Shared

__all__ = ["Case", "FolderContext", "Shared", "check_method", "method_checks"]
