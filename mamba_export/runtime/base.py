"""The Runner protocol: what generation, verification and measurement need of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mamba_export.spec import ModelSpec

StateValues = Mapping[str, Any]
"""The recurrent state between two calls, by state name. Values belong to the runner that made them."""

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Runner(Protocol):
    """Runs prefill and step of one model.

    All methods are functional: a state is never changed, so it can be kept and continued from more than once.
    """

    spec: ModelSpec

    def initial_state(self, batch: int) -> StateValues:
        """Zero states for ``batch`` rows: the start of a sequence."""

    def prefill(
        self, input_ids: Ids, state: StateValues, seq_lens: NDArray[np.int32] | None = None
    ) -> tuple[Logits, StateValues]:
        """Run a piece of a sequence.

        Args:
            input_ids: [batch, seq], any seq ≥ 1.
            state: where the sequence stands.
            seq_lens: valid length of each right-padded row, for runners of ragged graphs.

        Returns:
            float32 logits [batch, 1 or seq, vocab] and the state after the last valid token of each row.
        """

    def step(self, input_ids: Ids, state: StateValues) -> tuple[Logits, StateValues]:
        """Run one token a row: ``input_ids`` [batch, 1] → logits [batch, 1, vocab] and the next state."""

    def state_to_numpy(self, state: StateValues) -> dict[str, NDArray[Any]]:
        """A copy of the state on the host, in the layout of the runner's state table; int8 states as float32."""

    def state_from_numpy(self, arrays: dict[str, NDArray[Any]]) -> StateValues:
        """Put host arrays [batch, …], named and laid out as in the state table, where the engine reads them."""
