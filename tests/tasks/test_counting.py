"""Operations are counted as torch's own counter counts them, whatever a task runs."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from isoflop.models import counting
from isoflop.tasks.base import TASKS
from isoflop.testing.task_probes import task_probe


@pytest.mark.parametrize("name", TASKS.own())
def test_counts_are_those_of_torchs_counter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[tuple[int, int]] = []

    class Both(counting._Counting):
        """Under torch's counter, which sees the operators and parts that it goes on with."""

        depth = 0  # an operator's parts are counted inside the same counter, which is then entered once more

        def __enter__(self) -> Any:
            if not self.depth:
                self.torch = FlopCounterMode(display=False)
                self.torch.__enter__()
            self.depth += 1
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            self.depth -= 1
            if not self.depth:
                self.torch.__exit__(*error)
                counts.append((self.flops, self.torch.get_total_flops()))

    monkeypatch.setattr(counting, "_Counting", Both)
    probe = task_probe(TASKS.get(name))
    with probe.applied():
        costs = probe.task(TASKS.get(name)).measure(probe.model, probe.ctx)
    assert all(own == torchs for own, torchs in counts)
    assert not costs.get("flops") or any(own for own, _ in counts)
