"""Which tests stay together when several processes run them (TEST_WORKERS of the Makefile), and how they are handed out.

A file's tests stay together, since they share what its fixtures train. Folders whose files share a training stay together,
too, so that each training happens once. What starts clusters, servers and network namespaces, or waits for processes with a
clock in its hand, runs in one worker, one after the other, and first.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadScopeScheduling

TRAINED_TOGETHER = {"data_selection", "encoders", "lm", "prompts", "sparsity"}
ONE_AT_A_TIME = {
    "cluster", "gradients",
    "engine/test_crashes.py", "engine/test_metrics.py", "engine/test_ray_deaths.py", "engine/test_ray_executor.py",
    "engine/test_ray_start.py", "engine/test_search_process.py", "engine/test_shared_stages.py",
    "engine/test_tracking_outage.py", "engine/test_watching.py", "dashboards/test_mlflow_pages.py",
}  # fmt: skip
SPLIT = {"methods/test_conformance.py"}  # long, and nothing shared


def unit_of(nodeid: str) -> str:
    """What a test must share a worker with."""
    name = nodeid.partition("::")[0].removeprefix("tests/")
    folder = name.partition("/")[0]
    if folder in ONE_AT_A_TIME or name in ONE_AT_A_TIME:
        return "one-at-a-time"
    return nodeid if name in SPLIT else folder if folder in TRAINED_TOGETHER else name


class Units(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
    """Whole units to whichever worker is free, in the order of collection.

    A worker begins a test only when it knows the next one, or that there is none: each must have two in hand until then.
    The base class does not see to that for the worker that replaces a crashed one, which then waits for ever with its one
    test, or with none, where the crashed one's finished units are handed out again.
    """

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def _reschedule(self, node: Any) -> None:
        """Fill the worker's hand up; as late as possible, so that nobody sits on a long unit while others are idle."""
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            if not self.workqueue:
                node.shutdown()
                return
            self._assign_work_unit(node)

    def remove_node(self, node: Any) -> str | None:
        """A worker has ended; what it left undone goes back into the queue, without the test that crashed it."""
        units = self.assigned_work[node]
        left = [nodeid for tests in units.values() for nodeid, done in tests.items() if not done]
        for name, tests in list(units.items()):
            units[name] = {nodeid: done for nodeid, done in tests.items() if not done and nodeid != left[0]}
            if not units[name]:
                del units[name]
        super().remove_node(node)
        return left[0] if left else None
