"""The decode loop's engine side: one token a row, over and over, on states that change in place."""

from __future__ import annotations

import time
from typing import Any, Protocol

from numpy.typing import NDArray

from mamba_export.runtime.base import Ids, Logits, Runner, StateValues


class StepLoop(Protocol):
    """Runs steps one after another on its own states.

    Attributes:
        engine_seconds: time spent inside the engine so far; what a caller spends beyond it is the loop's own cost.
    """

    engine_seconds: float

    def step(self, input_ids: Ids) -> Logits:
        """Run one token a row: [batch, 1] → logits [batch, 1, vocab], overwritten by the next call."""

    def state_to_numpy(self) -> dict[str, NDArray[Any]]:
        """A copy of the state on the host, in the layout of the runner's state table."""


class FunctionalLoop:
    """A loop over a runner's functional ``step``, for runners that have none of their own."""

    def __init__(self, runner: Runner, state: StateValues) -> None:
        self._runner, self._state = runner, state
        self.engine_seconds = 0.0

    def step(self, input_ids: Ids) -> Logits:
        started = time.perf_counter()
        logits, self._state = self._runner.step(input_ids, self._state)
        self.engine_seconds += time.perf_counter() - started
        return logits

    def state_to_numpy(self) -> dict[str, NDArray[Any]]:
        return self._runner.state_to_numpy(self._state)


def step_loop(runner: Runner, state: StateValues, batch: int) -> StepLoop:
    """The best loop ``runner`` has, starting from ``state`` of ``batch`` rows. ``state`` itself stays as it is."""
    make = getattr(runner, "step_loop", None)
    if make is None:
        return FunctionalLoop(runner, state)
    loop: StepLoop = make(state, batch)
    return loop
