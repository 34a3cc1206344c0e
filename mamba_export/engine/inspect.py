"""What an engine file holds: from the manifest beside it, and from TensorRT where it can load the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mamba_export.bundle import MANIFEST, file_sha256
from mamba_export.engine.backend import RUNTIMES, Backend, load_backend
from mamba_export.engine.device import find_device
from mamba_export.engine.watch import make_logger
from mamba_export.errors import EnvironmentProblem, MambaExportError, UsageError


def describe_engine(path: str | Path, plugin: str | Path | None = None) -> dict[str, Any]:
    """Facts of an engine.

    Args:
        path: the ``.engine`` file, in a bundle or not.
        plugin: the plugin library the engine was built with, needed to load it.

    Returns:
        ``file``, ``bytes``; ``manifest``: its row in the bundle's engine table, or None; ``intact``: whether the file
        is the one the row speaks of; ``loaded``: bindings, layers and memory as TensorRT tells them, or None, and
        then ``not_loaded``: why.

    Raises:
        UsageError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such engine: {path}")
    row = _manifest_row(path)
    facts: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size, "manifest": row}
    facts["intact"] = row is not None and file_sha256(path) == row["sha256"]
    facts["loaded"], facts["not_loaded"] = None, None
    try:
        facts["loaded"] = _load(path, row, plugin)
    except MambaExportError as error:
        facts["not_loaded"] = str(error)
    return facts


def _manifest_row(path: Path) -> dict[str, Any] | None:
    manifest = path.resolve().parent.parent / MANIFEST
    try:
        table = json.loads(manifest.read_text(encoding="utf-8"))["engines"]
        return next((dict(row) for row in table if Path(row["file"]).name == path.name), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plugin(path: Path, row: dict[str, Any] | None, named: str | Path | None) -> Path | None:
    """The library named, or the one that lies beside an engine that needs one."""
    if named is not None:
        return Path(named)
    beside = path.with_name(row["plugin"]["file"]) if row and row["plugin"] else None
    return beside if beside is not None and beside.is_file() else None


def _load(path: Path, row: dict[str, Any] | None, plugin: str | Path | None) -> dict[str, Any]:
    """Raises EnvironmentProblem when no TensorRT here can load the engine."""
    if find_device() is None:
        raise EnvironmentProblem("there is no NVIDIA GPU here")
    reasons = []
    for name in [row["runtime"]] if row else RUNTIMES:
        try:
            backend = load_backend(name, "looking into engines")
            library = _plugin(path, row, plugin)
            if library is not None:
                backend.load_plugins(library)
        except MambaExportError as error:
            reasons.append(str(error))
            continue
        engine, why = deserialize(backend, path)
        if engine is not None:
            return _facts(backend, engine)
        reasons.append(f"{name} {backend.version}: {why}")
    raise EnvironmentProblem("; ".join(reasons))


def deserialize(backend: Backend, path: Path) -> tuple[Any, str]:
    """The engine as TensorRT loads it, or None and TensorRT's reason."""
    logger = make_logger(backend.trt)
    runtime = backend.trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    return engine, "; ".join(logger.errors)[:600]


def _facts(backend: Backend, engine: Any) -> dict[str, Any]:
    bindings = []
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        mode, dtype = engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name
        bindings.append({"name": name, "mode": mode, "dtype": dtype, "shape": list(engine.get_tensor_shape(name))})
    facts: dict[str, Any] = {"runtime": backend.name, "version": backend.version, "layers": engine.num_layers}
    facts["profiles"] = engine.num_optimization_profiles
    memory = getattr(engine, "device_memory_size_v2", None)
    facts["device_memory"] = memory if memory is not None else engine.device_memory_size
    inspector = engine.create_engine_inspector()
    lines = inspector.get_engine_information(backend.trt.LayerInformationFormat.JSON)
    return {**facts, "bindings": bindings, "layer_information": json.loads(lines)}
