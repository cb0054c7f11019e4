"""A run says when the network has become slow: who looks at a job that crawls shall not have to guess why."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from horoyolo.engine.hooks import Hook, StepRecord

log = logging.getLogger("horoyolo")

WINDOW_S = 20.0  # of steps that are looked at together
FEWEST_STEPS = 3
SHARE = 0.5  # of the time that steps take, waited for the network
TIMES_USUAL = 3.0  # against the best window before
SETTLING_STEPS = 5  # the first ones wait for workers that start later
QUIET_S = 600.0  # between two warnings


class WarnSlowNetwork(Hook):
    """A line when steps wait for the network most of their time, and much longer than they did before.

    Steps are looked at while ``is_settled``: compression that tries several ways to sum waits as long as each of them takes.
    """

    def __init__(self, is_settled: Callable[[], bool] = lambda: True) -> None:
        self._is_settled = is_settled
        self._begin(workers=0)

    def _begin(self, workers: int) -> None:
        """Forgets what was seen: another number of workers waits another time."""
        self._workers = workers
        self._window: deque[tuple[float, float]] = deque()  # (seconds of a step, of these waited)
        self._num_steps = 0
        self._usual_s: float | None = None  # least mean wait of a window so far
        self._quiet_s = 0.0  # left without another warning

    def after_step(self, record: StepRecord, batch: Any) -> None:
        if record.workers != self._workers:
            self._begin(record.workers)
        if not self._is_settled():
            self._window.clear()
            return
        self._num_steps += 1
        step_s = record.data_s + record.forward_s + record.backward_s + record.exchange_wait_s
        self._quiet_s -= step_s
        self._window.append((step_s, record.exchange_wait_s))
        while len(self._window) > FEWEST_STEPS and sum(seconds for seconds, _ in self._window) > WINDOW_S:
            self._window.popleft()
        if len(self._window) < FEWEST_STEPS:
            return
        waited_s = sum(waited for _, waited in self._window)
        mean_s, share = waited_s / len(self._window), waited_s / sum(seconds for seconds, _ in self._window)
        usual_s = self._usual_s = min(self._usual_s or mean_s, mean_s)
        settled = self._num_steps > SETTLING_STEPS
        if settled and share > SHARE and mean_s > TIMES_USUAL * usual_s and self._quiet_s <= 0:
            self._quiet_s = QUIET_S
            log.warning(
                "the network has become slow: a step waits %.2f s for it, %.0f %% of its time, %.0f times as long as it did; a link or a host is "
                "slower than before (horoyolo doctor looks closer)",
                mean_s,
                100 * share,
                mean_s / usual_s,
            )
