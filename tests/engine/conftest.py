"""Bundles that engines can be written into, the plugin library, and a stand-in for TensorRT where there is no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mamba_export.bundle import Bundle
from mamba_export.engine import BuildOptions, PluginLibrary, build_engines, build_plugin
from mamba_export.engine.backend import cache_folder
from mamba_export.engine.device import Device, find_device
from mamba_export.engine.toolchain import find_nvcc
from mamba_export.errors import EnvironmentProblem

CopyBundle = Callable[..., Bundle]
HERE = Path(__file__).parent / "standin"


@pytest.fixture
def copy_bundle(make_bundle: Callable[..., Path], tmp_path: Path) -> CopyBundle:
    """``copy_bundle(ckpt=…, dtype=…)``: a bundle of target tensorrt of one's own."""

    def copy(**options: Any) -> Bundle:
        source = make_bundle(**{"target": "tensorrt", "logits": "last", "dtype": "fp16", **options})
        shutil.copytree(source, tmp_path / "bundle")
        return Bundle(tmp_path / "bundle", check=False)

    return copy


@pytest.fixture(scope="session")
def plugin() -> PluginLibrary:
    """The plugin library for sm_86; skips where CUDA's compiler or TensorRT's headers are missing."""
    if find_device() is None and not os.environ.get("TENSORRT_ROOT"):
        pytest.skip("NOT TESTED: the plugin library; set TENSORRT_ROOT to a folder with TensorRT's headers")
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Builders look at the plugins and never run a kernel: they may be slow, and lie in a cache of their own.
            patch.setenv("XDG_CACHE_HOME", str(cache_folder() / "tests"))
            if "--Ofast-compile" in subprocess.run([find_nvcc(), "--help"], capture_output=True, text=True).stdout:
                patch.setenv("NVCC_APPEND_FLAGS", "--Ofast-compile=max")
            return build_plugin(["sm_86"])
    except EnvironmentProblem as error:
        if "not found" not in str(error):
            raise
        pytest.skip(f"NOT TESTED: the plugin library; {error}")


def compile_shared(target: Path, *sources: str | Path, soname: str | None = None) -> Path:
    """A shared library of C sources; skips where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("NOT TESTED: the TensorRT runtime; its stand-in needs a C compiler")
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{soname or target.name}"]
    subprocess.run([compiler, *flags, "-o", str(target), *map(str, sources)], check=True)
    return target


@dataclass
class StandIn:
    """TensorRT and CUDA of a machine that has neither.

    Attributes:
        trt: the stand-in module.
        cuda: the stand-in for CUDA's runtime library, with counters.
        env: lets a process of its own find both.
        plugin: a library that stands for the plugin library.
    """

    trt: Any
    cuda: ctypes.CDLL
    env: dict[str, str]
    plugin: Path

    def build(self, bundle: Bundle, **options: Any) -> list[dict[str, Any]]:
        """Build "engines" of a bundle."""
        return build_engines(bundle, BuildOptions(**{"runtime": "tensorrt", **options}), force=True).engines


@pytest.fixture(scope="session")
def standin_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with libcudart.so and libcuda.so.1."""
    folder = tmp_path_factory.mktemp("standin")
    compile_shared(folder / "libcudart.so", HERE / "cuda.c")
    shutil.copyfile(folder / "libcudart.so", folder / "libcuda.so.1")
    compile_shared(folder / "libmamba_plugins.so", "-x", "c", os.devnull)
    return folder


@pytest.fixture
def standin(standin_libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, in this process: as ``tensorrt``, and as the CUDA runtime library under the runner."""
    from mamba_export.engine import backend
    from mamba_export.runtime import trt_cuda

    cuda = trt_cuda.prepare(ctypes.CDLL(str(standin_libraries / "libcudart.so")))
    monkeypatch.syspath_prepend(str(HERE / "python"))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    module = importlib.import_module("tensorrt")
    monkeypatch.setattr(trt_cuda, "library", lambda: cuda)
    monkeypatch.setattr(backend, "_loaded", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device = Device("Stand-in GPU", "87", 8_000_000_000, True)
    for place in ("mamba_export.runtime.trt", "mamba_export.engine.build", "mamba_export.engine.inspect"):
        importlib.import_module(place)
        monkeypatch.setattr(f"{place}.find_device", lambda: device)
    monkeypatch.setenv("STANDIN_CUDART", str(standin_libraries / "libcudart.so"))
    paths = {"PYTHONPATH": str(HERE / "python"), "LD_LIBRARY_PATH": str(standin_libraries)}
    env = {name: os.pathsep.join(filter(None, [path, os.environ.get(name)])) for name, path in paths.items()}
    env["STANDIN_CUDART"] = "libcudart.so"  # as a process of its own finds it
    yield StandIn(module, cuda, env, standin_libraries / "libmamba_plugins.so")
    cuda.stub_limit(ctypes.c_size_t(-1))
    with contextlib.suppress(KeyError):
        del sys.modules["tensorrt"]
    assert module.failures == []
