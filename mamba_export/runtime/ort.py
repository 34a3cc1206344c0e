"""Run a bundle in ONNX Runtime, on the CPU or an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.bundle import PREFILL, STEP, Bundle
from mamba_export.errors import EnvironmentProblem, MissingExtraError
from mamba_export.extras import available
from mamba_export.runtime.base import Ids, Logits, StateValues
from mamba_export.runtime.ort_loop import OrtStepLoop, StepBuffers
from mamba_export.runtime.ort_session import AUTO, GRAPH_ID, PROVIDERS, make_session, state_dtype
from mamba_export.states import from_float, to_float

if TYPE_CHECKING:
    import onnxruntime as ort


class OrtRunner:
    """A bundle in ONNX Runtime; see :class:`mamba_export.runtime.base.Runner`.

    ``session_options`` are the keyword arguments of its sessions; see :func:`.ort_session.make_session`.
    States stay in ONNX Runtime's own memory between calls, on a GPU on the device. Each graph is loaded at its first
    use, so a loop of steps never holds the prefill graph. On a GPU a loop of steps replays CUDA graphs wherever all
    nodes of the step graph run there.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        threads: int | None = None,
        suited: bool = True,
        library: str | Path | None = AUTO,
        low_memory: bool = False,
    ) -> None:
        """Prepare to run ``bundle``.

        Args:
            bundle: an open bundle.
            device: ``cpu`` or ``cuda``.
            threads: of the CPU; ONNX Runtime's choice when None.
            suited: take the graphs that suit ``device`` best, where the bundle has two pairs.
            library: computes plugin ops; see :func:`mamba_export.runtime.ort_session.make_session`.
            low_memory: keep no second copy of the weights; steps are slower for it.

        Raises:
            MissingExtraError: ONNX Runtime is not installed.
            EnvironmentProblem: this ONNX Runtime can't use ``device``.
        """
        if not available("onnxruntime"):
            raise MissingExtraError("onnxruntime", "gpu" if device == "cuda" else "cpu", "running a bundle")
        import onnxruntime

        if PROVIDERS[device] not in onnxruntime.get_available_providers():
            raise EnvironmentProblem(
                f"this onnxruntime has no {PROVIDERS[device]}",
                'pip install "mamba-export[gpu]"' if device == "cuda" else None,
            )
        self.bundle, self.spec, self.device = bundle, bundle.spec, device
        self.cuda_graph = False
        self._pools: dict[int, list[StepBuffers]] = {}  # by batch: of loops that have ended
        self.session_options: dict[str, Any] = {
            "threads": threads,
            "suited": suited,
            "library": library,
            "low_memory": low_memory,
        }

    @functools.cached_property
    def prefill_session(self) -> ort.InferenceSession:
        """The session of prefill.onnx."""
        return make_session(self.bundle, PREFILL, self.device, **self.session_options)

    @functools.cached_property
    def step_session(self) -> ort.InferenceSession:
        """The session of step.onnx; ``cuda_graph`` then says whether it can record CUDA graphs."""
        if self.device == "cuda":
            with contextlib.suppress(EnvironmentProblem):  # some node has no CUDA kernel: nothing can be recorded
                session = make_session(self.bundle, STEP, self.device, **self.session_options, cuda_graph=True)
                self.cuda_graph = True
                return session
        return make_session(self.bundle, STEP, self.device, **self.session_options)

    def initial_state(self, batch: int) -> StateValues:
        states, device = self.bundle.states, self.device
        return self._place({s.name: np.zeros((batch, *s.shape), state_dtype(s, device)) for s in states})

    def state_from_numpy(self, arrays: dict[str, NDArray[Any]]) -> StateValues:
        """Put host arrays, named as in the state table, where the engine reads them; see :meth:`state_to_numpy`."""
        return self._place(from_float(arrays, self.bundle.states))

    def _place(self, arrays: dict[str, NDArray[Any]]) -> StateValues:
        import onnxruntime

        make = onnxruntime.OrtValue.ortvalue_from_numpy
        return {name: make(array, self.device, 0) for name, array in arrays.items()}

    def state_to_numpy(self, state: StateValues) -> dict[str, NDArray[Any]]:
        """Host arrays; an int8 state becomes float32, without its scale."""
        arrays = {name: np.array(value.numpy()) for name, value in state.items()}  # numpy() may be a view
        return to_float(arrays, self.bundle.states)

    def prefill(
        self, input_ids: Ids, state: StateValues, seq_lens: NDArray[np.int32] | None = None
    ) -> tuple[Logits, StateValues]:
        feed: dict[str, NDArray[Any]] = {"input_ids": input_ids}
        if self.bundle.manifest.ragged:
            full = np.full(input_ids.shape[0], input_ids.shape[1], np.int32)
            feed["seq_lens"] = full if seq_lens is None else seq_lens.astype(np.int32)
        elif seq_lens is not None and np.any(seq_lens != input_ids.shape[1]):
            raise ValueError("this bundle's graph takes no seq_lens: export it with --ragged")
        return self._run(self.prefill_session, feed, state)

    def step(self, input_ids: Ids, state: StateValues) -> tuple[Logits, StateValues]:
        return self._run(self.step_session, {"input_ids": input_ids}, state)

    @property
    def ragged(self) -> bool:
        """Whether ``prefill`` takes ``seq_lens``."""
        return self.bundle.manifest.ragged

    def step_loop(self, state: StateValues, batch: int) -> OrtStepLoop:
        """A decode loop that starts from ``state`` of ``batch`` rows and changes its own copy in place."""
        session = self.step_session
        pool = self._pools.setdefault(batch, []) if self.cuda_graph else []  # what has been recorded is worth keeping
        if pool:
            return OrtStepLoop(session, pool.pop(), state, pool)
        states, vocab_size = self.bundle.states, self.spec.vocab_size
        buffers = StepBuffers(session, states, batch, vocab_size, self.device, self.cuda_graph)
        return OrtStepLoop(session, buffers, state, pool)

    def _run(
        self, session: ort.InferenceSession, feed: dict[str, NDArray[Any]], state: StateValues
    ) -> tuple[Logits, StateValues]:
        import onnxruntime

        make = onnxruntime.OrtValue.ortvalue_from_numpy
        values = {name: make(np.ascontiguousarray(array), self.device, 0) for name, array in feed.items()}
        if self.device == "cpu":
            outputs = session.run_with_ort_values(self._output_names, {**values, **state})
        else:  # without a binding outputs come back to the host
            binding = session.io_binding()
            for name, value in {**values, **state}.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._output_names:
                binding.bind_output(name, "cpu" if name == "logits" else self.device, 0)
            options = onnxruntime.RunOptions()
            options.add_run_config_entry(GRAPH_ID, "-1")
            session.run_with_iobinding(binding, options)
            outputs = binding.get_outputs()
        logits, *presents = outputs
        return logits.numpy(), {s.name: value for s, value in zip(self.bundle.states, presents, strict=True)}

    @functools.cached_property
    def _output_names(self) -> Sequence[str]:
        return ["logits", *(state.present for state in self.bundle.states)]
