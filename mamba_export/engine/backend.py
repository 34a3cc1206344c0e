"""The two TensorRTs behind one door: which module, which version, how its plugins are loaded."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mamba_export.errors import EnvironmentProblem, UsageError
from mamba_export.extras import require

RuntimeName = Literal["tensorrt", "tensorrt-rtx"]
RUNTIMES: tuple[RuntimeName, ...] = ("tensorrt", "tensorrt-rtx")

# A registry takes each creator once a process.
_loaded: set[tuple[str, Path]] = set()


@dataclass(frozen=True)
class Backend:
    """One of the two TensorRTs, imported.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        trt: its Python module.
    """

    name: RuntimeName
    trt: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def numbers(self) -> tuple[int, int]:
        """(major, minor)."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def ahead_of_time(self) -> bool:
        """Whether engines are built for named GPUs, with none in the machine."""
        return self.name == "tensorrt-rtx"

    @property
    def functions_hide_plugins(self) -> bool:
        """Whether the ONNX parser takes a node's function body even where its plugin is registered."""
        return self.name == "tensorrt" and self.numbers < (10, 7)

    def load_plugins(self, library: Path) -> None:
        """Register the creators of a plugin library (the one that exports ``getCreators``).

        Raises:
            EnvironmentProblem: the library does not load, or TensorRT refused it.
        """
        if (self.name, library.resolve()) in _loaded:
            return
        if self.name == "tensorrt-rtx":
            _give_rtx_its_short_name()
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            raise EnvironmentProblem(
                f"{library} does not load: {error}", "build it here: mamba-export plugin build"
            ) from error
        registry = self.trt.get_plugin_registry()
        if registry.load_library(str(library)) is None:
            raise EnvironmentProblem(
                f"{self.name} {self.version} refused {library}",
                "build it against this version: mamba-export plugin build",
            )
        _loaded.add((self.name, library.resolve()))


def load_backend(name: str, purpose: str = "building engines") -> Backend:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Args:
        name: of the runtime.
        purpose: what needs it, for the message when it is missing.

    Raises:
        UsageError: no such runtime.
        MissingExtraError: its package is not installed.
        EnvironmentProblem: the package is there and does not load.
    """
    if name not in RUNTIMES:
        raise UsageError(f"no runtime named '{name}'", f"one of: {', '.join(RUNTIMES)}")
    module, extra = ("tensorrt", "tensorrt") if name == "tensorrt" else ("tensorrt_rtx", "rtx")
    require(module, extra=extra, purpose=f"{purpose} with {name}")
    try:
        return Backend(name, importlib.import_module(module))
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(f"the package {module} does not load: {error}") from error


def cache_folder() -> Path:
    """Where this project keeps what it can make again: in ``$XDG_CACHE_HOME`` or ``~/.cache``, under its name."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mamba-export"


@functools.cache
def _give_rtx_its_short_name() -> None:
    """Let ``dlopen("libtensorrt_rtx.so")`` succeed in this process.

    TensorRT-RTX opens itself by that name when it meets a plugin, and ends the process where that fails; its wheel
    ships ``libtensorrt_rtx.so.1`` alone. An empty library of the short name that needs the real one is enough.
    """
    if _opens("libtensorrt_rtx.so"):
        return
    real = _loaded_library("libtensorrt_rtx.so.1")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if real is None or compiler is None:
        raise EnvironmentProblem(
            "TensorRT-RTX needs libtensorrt_rtx.so on the library path to load plugins",
            "link libtensorrt_rtx.so.1 to that name in a folder of LD_LIBRARY_PATH, or install a C compiler",
        )
    folder = cache_folder() / "rtx"
    folder.mkdir(parents=True, exist_ok=True)
    alias = folder / "libtensorrt_rtx.so"
    partial = folder / f".{os.getpid()}.so"
    source = ["-shared", "-fPIC", "-x", "c", os.devnull, "-x", "none"]
    flags = ["-Wl,--no-as-needed", "-Wl,-soname,libtensorrt_rtx.so", str(real)]
    made = subprocess.run([compiler, *source, "-o", str(partial), *flags], capture_output=True, text=True, check=False)
    if made.returncode:
        raise EnvironmentProblem(f"{compiler} could not make {alias}: {made.stderr.strip()[:300]}")
    os.replace(partial, alias)
    ctypes.CDLL(str(alias), mode=ctypes.RTLD_GLOBAL)


def _opens(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _loaded_library(name: str) -> Path | None:
    """Path of a library that this process has mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name == name:
            return Path(path)
    return None
