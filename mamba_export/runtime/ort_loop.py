"""The decode loop in ONNX Runtime: IO binding over two sets of state buffers that swap roles at every step."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.runtime.base import Ids, Logits
from mamba_export.runtime.ort_session import GRAPH_ID, state_dtype
from mamba_export.states import State, to_float

if TYPE_CHECKING:
    import onnxruntime as ort


_graph_ids = itertools.count(1)


class StepBuffers:
    """Two sets of state buffers, a binding from each to the other, and where the token ids and the logits lie."""

    def __init__(
        self,
        session: ort.InferenceSession,
        states: Sequence[State],
        batch: int,
        vocab_size: int,
        device: str,
        cuda_graph: bool = False,
    ) -> None:
        """Make buffers.

        Args:
            session: of the step graph.
            states: the state table.
            batch: rows.
            vocab_size: columns of the logits.
            device: ``cpu`` or ``cuda``.
            cuda_graph: the session records CUDA graphs: one a binding, each under a number of its own.
        """
        import onnxruntime

        self.states, self.device, self.cuda_graph = states, device, cuda_graph
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        # On the CPU an OrtValue shares the array's memory: the arrays must outlive it.
        self.ids = np.zeros((batch, 1), np.int64)
        self.ids_value = make(self.ids, device, 0)
        self.logits = np.zeros((batch, 1, vocab_size), np.float32)
        # A recorded graph writes what lies on the device alone.
        self.logits_value = make(self.logits, device if cuda_graph else "cpu", 0)
        self.arrays = [{s.name: np.zeros((batch, *s.shape), state_dtype(s, device)) for s in states} for _ in range(2)]
        self.sets = [{name: make(array, device, 0) for name, array in side.items()} for side in self.arrays]
        self.bindings = [self._bind(session, self.sets[i], self.sets[1 - i]) for i in range(2)]
        self.options = [onnxruntime.RunOptions() for _ in range(2)]
        for options in self.options if cuda_graph else []:
            options.add_run_config_entry(GRAPH_ID, str(next(_graph_ids)))

    def _bind(
        self, session: ort.InferenceSession, past: dict[str, ort.OrtValue], present: dict[str, ort.OrtValue]
    ) -> ort.IOBinding:
        binding = session.io_binding()
        binding.bind_ortvalue_input("input_ids", self.ids_value)
        binding.bind_ortvalue_output("logits", self.logits_value)
        for state in self.states:
            binding.bind_ortvalue_input(state.name, past[state.name])
            binding.bind_ortvalue_output(state.present, present[state.name])
        return binding

    def load(self, start: Mapping[str, ort.OrtValue]) -> None:
        """Copy ``start`` into the first set."""
        for state in self.states:
            value = start[state.name].numpy()
            if self.device == "cpu":
                self.arrays[0][state.name][...] = value
            else:
                self.sets[0][state.name].update_inplace(value)


class OrtStepLoop:
    """Steps without allocations or copies around them; see :class:`mamba_export.runtime.loop.StepLoop`.

    The graph can't read and write one buffer, so there are two sets: a step reads one and writes the other. Each
    direction has its own binding, made once; a step then is one write of the token ids and one call. On a GPU, where
    each direction is a CUDA graph, the logits are what comes back to the host.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        buffers: StepBuffers,
        start: Mapping[str, ort.OrtValue],
        pool: list[StepBuffers],
    ) -> None:
        """Copy ``start`` into the buffers.

        Args:
            session: of the step graph.
            buffers: no other loop uses them.
            start: state values to begin from; they are left alone.
            pool: takes the buffers when the loop is gone, with what has been recorded over them.
        """
        self._session, self._buffers, self._turn = session, buffers, 0
        self.engine_seconds = 0.0
        buffers.load(start)
        weakref.finalize(self, pool.append, buffers).atexit = False

    def step(self, input_ids: Ids) -> Logits:
        b = self._buffers
        b.ids[:] = input_ids
        if b.device != "cpu":
            b.ids_value.update_inplace(b.ids)
        started = time.perf_counter()
        self._session.run_with_iobinding(b.bindings[self._turn], b.options[self._turn])
        logits: Logits = b.logits_value.numpy() if b.cuda_graph else b.logits
        self.engine_seconds += time.perf_counter() - started
        self._turn = 1 - self._turn
        return logits

    def state_to_numpy(self) -> dict[str, NDArray[Any]]:
        arrays = {name: np.array(value.numpy()) for name, value in self._buffers.sets[self._turn].items()}
        return to_float(arrays, self._buffers.states)
