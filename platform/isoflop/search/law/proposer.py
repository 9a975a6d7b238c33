"""The law sampler behind a sweep's driver: asks while something helps, hands on what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from optuna.trial import TrialState

from isoflop.search.distributions import suggest
from isoflop.search.law.forecast import Forecast
from isoflop.search.law.policy import CHECK
from isoflop.search.law.reading import NOT_RUN, ROLE
from isoflop.search.law.report import Milestone, Report
from isoflop.search.law.sampler import LawSampler
from isoflop.search.proposer import Proposal, Tell
from isoflop.search.space import Config, SearchSpace, values_key
from isoflop.search.study import OptunaProposer


class LawProposer(OptunaProposer):
    """``LawSampler`` on an in-memory study that is rebuilt from the ledger.

    A point is proposed once (a sweep's jobs are named by their content; noise is met with ``repeats``).

    Attributes:
        check: the run that is kept out of the fits, once there is one. A ledger does not hold it: who resumes a sweep gives it back
            before the first ``tell`` (:meth:`keep_check`).
        on_check: called with the check when it is chosen.
    """

    def __init__(self, space: SearchSpace, sampler: LawSampler, directions: Sequence[str], seed: int) -> None:
        super().__init__(space, sampler, "none", directions, seed)
        self._law = sampler
        self.check: Config | None = None
        self.on_check: Callable[[Config], None] = lambda config: None

    def keep_check(self, config: Config) -> None:
        """The check of an earlier session."""
        self.check = config

    def _is_check(self, config: Config) -> bool:
        return self.check is not None and values_key(self.check) == values_key(config)

    def reserve(self, number: int, config: Config) -> None:
        super().reserve(number, config)
        if self._is_check(config):
            self._law.hold_check(config)

    def ask(self, count: int) -> list[Proposal]:
        out: list[Proposal] = []
        while len(out) < count and self._law.stop_reason(self._study) is None:
            trial = self._study.ask()
            config: Config = self._space.walk(partial(suggest, trial))
            role = self._study.get_trials(deepcopy=False)[trial.number].system_attrs.get(ROLE)
            if role is None or values_key(config) in self._known or self._space.excluded(config):
                trial.set_user_attr(NOT_RUN, True)
                self._study.tell(trial, state=TrialState.FAIL)
                break
            self._known.add(values_key(config))
            if role == CHECK:
                self.check = config
                self.on_check(config)
            number = self._numbers.take()
            self._open[number] = trial
            out.append(Proposal(number, config))
        return out

    def tell(self, result: Tell) -> None:
        trial = self._open.get(result.number)
        if trial is not None:
            for name, value in result.attributes.items():
                trial.set_user_attr(name, value)
        elif self._is_check(result.config):
            result = replace(result, attributes={**result.attributes, ROLE: CHECK})
        elif result.outcome != "complete":  # it ran in an earlier session, and is paid for as it was then
            result = replace(result, attributes={**result.attributes, ROLE: "given"})
        super().tell(result)

    @property
    def reason(self) -> str | None:
        return self._law.stop_reason(self._study)

    @property
    def told(self) -> bool:
        """Whether any trial has been finished."""
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def forecast(self, width: float) -> Forecast:
        """What a half-width is expected to cost from here."""
        return self._law.forecast(width, self._study)

    def report(self) -> Report:
        """What is known after the trials that were told."""
        return self._law.report(self._study)

    def steps(self) -> list[Milestone]:
        """How the target narrowed with what was spent."""
        return self._law.steps(self._study)
