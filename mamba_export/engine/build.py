"""Engines of a bundle: ONNX → TensorRT, strongly typed, with optimization profiles, atomically into engines/."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mamba_export.bundle import PREFILL, STEP, WEIGHTS, Bundle, file_sha256
from mamba_export.engine.backend import Backend, RuntimeName, cache_folder, load_backend
from mamba_export.engine.device import Device, find_device
from mamba_export.engine.profiles import DEFAULT_BATCH, DEFAULT_SEQ, ONE, Profile, Range
from mamba_export.engine.watch import make_logger, make_monitor, run_cancellable
from mamba_export.errors import EnvironmentProblem, OutputExistsError, UsageError
from mamba_export.progress import Progress, silent

ENGINES = "engines"
LOW_MEMORY = 16e9
"""Devices with less memory hold the weights once: one engine with two profiles."""


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built.

    Attributes:
        runtime: ``tensorrt`` (for the GPU of this machine) or ``tensorrt-rtx`` (for the GPUs named in ``sm``).
        sm: compute capabilities, e.g. ``("86", "120")``. Empty: of the GPU that is there.
        plugin: the plugin library, or None to build through the function bodies.
        batch: of both graphs.
        seq: of prefill.
        single_engine: one engine of the prefill graph with a second profile for one token, so that the weights are
            held once. None: on devices with less than 16 GB.
        workspace: bytes of scratch memory a tactic may use; TensorRT's default when None.
        optimization_level: 0 to 5; TensorRT's default when None.
        timing_cache: file that remembers measurements between builds. None: one a version and GPU in the user's cache.
    """

    runtime: RuntimeName = "tensorrt"
    sm: tuple[str, ...] = ()
    plugin: Path | None = None
    batch: Range = DEFAULT_BATCH
    seq: Range = DEFAULT_SEQ
    single_engine: bool | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None


@dataclass
class BuildResult:
    """What :func:`build_engines` made: entries of the manifest's engine table, and warnings of TensorRT."""

    engines: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """One engine to build."""

    kind: Literal["prefill", "step", "model"]
    graph: str
    profiles: tuple[Profile, ...]


def build_engines(
    bundle: Bundle, options: BuildOptions | None = None, *, force: bool = False, progress: Progress = silent
) -> BuildResult:
    """Build the engines of a bundle, write them under ``engines/`` and enter them in the manifest.

    Args:
        bundle: of a target that TensorRT reads: ``tensorrt``, ``tensorrt-10.3`` or ``portable``.
        options: see :class:`BuildOptions`.
        force: replace engines of the same name.
        progress: gets told what is being done.

    Raises:
        UsageError: the bundle or the options don't fit the runtime; or the engine is there (OutputExistsError).
        EnvironmentProblem: a package or a GPU is missing, or TensorRT can't build the graph; the message is TensorRT's.
    """
    options = options or BuildOptions()
    if bundle.target.flavour == "ort":
        raise UsageError(
            f"a bundle of target '{bundle.target.name}' holds ONNX Runtime's own ops, which TensorRT does not read",
            "export it with --target tensorrt",
        )
    backend = load_backend(options.runtime)
    sm = _compute_capabilities(backend, options.sm)
    plans = _plans(options, find_device())
    files = {plan: f"{ENGINES}/{plan.kind}-{backend.name}-{'-'.join('sm' + s for s in sm)}.engine" for plan in plans}
    for name in files.values():
        if bundle.file(name).exists() and not force:
            raise OutputExistsError(f"{bundle.file(name)} exists", "add --force to replace it")
    if options.plugin is not None:
        backend.load_plugins(options.plugin)
    result = BuildResult([])
    for plan, name in files.items():
        started = time.monotonic()
        job = _Job(backend, bundle, plan, options, sm)
        with progress.stage(f"build {plan.kind}", total=100) as tick:
            data = job.run(tick)
        _write(bundle.file(name), data)
        entry = job.entry(name, data, time.monotonic() - started)
        bundle.manifest.engines = [e for e in bundle.manifest.engines if e["file"] != name] + [entry]
        bundle.save_manifest()
        if options.plugin is not None:  # so that the bundle has all it needs
            _write(bundle.file(f"{ENGINES}/{options.plugin.name}"), options.plugin.read_bytes())
        result.engines.append(entry)
        result.warnings += job.logger.warnings
    return result


def _plans(options: BuildOptions, device: Device | None) -> list[_Plan]:
    prefill, step = Profile("prefill", options.batch, options.seq), Profile("step", options.batch, ONE)
    single = options.single_engine
    if single is None:
        single = device is not None and not options.sm and device.memory < LOW_MEMORY
    if single:
        return [_Plan("model", PREFILL, (prefill, step))]
    return [_Plan("prefill", PREFILL, (prefill,)), _Plan("step", STEP, (step,))]


def _compute_capabilities(backend: Backend, wanted: Sequence[str]) -> tuple[str, ...]:
    """The compute capabilities to build for, as numbers without a dot.

    Raises:
        UsageError: the runtime can't build for one of them.
        EnvironmentProblem: none was named and there is no GPU.
    """
    sm = tuple(dict.fromkeys(s.lower().removeprefix("sm").lstrip("_").replace(".", "") for s in wanted))
    device = find_device()
    if backend.ahead_of_time:
        known = [n.removeprefix("SM") for n in backend.trt.ComputeCapability.__members__ if n.startswith("SM")]
        for number in sm:
            if number not in known:
                raise UsageError(f"TensorRT-RTX does not build for sm_{number}", f"one of: {', '.join(known)}")
    elif sm and (device is None or sm != (device.sm,)):
        raise UsageError(
            "TensorRT builds for the GPU of the machine it runs on, --sm is for --runtime tensorrt-rtx",
            "run this on the device; or take a folder there with: mamba-export kit",
        )
    if sm:
        return sm
    if device is None:
        raise EnvironmentProblem(
            "there is no NVIDIA GPU here",
            "name the GPUs with --sm (86, 89, 120, …)" if backend.ahead_of_time else "run this on the device",
        )
    return (device.sm,)


class _Job:
    """Builds one engine."""

    def __init__(
        self, backend: Backend, bundle: Bundle, plan: _Plan, options: BuildOptions, sm: tuple[str, ...]
    ) -> None:
        self.backend, self.trt, self.bundle, self.plan = backend, backend.trt, bundle, plan
        self.options, self.sm = options, sm
        self.logger = make_logger(self.trt)
        self.layers: Counter[str] = Counter()

    def run(self, tick: Any) -> bytes:
        """The serialized engine."""
        builder = self.trt.Builder(self.logger)
        network = builder.create_network(self._network_flags())
        parser = self.trt.OnnxParser(network, self.logger)
        data = self._graph()
        if not parser.parse(data, str(self.bundle.file(self.plan.graph))):
            errors = [f"{e.node_name()}: {e.desc()}" for e in (parser.get_error(i) for i in range(parser.num_errors))]
            raise EnvironmentProblem(f"{self._name} can't read {self.plan.graph}: {'; '.join(errors)[:600]}")
        config = self._config(builder, network)
        monitor = make_monitor(self.trt, tick)
        config.progress_monitor = monitor
        self.layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))

        def cancel() -> None:
            monitor.cancelled = True

        engine = run_cancellable(lambda: builder.build_serialized_network(network, config), cancel)
        if engine is None:
            why = "; ".join(self.logger.errors)[:600] or "it gives no reason"
            raise EnvironmentProblem(f"{self._name} can't build {self.plan.graph}: {why}")
        self._save_timing_cache(config)
        return bytes(engine)

    @property
    def _name(self) -> str:
        return f"{self.backend.name} {self.backend.version}"

    def _network_flags(self) -> int:
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def _graph(self) -> bytes:
        """The ONNX graph with function bodies or without, as this parser and the choice of plugins need it."""
        path = self.bundle.file(self.plan.graph)
        target = self.bundle.target
        if self.options.plugin is None and target.plugins and not target.functions:
            from mamba_export.extras import require

            require("torch", "onnx_ir", extra="export", purpose=f"building a {target.name} bundle without the plugin")
            from mamba_export.graph.lower import for_stock_runtime

            return for_stock_runtime(path, bodies=True, widen=False)
        if self.options.plugin is not None and target.functions and self.backend.functions_hide_plugins:
            from mamba_export.engine.onnx_wire import without_functions

            return without_functions(path.read_bytes())
        return path.read_bytes()

    def _config(self, builder: Any, network: Any) -> Any:
        trt, options = self.trt, self.options
        config = builder.create_builder_config()
        for profile in self.plan.profiles:
            ranges = builder.create_optimization_profile()
            for i in range(network.num_inputs):
                tensor = network.get_input(i)
                ranges.set_shape(tensor.name, *profile.shapes(list(tensor.shape)))
            config.add_optimization_profile(ranges)
        if self.backend.ahead_of_time:
            config.num_compute_capabilities = len(self.sm)
            for i, number in enumerate(self.sm):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), i)
        elif hasattr(config, "create_timing_cache"):
            cache = self._timing_cache_file()
            config.set_timing_cache(config.create_timing_cache(cache.read_bytes() if cache.is_file() else b""), False)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        return config

    def _timing_cache_file(self) -> Path:
        if self.options.timing_cache is not None:
            return self.options.timing_cache
        return cache_folder() / "timing" / f"{self.backend.name}-{self.backend.version}-sm{self.sm[0]}.cache"

    def _save_timing_cache(self, config: Any) -> None:
        if self.backend.ahead_of_time:  # it measures nothing
            return
        cache = config.get_timing_cache()
        if cache is not None:
            _write(self._timing_cache_file(), bytes(cache.serialize()))

    def entry(self, name: str, data: bytes, seconds: float) -> dict[str, Any]:
        """The row of the manifest's engine table."""
        path = self.bundle.file(name)
        plugin = self.options.plugin
        files = self.bundle.manifest.files
        source = {name: files[name]["sha256"] for name in (self.plan.graph, WEIGHTS) if name in files}
        return {
            "file": name,
            "kind": self.plan.kind,
            "bytes": len(data),
            "sha256": file_sha256(path),
            "runtime": self.backend.name,
            "version": self.backend.version,
            "compute_capabilities": list(self.sm),
            "profiles": [profile.to_dict() for profile in self.plan.profiles],
            "layers": dict(sorted(self.layers.items())),
            "plugin": None if plugin is None else {"file": plugin.name, "sha256": file_sha256(plugin)},
            "source": source,
            "seconds": round(seconds, 1),
        }


def _write(path: Path, data: bytes) -> None:
    """Write a file of the bundle atomically.

    Raises:
        EnvironmentProblem: the disk is full or not writable.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror or error}") from error
