"""What building the plugin library needs: CUDA's compiler, CMake and TensorRT's headers; where they are looked for."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mamba_export.errors import EnvironmentProblem, UsageError

HEADER = "NvInferRuntime.h"
OLDEST_TENSORRT = (10, 3)


@dataclass(frozen=True)
class Toolchain:
    """Tools found on this machine.

    Attributes:
        nvcc: CUDA's compiler.
        cuda: its version, e.g. ``13.0``.
        cmake: CMake.
        headers: folder of TensorRT's headers.
        tensorrt: the version of the headers, e.g. ``10.13``.
    """

    nvcc: Path
    cuda: str
    cmake: Path
    headers: Path
    tensorrt: str


def find_toolchain(tensorrt_root: str | Path | None = None) -> Toolchain:
    """Find everything.

    Args:
        tensorrt_root: folder that holds TensorRT's headers, or an ``include`` folder with them.

    Raises:
        EnvironmentProblem: something is missing: says what, where it was looked for and how to get it.
    """
    nvcc = find_nvcc()
    cmake = shutil.which("cmake")
    if cmake is None:
        raise EnvironmentProblem("cmake was not found on PATH", "apt-get install cmake, or pip install cmake")
    headers = find_headers(tensorrt_root)
    version = tensorrt_version(headers)
    if version < OLDEST_TENSORRT:
        raise EnvironmentProblem(
            f"the headers in {headers} are of TensorRT {version[0]}.{version[1]}, the plugins need 10.3 or later",
            "name newer ones with --tensorrt-root",
        )
    return Toolchain(nvcc, nvcc_version(nvcc), Path(cmake), headers, f"{version[0]}.{version[1]}")


def find_nvcc() -> Path:
    """CUDA's compiler: ``$CUDACXX``, ``$CUDA_HOME``, PATH, /usr/local/cuda."""
    candidates = [Path(os.environ["CUDACXX"])] if os.environ.get("CUDACXX") else []
    candidates += [
        Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise EnvironmentProblem(
            f"CUDA's compiler nvcc was not found; looked at {_listed(candidates)} and PATH",
            "install the CUDA toolkit (on a Jetson: apt-get install cuda-toolkit-12-6), or set CUDA_HOME",
        )
    return found


def nvcc_version(nvcc: Path) -> str:
    """``13.0``, or ``unknown``."""
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else "unknown"


def find_headers(tensorrt_root: str | Path | None = None) -> Path:
    """The folder with NvInferRuntime.h: the one named, ``$TENSORRT_ROOT``, or where JetPack and the SDK put it."""
    triple = f"{platform.machine()}-linux-gnu"
    named = tensorrt_root or os.environ.get("TENSORRT_ROOT")
    if named:
        roots = [Path(named)]
    else:
        roots = [Path("/usr"), Path("/usr/local/tensorrt"), Path("/opt/tensorrt"), Path("/usr/local/TensorRT")]
    looked = [root / sub for root in roots for sub in (f"include/{triple}", "include", ".")]
    found = next((path for path in looked if (path / HEADER).is_file()), None)
    if found is not None:
        return found.resolve()
    message = f"TensorRT's headers ({HEADER}) were not found; looked at {_listed(looked)}"
    hint = (
        "JetPack and the TensorRT SDK install them (apt-get install libnvinfer-headers-dev); or take include/ of the "
        "open-source TensorRT repository at your version and name its folder with --tensorrt-root"
    )
    if tensorrt_root:
        raise UsageError(message, hint)
    raise EnvironmentProblem(message, hint)


def tensorrt_version(headers: Path) -> tuple[int, int]:
    """(major, minor) of the headers in a folder.

    Raises:
        EnvironmentProblem: they don't say.
    """
    text = (
        (headers / "NvInferVersion.h").read_text(errors="replace") if (headers / "NvInferVersion.h").is_file() else ""
    )
    numbers = []
    for part in ("MAJOR", "MINOR"):
        found = re.search(rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)", text)
        if found is None:
            raise EnvironmentProblem(f"{headers}/NvInferVersion.h does not say which TensorRT it is")
        numbers.append(int(found[1]))
    return numbers[0], numbers[1]


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))
