"""What this machine has for export, running and building, and how to get what is missing."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

from mamba_export.version import __version__

Status = Literal["ok", "missing", "broken"]

# Distribution → (extra that brings it, what it is for).
PACKAGES = {
    "numpy": ("", "everything"),
    "tokenizers": ("", "text"),
    "torch": ("export", "export and verify"),
    "onnx": ("export", "export"),
    "onnxscript": ("export", "export"),
    "onnx-ir": ("export", "export"),
    "safetensors": ("export", "checkpoints"),
    "polygraphy": ("export", "verify"),
    "onnxruntime": ("cpu", "run bundles on the CPU"),
    "onnxruntime-gpu": ("gpu", "run bundles on a GPU"),
    "tensorrt": ("tensorrt", "engines for datacenter and Jetson"),
    "tensorrt-rtx": ("rtx", "engines for RTX"),
    "matplotlib": ("report", "plots"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        name: of the package, tool or device.
        status: ``ok``, ``missing`` or ``broken``.
        detail: version, or what is wrong.
        purpose: what it is for.
        hint: how to get it, when it is not there.
    """

    name: str
    status: Status
    detail: str
    purpose: str
    hint: str = ""


def doctor() -> dict[str, Any]:
    """Look at this machine. Nothing is changed, nothing heavy is imported but ONNX Runtime.

    Returns:
        JSON-ready: ``system`` facts, ``findings`` (see :class:`Finding`) and ``can``: which jobs would work.
    """
    findings = [_package(name, *facts) for name, facts in PACKAGES.items()]
    findings += [_providers(), _gpu(), _tool("nvcc", "build the TensorRT plugin", "install the CUDA toolkit")]
    present = {f.name for f in findings if f.status == "ok"}
    runs = bool({"onnxruntime", "onnxruntime-gpu"} & present)
    exports = {"torch", "onnx", "onnxscript", "onnx-ir", "safetensors"} <= present
    return {
        "system": {
            "mamba-export": __version__,
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "machine": platform.machine(),
        },
        "findings": [asdict(f) for f in findings],
        "can": {
            "export": exports,
            "verify": exports and runs and "polygraphy" in present,
            "run on CPU": runs,
            "run on GPU": any(f.name == "CUDAExecutionProvider" and f.status == "ok" for f in findings),
            "build engines": bool({"tensorrt", "tensorrt-rtx"} & present),
        },
    }


def _package(name: str, extra: str, purpose: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name), purpose)
    except metadata.PackageNotFoundError:
        wanted = f"mamba-export[{extra}]" if extra else name
        return Finding(name, "missing", "", purpose, f'pip install "{wanted}"')


def _providers() -> Finding:
    """Whether ONNX Runtime loads, and whether it can use a CUDA GPU."""
    purpose, name = "run bundles on a GPU", "CUDAExecutionProvider"
    hint = 'pip install "mamba-export[gpu]"'
    try:
        import onnxruntime
    except ImportError:
        return Finding(name, "missing", "no onnxruntime", purpose, hint)
    except Exception as error:  # a wheel for another machine fails in ways of its own
        return Finding("onnxruntime", "broken", str(error).splitlines()[0], "run bundles", "reinstall onnxruntime")
    if name in onnxruntime.get_available_providers():
        return Finding(name, "ok", f"onnxruntime {onnxruntime.__version__}", purpose)
    return Finding(name, "missing", "this onnxruntime runs on the CPU alone", purpose, hint)


def _gpu() -> Finding:
    purpose, query = "GPU", ["--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader"]
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return Finding("NVIDIA GPU", "missing", "no nvidia-smi", purpose)
    try:
        output = subprocess.run([smi, *query], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("NVIDIA GPU", "broken", str(error).splitlines()[0], purpose, "check the driver")
    return Finding("NVIDIA GPU", "ok", "; ".join(output.strip().splitlines()), purpose)


def _tool(name: str, purpose: str, hint: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, "ok", path, purpose) if path else Finding(name, "missing", "", purpose, hint)
