"""The decode loop in ONNX Runtime: IO binding over two sets of state buffers that swap roles at every step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.runtime.base import Ids, Logits
from mamba_export.states import State

if TYPE_CHECKING:
    import onnxruntime as ort


class OrtStepLoop:
    """Steps without allocations or copies around them; see :class:`mamba_export.runtime.loop.StepLoop`.

    The graph can't read and write one buffer, so there are two sets: a step reads one and writes the other. Each
    direction has its own binding, made once; a step then is one write of the token ids and one call.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        states: Sequence[State],
        start: Mapping[str, ort.OrtValue],
        batch: int,
        vocab_size: int,
        device: str,
    ) -> None:
        """Copy ``start`` into the first set of buffers.

        Args:
            session: of the step graph.
            states: the state table.
            start: state values to begin from; they are left alone.
            batch: rows.
            vocab_size: columns of the logits.
            device: ``cpu`` or ``cuda``.
        """
        import onnxruntime

        self._session, self._states, self._device = session, states, device
        self.engine_seconds = 0.0
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        self._ids = np.zeros((batch, 1), np.int64)
        self._ids_value = make(self._ids, device, 0)
        self._logits = np.zeros((batch, 1, vocab_size), np.float32)
        logits = make(self._logits, "cpu", 0)  # on the CPU an OrtValue shares the array's memory
        # The arrays behind CPU values must outlive them.
        # numpy() may be a view of memory that dies with its OrtValue.
        first = {s.name: np.array(start[s.name].numpy()) for s in states}
        self._arrays = [first, {name: np.empty_like(array) for name, array in first.items()}]
        self._sets = [{name: make(array, device, 0) for name, array in side.items()} for side in self._arrays]
        self._bindings = [self._bind(logits, self._sets[i], self._sets[1 - i]) for i in range(2)]
        self._turn = 0

    def _bind(
        self, logits: ort.OrtValue, past: dict[str, ort.OrtValue], present: dict[str, ort.OrtValue]
    ) -> ort.IOBinding:
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("input_ids", self._ids_value)
        binding.bind_ortvalue_output("logits", logits)
        for state in self._states:
            binding.bind_ortvalue_input(state.name, past[state.name])
            binding.bind_ortvalue_output(state.present, present[state.name])
        return binding

    def step(self, input_ids: Ids) -> Logits:
        self._ids[:] = input_ids
        if self._device != "cpu":
            self._ids_value.update_inplace(self._ids)
        started = time.perf_counter()
        self._session.run_with_iobinding(self._bindings[self._turn])
        self.engine_seconds += time.perf_counter() - started
        self._turn = 1 - self._turn
        return self._logits

    def state_to_numpy(self) -> dict[str, NDArray[Any]]:
        return {name: np.array(value.numpy()) for name, value in self._sets[self._turn].items()}
