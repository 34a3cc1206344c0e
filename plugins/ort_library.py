"""Build and find the ONNX Runtime library (``plugins/onnxruntime``), which computes the ``mamba`` ops there.

``python -m mamba_export.plugins.ort_library --onnxruntime-root DIR`` builds it into the cache, with ``--cuda`` for GPUs
too; every runner of a bundle with plugin ops then uses it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mamba_export.engine.backend import cache_folder
from mamba_export.engine.device import find_device
from mamba_export.engine.plugin import parse_arch
from mamba_export.engine.toolchain import find_nvcc
from mamba_export.errors import EnvironmentProblem, MambaExportError
from mamba_export.progress import Progress, silent

__all__ = ["OrtLibrary", "build", "find", "hash_sources", "register", "serves_cuda"]

LIBRARY = "libmamba_ort.so"
ENVIRONMENT_VARIABLE = "MAMBA_ORT_LIBRARY"
HEADER = "onnxruntime_c_api.h"
_HEADER_FOLDERS = ("", "include", "include/onnxruntime", "include/onnxruntime/core/session")
_FACTS = "build.json"
_SOURCES = {".cpp", ".h", ".inl", ".txt", ".map", ".cu", ".cuh"}
_HERE = Path(__file__).resolve().parent / "onnxruntime"
_KERNELS = Path(__file__).resolve().parents[1] / "kernels" / "cuda"


@dataclass(frozen=True)
class OrtLibrary:
    """A built library.

    Attributes:
        path: what ``SessionOptions.register_custom_ops_library`` takes.
        compiler: the C++ compiler and its version.
        sources: hash of the sources.
        archs: GPU architectures it has code for; none: it serves the CPU alone.
        cached: nothing was compiled, the library was there.
    """

    path: str
    compiler: str
    sources: str
    archs: tuple[str, ...] = ()
    cached: bool = False


def find(cuda: bool = False) -> Path | None:
    """The library to use: ``MAMBA_ORT_LIBRARY`` if it is set (empty: none), else the one in the cache, if any.

    A library in the cache belongs to exactly these sources; after an update it has to be built again.

    Args:
        cuda: one that serves GPUs too.

    Raises:
        EnvironmentProblem: ``MAMBA_ORT_LIBRARY`` names no file.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named is not None:
        if named and not Path(named).is_file():
            raise EnvironmentProblem(
                f"{ENVIRONMENT_VARIABLE} names {named}, which is no file", "unset it, or build one"
            )
        return Path(named) if named else None
    if not _HERE.is_dir() or (cuda and not _KERNELS.is_dir()):
        return None
    folder = _folder(hash_sources(cuda))
    folders = sorted(folder.parent.glob(f"{folder.name}-sm_*")) if cuda else [folder]
    device = find_device() if cuda else None
    if device is not None:  # first the one that has this GPU's code
        folders.sort(key=lambda path: f"sm_{device.sm}" not in path.name.split("-"))
    return next((path / LIBRARY for path in folders if (path / _FACTS).is_file()), None)


def register(options: Any, library: str | Path) -> None:
    """Add the library's ops to an ``onnxruntime.SessionOptions``.

    Raises:
        EnvironmentProblem: the file does not load, or this ONNX Runtime is too old.
    """
    try:
        options.register_custom_ops_library(os.fspath(library))
    except Exception as error:  # onnxruntime raises its own classes, all plain Exceptions
        reason = str(error).splitlines()[0][:300]
        hint = "build it on this machine: python -m mamba_export.plugins.ort_library --onnxruntime-root DIR"
        raise EnvironmentProblem(f"onnxruntime can't load {library}: {reason}", hint) from error


def serves_cuda(library: str | Path) -> bool:
    """Whether the library has CUDA kernels, MambaDecodeStack among them; False for what is no such library."""
    try:
        return bool(ctypes.CDLL(os.fspath(library)).mamba_ort_cuda())
    except (OSError, AttributeError):
        return False


def build(
    onnxruntime_root: str | Path | None = None,
    *,
    cuda: bool = False,
    archs: Sequence[str] = (),
    jobs: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> OrtLibrary:
    """Build the library, or find it in the cache.

    Args:
        onnxruntime_root: folder of ONNX Runtime's headers: an unpacked release archive, of any version from 1.17;
            ``ONNXRUNTIME_ROOT`` or the system's include folders when None.
        cuda: serve ONNX Runtime's CUDA provider too; needs CUDA's compiler.
        archs: GPU architectures (``sm_90``, …) for that; the GPU of this machine when empty.
        jobs: compilations at a time; one a processor when None.
        force: build even if it is in the cache.
        progress: gets told what is being done.

    Raises:
        EnvironmentProblem: the headers, CMake or a compiler are missing, or the build failed.
        UsageError: an architecture is not one.
    """
    if not (_HERE / "CMakeLists.txt").is_file():
        raise EnvironmentProblem("this installation has no plugin sources", "install mamba-export again")
    numbers = _architectures(archs) if cuda else []
    sources = hash_sources(cuda)
    names = tuple(f"sm_{number}" for number in numbers)
    folder = _folder("-".join((sources, *names)))
    if not force and (folder / _FACTS).is_file():
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return OrtLibrary(**{**facts, "archs": tuple(facts["archs"]), "cached": True})
    headers, cmake = find_headers(onnxruntime_root), shutil.which("cmake")
    if cmake is None:
        raise EnvironmentProblem("cmake was not found", "apt-get install cmake, or pip install cmake")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as where, progress.stage("build library"):
        configure = [
            cmake,
            "-S",
            str(_HERE),
            "-B",
            where,
            f"-DONNXRUNTIME_ROOT={headers}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if cuda:
            configure += ["-DMAMBA_CUDA=ON", f"-DMAMBA_KERNELS_DIR={_KERNELS}", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
            configure += [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{number}-real' for number in numbers)}"]
        _run(configure)
        parallel = jobs or int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", 0)) or os.cpu_count() or 1
        _run([cmake, "--build", where, "--parallel", str(parallel)])
        library = OrtLibrary(str(folder / LIBRARY), _compiler(Path(where)), sources, names)
        _replace(folder / LIBRARY, (Path(where) / LIBRARY).read_bytes())
    _replace(folder / _FACTS, json.dumps(asdict(library), indent=2).encode())  # last: says that the library is whole
    return library


def find_headers(root: str | Path | None = None) -> Path:
    """The folder of ``onnxruntime_c_api.h``, below ``root``, ``ONNXRUNTIME_ROOT`` or the system's include folders.

    Raises:
        EnvironmentProblem: it isn't there.
    """
    named = root or os.environ.get("ONNXRUNTIME_ROOT")
    for base in [Path(named)] if named else [Path("/usr"), Path("/usr/local")]:
        for below in _HEADER_FOLDERS:
            if (base / below / HEADER).is_file():
                return (base / below).resolve()
    raise EnvironmentProblem(
        f"ONNX Runtime's headers ({HEADER}) were not found" + (f" in {named}" if named else ""),
        "unpack a release archive of ONNX Runtime (onnxruntime-linux-*.tgz) and set ONNXRUNTIME_ROOT to its folder",
    )


def _architectures(archs: Sequence[str]) -> list[str]:
    """The numbers of GPU architectures; of this machine's GPU when none is named."""
    if archs:
        return sorted({parse_arch(arch) for arch in archs})
    device = find_device()
    if device is None:
        raise EnvironmentProblem("there is no NVIDIA GPU here", "name the architecture: --arch sm_90")
    return [device.sm]


def hash_sources(cuda: bool = False) -> str:
    """Hash of all sources of the library, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for root in [_HERE, _KERNELS] if cuda else [_HERE]:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in _SOURCES:
                digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _folder(sources: str) -> Path:
    return cache_folder() / "onnxruntime" / f"{platform.machine()}-{sources}"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = done.stdout.splitlines()
        errors = [line for line in lines if "rror" in line][:6] or lines[-6:]
        raise EnvironmentProblem("building the ONNX Runtime library failed:\n  " + "\n  ".join(errors))


def _compiler(build_folder: Path) -> str:
    """The compiler that CMake chose, as it names itself."""
    cache = (build_folder / "CMakeCache.txt").read_text(encoding="utf-8")
    lines = [line for line in cache.splitlines() if line.startswith("CMAKE_CXX_COMPILER:")]
    compiler = lines[0].partition("=")[2]
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return told.splitlines()[0] if told else compiler


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``python -m mamba_export.plugins.ort_library``; returns the exit code."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m mamba_export.plugins.ort_library")
    parser.description = "Build the ONNX Runtime library of the mamba ops into the cache and print its path."
    parser.add_argument("--onnxruntime-root", metavar="DIR", help="an unpacked release archive of ONNX Runtime")
    parser.add_argument("--cuda", action="store_true", help="serve the CUDA provider too; needs CUDA's compiler")
    parser.add_argument(
        "--arch", action="append", default=[], metavar="SM", help="GPU for --cuda; this machine's if none"
    )
    parser.add_argument("--force", action="store_true", help="build even if it is in the cache")
    parser.add_argument("--json", action="store_true", help="print everything about the library as JSON")
    options = parser.parse_args(arguments)
    try:
        cuda = options.cuda or bool(options.arch)
        library = build(options.onnxruntime_root, cuda=cuda, archs=options.arch, force=options.force)
    except MambaExportError as error:
        hint = f"\n\nhint: {error.hint}" if error.hint else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(asdict(library), indent=2) if options.json else library.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
