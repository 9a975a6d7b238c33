"""How long a session will still take, from what its jobs and stages took so far."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

JOB = "job"
_RECENT = 8  # of a kind; sweeps often go from small models to large ones
_RATE_JOBS = 32  # jobs queued last, from which the stages of jobs to come are guessed
_LEAST = 0.1  # of its mean: what is expected of something that takes longer than the mean already


class TimeLeft:
    """Counts seconds per kind of work: ``job``, and the kinds of stages (``cell``, ``features`` …).

    What is known is counted as it is: stages and jobs that wait, and the rest of what runs. Of jobs that the search has not
    proposed yet only the number is known; they are taken to need as many new stages as those proposed last.
    """

    def __init__(self) -> None:
        self._took: dict[str, deque[float]] = {}
        self._brought: deque[tuple[str, ...]] = deque(maxlen=_RATE_JOBS)

    def queued(self, new_stages: Iterable[str]) -> None:
        """A job was queued, and with it the first need of stages of these kinds."""
        self._brought.append(tuple(new_stages))

    def took(self, kind: str, seconds: float) -> None:
        """Something of a kind ended, after so many seconds (times the slots that it filled)."""
        self._took.setdefault(kind, deque(maxlen=_RECENT)).append(seconds)

    def left(
        self, running: Sequence[tuple[str, float]], stages: Mapping[str, int], jobs: int, unseen: int, slots: int
    ) -> float | None:
        """Seconds until everything is done; None while no job has finished.

        Args:
            running: kind of what each busy worker does, and the seconds since it began.
            stages: kind -> stages that nobody computes yet.
            jobs: that wait; unseen: that the search has not proposed yet.
            slots: workers.
        """
        if JOB not in self._took:
            return None
        rest = [max(self._mean(kind) - since, _LEAST * self._mean(kind)) for kind, since in running]
        waiting = sum(self._mean(kind) * count for kind, count in stages.items())
        work = sum(rest) + waiting + jobs * self._mean(JOB) + unseen * self._whole_job()
        chain = max([*rest, *(self._mean(kind) for kind, count in stages.items() if count)], default=0.0)
        return max(work / max(1, slots), chain)

    def _whole_job(self) -> float:
        """A job with the stages that are new with it."""
        new = Counter(kind for kinds in self._brought for kind in kinds)
        return self._mean(JOB) + sum(self._mean(kind) * n for kind, n in new.items()) / max(1, len(self._brought))

    def _mean(self, kind: str) -> float:
        """Mean of the last of a kind; of all stages where none of this kind has ended; of jobs where no stage has."""
        if kind in self._took:
            return fmean(self._took[kind])
        others = [fmean(values) for name, values in self._took.items() if name != JOB]
        known = fmean(others) if others else fmean(self._took[JOB])
        return known if math.isfinite(known) else 0.0
