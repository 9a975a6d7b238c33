"""The task ``human-eval``: functions that a model writes to a description, and whether they pass their tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from isoflop.core.errors import UserError
from isoflop.core.knobs import Knob
from isoflop.core.rows import Rows
from isoflop.models.base import ModelInfo
from isoflop.tasks.base import TASKS
from isoflop.tasks.data.greedy import GreedyTask
from isoflop.tasks.data.language import Asked
from isoflop.tasks.data.programs import passes
from isoflop.tasks.data.prompts import Template, shown

FIELDS = ("prompt", "test", "entry_point")
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ")
"""Where a function has ended: the next thing at the margin (Chen et al. 2021, section 2.2)."""


@TASKS.register("human-eval")
@dataclass(frozen=True, kw_only=True)
class HumanEval(GreedyTask):
    """Functions written to a signature and a docstring (arXiv 2107.03374), by greedy generation: 1 − pass@1.

    The data have the fields ``prompt``, ``test`` and ``entry_point`` of HumanEval (``isoflop fetch human-eval``, then
    ``data: public:human-eval/HumanEval.jsonl``). Programs run in processes of their own, with limits of time, memory and file size, in
    folders that go with them, and start no others; on Linux without a network where the kernel allows it. That is no sandbox, so that they run only with
    ``execute: true``. Secondary metric: ``tokens``, how many were generated.
    """

    version: ClassVar[str] = "2"

    execute: Annotated[bool, Knob(doc="run programs that the model wrote, on this machine")] = False
    max_tokens: Annotated[int, Knob(low=1, high=100_000, doc="most generated tokens", unit="tokens")] = 256
    seconds: Annotated[int, Knob(low=1, high=600, doc="processor time of a program", unit="s")] = 5

    def template(self) -> Template:
        """The prompt as it is."""
        return Template.of("{prompt}", "", f"task {self.name}: prompt")

    def check_rows(self, rows: Rows) -> None:
        """HumanEval's fields are there."""
        for field in FIELDS:
            rows.require(field, "data", self.name)

    def check(self, info: ModelInfo) -> None:
        """Somebody has said that programs may run."""
        if not self.execute:
            raise UserError(
                f"task {self.name}: execute = false; it runs programs that the model writes, with limits but in no sandbox; to allow "
                "that on the machines of this sweep: execute: true"
            )
        super().check(info)

    def ended(self, text: str) -> bool:
        """The function has ended."""
        return any(stop in text for stop in STOPS)

    def score(self, asked: Asked, text: str) -> float:
        """1 where the function passes its tests."""
        row = asked.example.row
        begun, test, name = (shown(row, field) for field in FIELDS)
        return float(passes(program(begun, text, test, name), self.seconds))


def program(prompt: str, written: str, test: str, entry_point: str) -> str:
    """What is run: the function as it was begun and continued, its tests, and the call of them."""
    for stop in STOPS:
        written = written.partition(stop)[0]
    return f"{prompt.rstrip()}{written}\n\n{test}\n\ncheck({entry_point})\n"
