"""Run a bundle's TensorRT or TensorRT-RTX engines on an NVIDIA GPU.

Nothing but TensorRT's Python module and CUDA's runtime library is needed, no torch: this is what runs on a device.
States live in device memory, one block a set. A call reads one set and writes another, never the same: an engine may
write an output before it has read all of an input. Under the decode loop two sets take turns (:mod:`.trt_loop`).
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.bundle import Bundle
from mamba_export.engine.backend import load_backend
from mamba_export.engine.device import find_device
from mamba_export.errors import EnvironmentProblem
from mamba_export.runtime.base import Ids, Logits, StateValues
from mamba_export.runtime.trt_cuda import DeviceMemory, Stream, align
from mamba_export.runtime.trt_engine import STATE_TYPES, STORAGE, Execution, Kind, LoadedEngine, choose_engines
from mamba_export.runtime.trt_loop import StepMachine, TrtStepLoop
from mamba_export.states import State, from_float, to_float


class DeviceStates(Mapping[str, int]):
    """One set of states in device memory: name → address. Its memory goes back to the pool with it."""

    def __init__(self, pool: StatePool, memory: DeviceMemory, batch: int) -> None:
        self.batch, self.memory = batch, memory
        self._addresses = {name: memory.address + offset for name, offset in pool.offsets(batch).items()}
        weakref.finalize(self, pool.give_back, memory).atexit = False

    def __getitem__(self, name: str) -> int:
        return self._addresses[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._addresses)

    def __len__(self) -> int:
        return len(self._addresses)


class StatePool:
    """Makes sets of states, and uses the memory of those that are gone again."""

    def __init__(self, states: list[State]) -> None:
        self.states = states
        self.shapes = {state.name: state.shape for state in states}
        self.storage = {state.name: np.dtype(STORAGE[STATE_TYPES[state.dtype]]) for state in states}
        self._free: dict[int, list[DeviceMemory]] = {}

    def offsets(self, batch: int) -> dict[str, int]:
        """Where each state begins in a set's memory."""
        offsets, at = {}, 0
        for name in self.shapes:
            offsets[name] = at
            at += align(self.nbytes(name, batch))
        return offsets

    def nbytes(self, name: str, batch: int) -> int:
        """Bytes of one state."""
        return batch * math.prod(self.shapes[name]) * int(self.storage[name].itemsize)

    def total(self, batch: int) -> int:
        """Bytes of a set."""
        return sum(align(self.nbytes(name, batch)) for name in self.shapes)

    def take(self, batch: int) -> DeviceStates:
        """A set; its memory holds anything."""
        total = self.total(batch)
        free = self._free.get(total)
        return DeviceStates(self, free.pop() if free else DeviceMemory(total), batch)

    def give_back(self, memory: DeviceMemory) -> None:
        """Take the memory of a set that is gone; one spare of a size is kept beside the one in turn."""
        spare = self._free.setdefault(memory.nbytes, [])
        if len(spare) < 2:
            spare.append(memory)


class TrtRunner:
    """A bundle's engines; see :class:`mamba_export.runtime.base.Runner`.

    Each engine is loaded at its first use. A bundle with one engine for both (``build --single-engine``) loads it once
    and runs it in two contexts, one a profile.
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: str = "tensorrt",
        plugin: str | Path | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Prepare to run ``bundle``.

        Args:
            bundle: an open bundle with engines for this GPU.
            runtime: ``tensorrt`` or ``tensorrt-rtx``.
            plugin: the plugin library, where the engines need one; found beside them or in the cache when None.
            cuda_graphs: replay steps as CUDA graphs where the engine allows it.

        Raises:
            MissingExtraError: TensorRT's Python module is not installed.
            EnvironmentProblem: there is no NVIDIA GPU, or no CUDA runtime library.
            UsageError: the bundle has no engines for this GPU.
        """
        backend, device = load_backend(runtime, "running engines"), find_device()
        if device is None:
            raise EnvironmentProblem("there is no NVIDIA GPU here", "run this on the device; here: --runtime ort")
        self.bundle, self.spec, self.backend, self.cuda_graphs = bundle, bundle.spec, backend, cuda_graphs
        self._rows = choose_engines(bundle, backend, device)
        self._plugin = None if plugin is None else Path(plugin)
        self._stream = Stream()
        self._pool = StatePool(bundle.states)
        self._loaded: dict[str, LoadedEngine] = {}
        self._scratch: dict[str, DeviceMemory] = {}
        self._machines: dict[int, list[StepMachine]] = {}

    @property
    def ragged(self) -> bool:
        """Whether ``prefill`` takes ``seq_lens``."""
        return self.bundle.manifest.ragged

    @property
    def max_batch(self) -> int:
        """The most rows both engines take."""
        sizes = [
            profile["batch"][2]
            for kind in self._rows
            for profile in self._rows[kind]["profiles"]
            if profile["name"] == kind
        ]
        return int(min(sizes))

    @functools.cached_property
    def prefill_execution(self) -> Execution:
        """The context that runs prefill."""
        return Execution(self._engine("prefill"), "prefill", self._stream)

    @functools.cached_property
    def step_execution(self) -> Execution:
        """The context that runs single steps outside a loop."""
        return Execution(self._engine("step"), "step", self._stream)

    def initial_state(self, batch: int) -> StateValues:
        states = self._pool.take(batch)
        self._stream.zero_async(states.memory.address, states.memory.nbytes)
        return states

    def state_from_numpy(self, arrays: dict[str, NDArray[Any]]) -> StateValues:
        states = self._pool.take(next(iter(arrays.values())).shape[0])
        held = from_float(arrays, self.bundle.states)
        for name, address in states.items():
            self._stream.upload(address, to_storage(held[name], self._pool.storage[name]))
        return states

    def state_to_numpy(self, state: StateValues) -> dict[str, NDArray[Any]]:
        assert isinstance(state, DeviceStates)
        arrays = {}
        for name, address in state.items():
            array = np.empty((state.batch, *self._pool.shapes[name]), self._pool.storage[name])
            self._stream.download(array, address)
            arrays[name] = from_storage(array)
        return to_float(arrays, self.bundle.states)

    def prefill(
        self, input_ids: Ids, state: StateValues, seq_lens: NDArray[np.int32] | None = None
    ) -> tuple[Logits, StateValues]:
        batch, length = input_ids.shape
        if seq_lens is not None and not self.ragged and np.any(seq_lens != length):
            raise ValueError("this bundle's graph takes no seq_lens: export it with --ragged")
        lens = np.full(batch, length, np.int32) if seq_lens is None else seq_lens.astype(np.int32)
        parts, start = [], 0
        least, most = self.prefill_execution.seq_limits
        for piece in pieces(length, least, most):
            valid = np.clip(lens - start, 0, piece).astype(np.int32)
            logits, state = self._run(self.prefill_execution, input_ids[:, start : start + piece], state, valid)
            parts.append((logits, valid))
            start += piece
        if self.bundle.manifest.logits == "all":
            return np.concatenate([logits for logits, _ in parts], axis=1), state
        final = parts[0][0]
        for logits, valid in parts[1:]:  # a row's last logits are those of its last piece with a token
            final = np.where((valid > 0)[:, None, None], logits, final)
        return final, state

    def step(self, input_ids: Ids, state: StateValues) -> tuple[Logits, StateValues]:
        return self._run(self.step_execution, input_ids, state, np.ones(input_ids.shape[0], np.int32))

    def step_loop(self, state: StateValues, batch: int) -> TrtStepLoop:
        """A decode loop that starts from ``state`` of ``batch`` rows and changes its own copy."""
        idle = self._machines.setdefault(batch, [])
        machine = idle.pop() if idle else self._machine(batch)
        return TrtStepLoop(machine, state, self.state_to_numpy, idle)

    def _machine(self, batch: int) -> StepMachine:
        execution = Execution(self._engine("step"), "step", self._stream)  # a captured context must stay as it is
        execution.set_shape(batch, 1, self._pool.shapes)
        sets = (self._pool.take(batch), self._pool.take(batch))
        return StepMachine(execution, self._stream, sets, self.spec.vocab_size, self.cuda_graphs)

    def _engine(self, kind: Kind) -> LoadedEngine:
        row = self._rows[kind]
        if row["file"] not in self._loaded:
            self._loaded[row["file"]] = LoadedEngine(self.backend, self.bundle, row, self._plugin)
        return self._loaded[row["file"]]

    def _run(
        self, execution: Execution, ids: Ids, state: StateValues, seq_lens: NDArray[np.int32]
    ) -> tuple[Logits, StateValues]:
        batch, seq = ids.shape
        execution.set_shape(batch, seq, self._pool.shapes)
        after = self._pool.take(batch)
        feed: dict[str, NDArray[Any]] = {"input_ids": np.ascontiguousarray(ids, np.int64)}
        if execution.ragged:
            feed["seq_lens"] = np.ascontiguousarray(seq_lens)
        logits = np.empty(execution.shape_of("logits"), np.float32)
        addresses = {"logits": self._scratch_for("logits", logits.nbytes), **state}
        addresses |= {f"present_{name}": address for name, address in after.items()}
        for name, array in feed.items():
            addresses[name] = self._scratch_for(name, array.nbytes)
            self._stream.upload(addresses[name], array)
        execution.bind(addresses)
        execution.enqueue()
        self._stream.download(logits, addresses["logits"])
        return logits, after

    def _scratch_for(self, name: str, nbytes: int) -> int:
        """Device memory for ids and logits, which grows as needed and is kept."""
        memory = self._scratch.get(name)
        if memory is None or memory.nbytes < nbytes:
            self._stream.synchronize()
            self._scratch[name] = memory = DeviceMemory(nbytes)
        return memory.address


def pieces(length: int, least: int, most: int) -> list[int]:
    """Lengths of at most ``most`` that add up to ``length``, none below ``least`` where that can be."""
    found = [most] * (length // most)
    rest = length % most
    if rest and found and rest < least:
        found[-1] -= least - rest
        rest = least
    return found + ([rest] if rest else [])


def to_storage(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A host array as the device holds it; bfloat16 is rounded to nearest even and held as its 16 bits."""
    if dtype != np.uint16 or array.dtype == np.uint16:
        return np.ascontiguousarray(array, dtype)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = np.where(np.isnan(array), (bits >> 16) | 0x40, rounded)
    return np.ascontiguousarray(quiet.astype(np.uint16))


def from_storage(array: NDArray[Any]) -> NDArray[Any]:
    """The other way round: bfloat16 becomes float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
