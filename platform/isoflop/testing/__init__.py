"""Tools for testing methods, models, tasks and executors, for this project and for other people's parts."""

from isoflop.core.folder_context import FolderContext
from isoflop.testing.executors import ExecutorProbe, check_executor, executor_checks
from isoflop.testing.methods import check_method, method_checks
from isoflop.testing.model_probes import ModelProbe
from isoflop.testing.models import check_model, model_checks
from isoflop.testing.suites import Case, Shared
from isoflop.testing.task_probes import TaskProbe, reader_of_text
from isoflop.testing.tasks import check_task, task_checks

__all__ = [
    "Case",
    "ExecutorProbe",
    "FolderContext",
    "ModelProbe",
    "Shared",
    "TaskProbe",
    "check_executor",
    "check_method",
    "check_model",
    "check_task",
    "executor_checks",
    "method_checks",
    "model_checks",
    "reader_of_text",
    "task_checks",
]
