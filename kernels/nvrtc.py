"""Compiles kernels at run time: NVRTC instead of nvcc, no CUDA headers, machine code kept in the user's cache.

:func:`compile_kernel` makes one instance of a kernel template of ``cuda/*.cuh`` for one architecture, which needs no
GPU; :class:`Kernel` loads and launches it through the driver. What each op launches is in :mod:`.nvrtc_ops`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from mamba_export.engine.backend import cache_folder
from mamba_export.errors import EnvironmentProblem

from .library import KernelError

__all__ = ["Kernel", "available", "compile_kernel"]

ENVIRONMENT_VARIABLE = "MAMBA_NVRTC_LIBRARY"
SOURCES = Path(__file__).resolve().parent / "cuda"

# What the sources use of the CUDA and C headers, which a machine without the toolkit does not have.
HEADERS = {
    "stdint.h": """#pragma once
using int8_t = signed char; using int16_t = short; using int32_t = int; using int64_t = long long;
using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned int;
using uint64_t = unsigned long long; using uintptr_t = unsigned long long;
""",
    "cstdint": '#include "stdint.h"\n',
    "stddef.h": "#pragma once\n",
    "cuda_runtime.h": "#pragma once\ncudaError_t cudaGetLastError();\n",
    "cuda_fp16.h": """#pragma once
struct __half { unsigned short x; };
struct alignas(4) __half2 { __half x, y; };
__device__ inline float __half2float(__half v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.x)); return f; }
__device__ inline float2 __half22float2(__half2 v) { return make_float2(__half2float(v.x), __half2float(v.y)); }
__device__ inline __half __float2half_rn(float f) {
  __half v; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.x) : "f"(f)); return v;
}
__device__ inline __half2 __floats2half2_rn(float a, float b) {
  unsigned v; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a)); return *reinterpret_cast<__half2*>(&v);
}
""",
    "cuda_bf16.h": """#pragma once
struct __nv_bfloat16 { unsigned short x; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
__device__ inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<unsigned>(v.x) << 16); }
__device__ inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  __nv_bfloat16 v; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.x) : "f"(f)); return v;
}
__device__ inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  unsigned v; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  return *reinterpret_cast<__nv_bfloat162*>(&v);
}
""",
}


def _candidates() -> list[Path]:
    """Where libnvrtc may lie: the variable, NVIDIA's wheel, a CUDA toolkit, the loader's path."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return [Path(named)]
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(f) for f in (wheels.submodule_search_locations or [])] if wheels else []
    found = [p for f in folders for p in (*f.glob("cu*/lib/libnvrtc.so*"), *f.glob("cuda_nvrtc/lib/libnvrtc.so*"))]
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        found += Path(root).glob("lib64/libnvrtc.so*") if root else []
    loaded = find_library("nvrtc")
    return [*(p for p in found if "alt" not in p.name), *([Path(loaded)] if loaded else [])]


@functools.cache
def load() -> ctypes.CDLL:
    """libnvrtc, loaded once."""
    for path in _candidates():
        try:
            for builtins in path.parent.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins))  # NVRTC opens it by name, which finds it only once it is loaded
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise EnvironmentProblem("libnvrtc not found", hint="pip install nvidia-cuda-nvrtc, or install the CUDA toolkit")


def available() -> bool:
    """Whether kernels can be compiled here (says nothing about a GPU)."""
    try:
        load()
    except EnvironmentProblem:
        return False
    return True


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(load().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def _check(status: int, what: str, detail: str = "") -> None:
    if status != 0:
        raise KernelError(f"{what}: {load().nvrtcGetErrorString(status).decode()}{detail}")


@functools.cache
def _fingerprint() -> bytes:
    """Of everything that decides what comes out of the compiler, but for the instance and the architecture."""
    digest = hashlib.sha256(repr((version(), sorted(HEADERS.items()))).encode())
    for path in sorted([*SOURCES.glob("*.cuh"), *SOURCES.glob("include/mamba/*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def compile_kernel(header: str, instance: str, arch: str) -> tuple[bytes, str]:
    """Machine code of ``instance``, a kernel template of ``cuda/<header>`` with its arguments, and its name in there.

    Args:
        header: file of the template.
        instance: such as ``mamba::update::update_kernel<float, float, 4, 1>``.
        arch: such as ``sm_90``.
    """
    digest = hashlib.sha256(_fingerprint() + f"{header}\n{instance}\n{arch}".encode()).hexdigest()
    kept = cache_folder() / "nvrtc" / f"{digest}.cubin"
    if kept.is_file():
        name, _, code = kept.read_bytes().partition(b"\0")
        return code, name.decode()
    code, lowered = _compile(header, instance, arch)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        file.write(lowered.encode() + b"\0" + code)
    os.replace(file.name, kept)  # two processes may do the same: each file is whole
    return code, lowered


def _compile(header: str, instance: str, arch: str) -> tuple[bytes, str]:
    nvrtc, program = load(), ctypes.c_void_p()
    names = (ctypes.c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS))
    texts = (ctypes.c_char_p * len(HEADERS))(*(text.encode() for text in HEADERS.values()))
    source = f'#include "{header}"\n'.encode()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"mamba.cu", len(HEADERS), texts, names)
    _check(created, "nvrtcCreateProgram")
    try:
        _check(nvrtc.nvrtcAddNameExpression(program, instance.encode()), f"{instance} is not a name")
        options = [f"--gpu-architecture={arch}", "--std=c++17", f"-I{SOURCES}", f"-I{SOURCES / 'include'}"]
        options += ["--device-as-default-execution-space"]  # the headers declare functions of the host, never called
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        if status != 0:
            _check(status, f"{header} for {arch}", "\n" + _text(program, "ProgramLog"))
        lowered = ctypes.c_char_p()
        _check(nvrtc.nvrtcGetLoweredName(program, instance.encode(), ctypes.byref(lowered)), instance)
        assert lowered.value is not None
        return _bytes(program, "CUBIN"), lowered.value.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(load(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(load(), f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def _text(program: ctypes.c_void_p, what: str) -> str:
    return _bytes(program, what).rstrip(b"\0").decode(errors="replace").strip()


# ---- the driver ------------------------------------------------------------------------------------------


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute; ``value`` is as large as the driver's union."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)),
    )


_EARLY = _Attribute(id=6)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION; see cuda/early_launch.cuh
_EARLY.value[0] = 1


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise EnvironmentProblem("the NVIDIA driver is not found", hint=str(error)) from None


def _driver_check(status: int, what: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"{what}: {(text.value or b'unknown error').decode()}")


class Kernel:
    """An instance of a kernel on the current device, compiled if the cache does not hold it."""

    def __init__(self, header: str, instance: str, capability: tuple[int, int]) -> None:
        code, name = compile_kernel(header, instance, f"sm_{capability[0]}{capability[1]}")
        self.instance, self._early = instance, capability[0] >= 9
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _driver_check(_driver().cuModuleLoadData(ctypes.byref(self._module), code), f"loading {instance}")
        found = _driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
        _driver_check(found, instance)

    def __call__(self, grid: tuple[int, int, int], block: tuple[int, int], stream: int, *arguments: Any) -> None:
        """Launches on ``stream``; ``arguments`` are ctypes values of the types in the kernel's signature."""
        config = _Config(*grid, *block, 1, 0, stream, ctypes.addressof(_EARLY), 1 if self._early else 0)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        _driver_check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None), self.instance)
