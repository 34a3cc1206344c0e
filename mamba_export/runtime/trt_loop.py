"""The decode loop on an engine: two sets of state buffers that take turns, each direction one CUDA graph."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.errors import EnvironmentProblem
from mamba_export.runtime.base import Ids, Logits, StateValues
from mamba_export.runtime.trt_cuda import DeviceMemory, Graph, HostMemory, Stream

if TYPE_CHECKING:
    from mamba_export.runtime.trt import DeviceStates
    from mamba_export.runtime.trt_engine import Execution


class StepMachine:
    """Everything a loop of steps needs, made once for a batch size and used by one loop after the other.

    A step is: token ids from page-locked memory to the device, the engine, logits back. Where the engine can be
    captured, each direction (set 0 to set 1, and back) is a CUDA graph of all three, launched with one call. Buffers
    and the execution context belong to the machine alone, because graphs hold their addresses.

    Attributes:
        sets: the two sets of states.
        ids: page-locked token ids [batch, 1].
        logits: page-locked logits [batch, 1, vocab].
        why_not_graphs: why steps are not replayed as CUDA graphs; empty when they are.
    """

    def __init__(
        self,
        execution: Execution,
        stream: Stream,
        sets: tuple[DeviceStates, DeviceStates],
        vocab_size: int,
        cuda_graphs: bool,
    ) -> None:
        batch = sets[0].batch
        self.stream, self.sets, self._execution = stream, sets, execution
        self.ids, self.logits = HostMemory((batch, 1), np.int64), HostMemory((batch, 1, vocab_size), np.float32)
        self._fixed = {"input_ids": DeviceMemory(self.ids.nbytes), "logits": DeviceMemory(self.logits.nbytes)}
        if execution.ragged:
            self._fixed["seq_lens"] = DeviceMemory(batch * 4)
            stream.upload(self._fixed["seq_lens"].address, np.ones(batch, np.int32))
        self._addresses = [self._bindings(sets[turn], sets[1 - turn]) for turn in (0, 1)]
        self._bound: int | None = None
        self.why_not_graphs = "not wanted" if not cuda_graphs else ""
        self._graphs: list[Graph] = []
        if cuda_graphs:
            try:
                self._graphs = self._capture()
            except EnvironmentProblem as error:
                self.why_not_graphs, self._bound = str(error), None

    def load(self, state: Mapping[str, int], memory: DeviceMemory) -> None:
        """Copy a set of states into set 0."""
        assert len(state) == len(self.sets[0])
        self.stream.copy_async(self.sets[0].memory.address, memory.address, memory.nbytes)

    def run(self, turn: int) -> None:
        """One step from set ``turn`` to the other, waited for."""
        if self._graphs:
            self._graphs[turn].launch(self.stream)
        else:
            self._bind(turn)
            self._enqueue()
        self.stream.synchronize()

    def _bindings(self, past: Mapping[str, int], present: Mapping[str, int]) -> dict[str, int]:
        addresses = {name: memory.address for name, memory in self._fixed.items()}
        return {**addresses, **past, **{f"present_{name}": address for name, address in present.items()}}

    def _bind(self, turn: int) -> None:
        if self._bound != turn:
            self._execution.bind(self._addresses[turn])
            self._bound = turn

    def _enqueue(self) -> None:
        self.stream.upload_async(self._fixed["input_ids"].address, self.ids.address, self.ids.nbytes)
        self._execution.enqueue()
        self.stream.download_async(self.logits.address, self._fixed["logits"].address, self.logits.nbytes)

    def _capture(self) -> list[Graph]:
        """Both directions. TensorRT wants one plain run in the shapes first; its results are overwritten later."""
        for states in self.sets:
            self.stream.zero_async(states.memory.address, states.memory.nbytes)
        self._bind(0)
        self._enqueue()
        self.stream.synchronize()
        if not self._execution.capturable:
            raise EnvironmentProblem("this engine can't be captured in a CUDA graph")
        graphs = []
        for turn in (0, 1):
            self._bind(turn)
            graphs.append(self.stream.capture(self._enqueue))
        return graphs


class TrtStepLoop:
    """Steps on an engine; see :class:`mamba_export.runtime.loop.StepLoop`. Nothing is allocated in a step."""

    def __init__(
        self,
        machine: StepMachine,
        start: StateValues,
        to_numpy: Callable[[StateValues], dict[str, NDArray[Any]]],
        idle: list[StepMachine],
    ) -> None:
        """Take ``machine`` until this loop is gone.

        Args:
            machine: runs the steps.
            start: states to begin from; they are copied.
            to_numpy: copies a set of states to the host.
            idle: where the machine goes afterwards.
        """
        self.machine, self._to_numpy = machine, to_numpy
        self.engine_seconds = 0.0
        self._turn = 0
        machine.load(start, start.memory)  # type: ignore[attr-defined]
        machine.stream.synchronize()
        weakref.finalize(self, idle.append, machine).atexit = False

    @property
    def graphed(self) -> bool:
        """Whether steps are replayed as CUDA graphs."""
        return not self.machine.why_not_graphs

    def step(self, input_ids: Ids) -> Logits:
        self.machine.ids.array[:] = input_ids
        started = time.perf_counter()
        self.machine.run(self._turn)
        self.engine_seconds += time.perf_counter() - started
        self._turn = 1 - self._turn
        return self.machine.logits.array

    def state_to_numpy(self) -> dict[str, NDArray[Any]]:
        return self._to_numpy(self.machine.sets[self._turn])
