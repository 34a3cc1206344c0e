"""ONNX Runtime sessions of a bundle's graphs."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_export.bundle import PREFILL, Bundle
from mamba_export.errors import EnvironmentProblem
from mamba_export.extras import require
from mamba_export.fused_step import OP_TYPE
from mamba_export.runtime.ort_products import exact_products
from mamba_export.states import State

if TYPE_CHECKING:
    import onnxruntime as ort

AUTO = "auto"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
GRAPH_ID = "gpu_graph_id"
"""Run option: which recorded CUDA graph a call replays, or records; -1: none."""
_NUMPY: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


def state_dtype(state: State, device: str) -> Any:
    """The numpy dtype in which a runner holds ``state``; bfloat16 graphs run in float32 on the CPU.

    Raises:
        EnvironmentProblem: for a bfloat16 state on a GPU: ONNX Runtime's Python API can't make one from numpy.
    """
    if state.dtype == "bf16" and device == "cpu":
        return np.float32
    if state.dtype not in _NUMPY:
        raise EnvironmentProblem(
            f"{state.name} is {state.dtype}, which ONNX Runtime's Python API can't pass to {device}",
            "export with --dtype fp16 for ONNX Runtime on a GPU",
        )
    return _NUMPY[state.dtype]


def make_session(
    bundle: Bundle,
    graph: str,
    device: str = "cpu",
    threads: int | None = None,
    suited: bool = True,
    library: str | Path | None = AUTO,
    low_memory: bool = False,
    change: Callable[[bytes], bytes] | None = None,
    cuda_graph: bool = False,
) -> ort.InferenceSession:
    """An ONNX Runtime session of one of the bundle's graphs; with ``suited``, of the one that suits ``device`` best.

    Two kinds of graph are changed in memory first, which needs the ``export`` extra: plugin ops without function
    bodies get the bodies, and on the CPU, which has no bfloat16 kernels, bfloat16 is computed in float32.

    Plugin ops are computed by the custom-op library ``library`` (AUTO: the one that
    :func:`mamba_export.plugins.ort_library.find` knows; None: none); without one by their bodies, which on a GPU
    launch several kernels a token. A fused step is computed on a GPU alone; elsewhere its body runs, in stock ops where
    the library is one for GPUs.

    With ``low_memory`` the weights are read where they lie in the mapped file instead of being packed into a copy, and
    scratch memory goes back to the system after each call; a step takes longer for it. Prefill never packs: over
    many tokens it gains nothing, and the mapped pages are shared with the step graph.

    On a CPU whose integer products saturate, bundles with int8 inputs are opened so that theirs are exact: see
    :mod:`.ort_products`.

    ``change`` gets the serialized graph last, and returns another one over the same weights. With ``cuda_graph`` calls
    through one binding are recorded and replayed (see :data:`GRAPH_ID`).

    Raises:
        EnvironmentProblem: ONNX Runtime can't run this graph; the message says why.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if low_memory or graph == PREFILL:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = not low_memory
    if device == "cpu":
        for key, value in exact_products(bundle, low_memory).items():
            options.add_session_config_entry(key, value)
    operators = _operators(bundle, graph, device, library)
    if operators is not None:
        from mamba_export.plugins import ort_library

        ort_library.register(options, operators)
    source = _source(bundle, bundle.graph(graph, device) if suited else bundle.file(graph), device, operators)
    if change is not None:
        source = change(source if isinstance(source, bytes) else Path(source).read_bytes())
    if isinstance(source, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.fspath(bundle.path))
    providers: list[Any] = [PROVIDERS[device]] + (["CPUExecutionProvider"] if device != "cpu" else [])
    if device == "cuda":
        _load_cuda_libraries()
    if cuda_graph:
        providers[0] = (PROVIDERS[device], {"enable_cuda_graph": "1"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime raises its own classes, all plain Exceptions
        wanted = f"; this bundle needs {bundle.manifest.requires}" if bundle.manifest.requires else ""
        reason, _, hint = str(error).splitlines()[0].partition("; hint: ")  # so says the custom-op library
        raise EnvironmentProblem(
            f"onnxruntime {onnxruntime.__version__} can't run {graph}: {reason[:300]}{wanted}", hint or None
        ) from error
    if PROVIDERS[device] not in session.get_providers():  # it would run on the CPU
        raise EnvironmentProblem(
            f"onnxruntime {onnxruntime.__version__} could not start its {PROVIDERS[device]}",
            "it needs CUDA's libraries (cuBLAS, cuRAND, the runtime): from pip packages, or on LD_LIBRARY_PATH",
        )
    return session


def _load_cuda_libraries() -> None:
    """Load CUDA's libraries from their Python packages, where there are any. onnxruntime prints what it misses."""
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)  # since 1.21
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


def _operators(bundle: Bundle, graph: str, device: str, library: str | Path | None) -> Path | None:
    """The custom-op library for this graph."""
    if not bundle.target.plugins or library is None:
        return None
    try:
        from mamba_export.plugins import ort_library
    except ImportError:  # a checkout, neither installed nor started by cli.py
        return Path(library) if library != AUTO else None
    found: Path | None = Path(library) if library != AUTO else ort_library.find(cuda=device == "cuda")
    fused = OP_TYPE in bundle.manifest.nodes.get(graph.removesuffix(".onnx"), {})
    if fused and device == "cpu" and found is not None and ort_library.serves_cuda(found):
        return None  # it knows the op, so that ONNX Runtime would not look at the function body
    return found


def _source(bundle: Bundle, path: Path, device: str, operators: Path | None) -> str | bytes:
    """The graph as a path, or changed and serialized."""
    bodies = bundle.target.plugins and not bundle.target.functions and operators is None
    widen = bundle.manifest.dtype == "bf16" and device == "cpu"
    if not bodies and not widen:
        return os.fspath(path)
    reason = f"a {bundle.target.name} bundle without TensorRT" if bodies else "a bfloat16 bundle on the CPU"
    require("torch", "onnx_ir", "onnxscript", extra="export", purpose=f"running {reason}")
    from mamba_export.graph.lower import for_stock_runtime

    return for_stock_runtime(path, bodies, widen)
