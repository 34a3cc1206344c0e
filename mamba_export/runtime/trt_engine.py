"""Engines of a bundle, ready to run: which file, which plugin library, and an execution context with its bindings."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mamba_export.bundle import Bundle, file_sha256
from mamba_export.engine.backend import Backend, cache_folder
from mamba_export.engine.device import Device
from mamba_export.engine.watch import make_logger
from mamba_export.errors import BundleError, EnvironmentProblem, UsageError
from mamba_export.runtime.trt_cuda import Stream

Kind = Literal["prefill", "step"]
Row = dict[str, Any]

# TensorRT's type → how this process holds it; bfloat16, which numpy lacks, as its 16 bits.
STORAGE: dict[str, Any] = {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT32": np.int32}
STORAGE |= {"INT64": np.int64, "INT8": np.int8}
STATE_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8"}


def choose_engines(bundle: Bundle, backend: Backend, device: Device) -> dict[Kind, Row]:
    """The rows of the manifest's engine table that run prefill and step here: the newest of each.

    Raises:
        UsageError: there is none for this runtime and GPU.
        BundleError: an engine was built from other graphs than the bundle's.
    """
    fitting = [
        row
        for row in bundle.manifest.engines
        if row["runtime"] == backend.name and device.sm in row["compute_capabilities"]
    ]
    found: dict[Kind, Row] = {}
    for kind in ("prefill", "step"):
        rows = [row for row in fitting if row["kind"] in (kind, "model")]
        if not rows:
            others = sorted(
                {f"{r['runtime']} sm_{sm}" for r in bundle.manifest.engines for sm in r["compute_capabilities"]}
            )
            has = f"it has engines for {', '.join(others)}" if others else "it has no engines"
            raise UsageError(
                f"{bundle.path} has no {kind} engine for {backend.name} on {device.name} (sm_{device.sm}): {has}",
                f"build it: mamba-export build {bundle.path} --runtime {backend.name}",
            )
        found[kind] = rows[-1]
        for name, sha256 in rows[-1]["source"].items():
            if bundle.manifest.files.get(name, {}).get("sha256") != sha256:
                raise BundleError(
                    f"{rows[-1]['file']} was built from another {name} than the bundle's",
                    f"build it again: mamba-export build {bundle.path} --runtime {backend.name} --force",
                )
    return found


def find_plugin(bundle: Bundle, row: Row, named: Path | None) -> Path | None:
    """The plugin library an engine needs: the one named, beside the engine, or in the cache; None if it needs none.

    Raises:
        UsageError: the one named does not exist.
        EnvironmentProblem: it is nowhere.
    """
    if named is not None and not named.is_file():
        raise UsageError(f"no such plugin library: {named}", "make one with: mamba-export plugin build")
    if row["plugin"] is None or named is not None:
        return named
    wanted, name = row["plugin"]["sha256"], row["plugin"]["file"]
    engines = bundle.file(row["file"]).parent
    places: list[Path] = [engines / name, *sorted((cache_folder() / "plugins").glob(f"*/{name}"))]
    found = next((path for path in places if path.is_file() and file_sha256(path) == wanted), None)
    if found is None:
        raise EnvironmentProblem(
            f"{row['file']} needs the plugin library {name} it was built with (sha256 {wanted[:16]}…); "
            f"looked in {engines} and {cache_folder() / 'plugins'}",
            "name it with --plugin, or build both again: mamba-export plugin build; mamba-export build --plugin …",
        )
    return found


class LoadedEngine:
    """A deserialized engine.

    Attributes:
        row: its row in the manifest.
        engine: TensorRT's object.
        inputs: names of its inputs.
        outputs: names of its outputs.
    """

    def __init__(self, backend: Backend, bundle: Bundle, row: Row, plugin: Path | None = None) -> None:
        """Load the engine of ``row``; its plugin library first.

        Raises:
            BundleError: the file is missing, damaged, or not an engine of this bundle.
            EnvironmentProblem: TensorRT refuses it; the message is TensorRT's.
        """
        self.backend, self.row = backend, row
        library = find_plugin(bundle, row, plugin)
        if library is not None:
            backend.load_plugins(library)
        path = bundle.file(row["file"])
        if not path.is_file():
            raise BundleError(f"{path} is missing", f"build it again: mamba-export build {bundle.path}")
        if file_sha256(path) != row["sha256"]:
            raise BundleError(f"{path} is damaged: its sha256 is not the manifest's")
        self.engine = self._deserialize(path)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = {name: self.engine.get_tensor_mode(name) == backend.trt.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        self.outputs = [name for name in names if not is_input[name]]
        self._check(bundle)

    def profile(self, kind: Kind) -> int:
        """Number of the profile for ``kind``."""
        names = [profile["name"] for profile in self.row["profiles"]]
        return names.index(kind)

    def limits(self, profile: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """((least, most) rows, (least, most) tokens a row) of a profile."""
        least, _, most = (tuple(shape) for shape in self.engine.get_tensor_profile_shape("input_ids", profile))
        return (least[0], most[0]), (least[1], most[1])

    @property
    def errors(self) -> list[str]:
        """What TensorRT has complained about so far."""
        return list(self._logger.errors)

    def _deserialize(self, path: Path) -> Any:
        self._logger = logger = make_logger(self.backend.trt)
        self._runtime = self.backend.trt.Runtime(logger)
        # Mapped, not read: on a device that shares its memory with the GPU a copy of the weights may not fit.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            built, here = self.row["version"], self.backend.version
            why = "; ".join(logger.errors)[:600] or "it gives no reason"
            versions = "" if built == here else f" (built by {self.backend.name} {built})"
            raise EnvironmentProblem(
                f"{self.backend.name} {here} does not load {path.name}{versions}: {why}",
                "engines run with the version and on the kind of GPU they were built for: mamba-export build … --force",
            )
        return engine

    def _check(self, bundle: Bundle) -> None:
        """That inputs and outputs are those of the bundle's state table."""
        for state in bundle.states:
            for name in (state.name, state.present):
                if name not in (*self.inputs, *self.outputs):
                    raise BundleError(f"{self.row['file']} has no tensor {name}: it is not an engine of this bundle")
                dtype, shape = self.engine.get_tensor_dtype(name).name, tuple(self.engine.get_tensor_shape(name))
                if dtype != STATE_TYPES.get(state.dtype) or shape[1:] != state.shape:
                    raise BundleError(
                        f"{self.row['file']}: {name} is {dtype} {list(shape)}, the state table says {state.dtype} "
                        f"{['batch', *state.shape]}"
                    )


class Execution:
    """An execution context on one profile of an engine, in one stream."""

    def __init__(self, loaded: LoadedEngine, kind: Kind, stream: Stream) -> None:
        """Make the context.

        Raises:
            EnvironmentProblem: its scratch memory can't be had.
        """
        trt, self._stream, self._loaded = loaded.backend.trt, stream, loaded
        self.kind, profile = kind, loaded.profile(kind)
        self.batch_limits, self.seq_limits = loaded.limits(profile)
        # Scratch memory for this profile alone, not for the largest.
        self.context = loaded.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        if self.context is None or not self.context.set_optimization_profile_async(profile, stream.handle):
            raise EnvironmentProblem(
                f"there is not enough GPU memory to run {loaded.row['file']}",
                "build with a smaller --profile and --batch",
            )
        stream.synchronize()
        self._shape: tuple[int, int] | None = None

    @property
    def ragged(self) -> bool:
        """Whether it wants ``seq_lens``."""
        return "seq_lens" in self._loaded.inputs

    def set_shape(self, batch: int, seq: int, states: Mapping[str, Sequence[int]]) -> None:
        """Give every input its shape.

        Args:
            batch: rows.
            seq: tokens a row.
            states: shape of one row of every state input.

        Raises:
            UsageError: the engine was not built for these.
        """
        if self._shape == (batch, seq):
            return
        for what, size, (least, most), option in (
            ("rows", batch, self.batch_limits, "--batch"),
            ("tokens", seq, self.seq_limits, "--profile"),
        ):
            if not least <= size <= most:
                raise UsageError(
                    f"{self._loaded.row['file']} takes {least} to {most} {what}, not {size}",
                    f"build it for more: mamba-export build … {option} min,opt,max",
                )
        shapes: dict[str, tuple[int, ...]] = {"input_ids": (batch, seq)}
        shapes |= {"seq_lens": (batch,)} if self.ragged else {}
        shapes |= {name: (batch, *shape) for name, shape in states.items()}
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise EnvironmentProblem(f"{self._loaded.row['file']} refuses {name} of shape {list(shape)}")
        self._shape = (batch, seq)

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Say where tensors lie in device memory."""
        for name, address in addresses.items():
            if not self.context.set_tensor_address(name, address):
                raise EnvironmentProblem(f"{self._loaded.row['file']} has no tensor {name}")

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor now that the inputs have theirs."""
        return tuple(self.context.get_tensor_shape(name))

    def enqueue(self) -> None:
        """Put one execution into the stream.

        Raises:
            EnvironmentProblem: TensorRT refuses; the message is TensorRT's.
        """
        if not self.context.execute_async_v3(self._stream.handle):
            why = "; ".join(self._loaded.errors) or "it gives no reason"
            raise EnvironmentProblem(f"{self._loaded.row['file']} did not run: {why[:600]}")

    @property
    def capturable(self) -> bool:
        """Whether the engine may be captured in a CUDA graph, as far as it says."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._stream.handle))
