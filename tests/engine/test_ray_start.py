"""A private Ray on a machine too busy for the 30 s in which Ray wants its node to be up."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from isoflop.execute import ray_executor
from isoflop.execute.ray_executor import start_private_ray

LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


class Starts:
    """Stands for ``ray.init``: fails as often as it is told, and keeps what it was asked for."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> None:
        self.asked.append(options)
        if self.errors:
            raise self.errors.pop(0)


def starting(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> Starts:
    starts = Starts(*errors)
    monkeypatch.setattr(ray_executor.ray, "init", starts)
    monkeypatch.setattr(ray_executor.ray, "shutdown", lambda: None)
    return starts


def test_a_late_node_is_started_again_with_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = starting(monkeypatch, Exception(LATE), Exception(LATE))
    start_private_ray(num_cpus=1)
    assert len(starts.asked) == 3
    assert starts.asked[0] == starts.asked[1] == starts.asked[2]
    assert starts.asked[0]["_node_ip_address"] == "127.0.0.1"
    assert starts.asked[0]["num_cpus"] == 1


def test_a_node_that_is_never_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = starting(monkeypatch, *[Exception(LATE)] * 9)
    with pytest.raises(RuntimeError, match="did not come up within 30 s, 3 times"):
        start_private_ray()
    assert len(starts.asked) == 3


def test_other_failures_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = starting(monkeypatch, ValueError("num_cpus must not be negative"))
    with pytest.raises(ValueError, match="num_cpus must not be negative"):
        start_private_ray(num_cpus=-1)
    assert len(starts.asked) == 1


def test_ray_still_says_it_in_these_words() -> None:
    """Its exception has no type of its own, so that the words decide."""
    import inspect

    assert "timed out during startup" in inspect.getsource(ray._private.node)
