"""The few calls of CUDA's runtime library that running an engine takes, through ctypes: no package needed."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.errors import EnvironmentProblem

ALIGNMENT = 256
"""TensorRT wants tensors at multiples of it."""

_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_NON_BLOCKING, _CAPTURE_THREAD_LOCAL = 1, 1
_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation

_pointer, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaMalloc": (ctypes.POINTER(_pointer), _size),
    "cudaFree": (_pointer,),
    "cudaMallocHost": (ctypes.POINTER(_pointer), _size),
    "cudaFreeHost": (_pointer,),
    "cudaMemcpyAsync": (_pointer, _pointer, _size, _int, _pointer),
    "cudaMemsetAsync": (_pointer, _int, _size, _pointer),
    "cudaStreamCreateWithFlags": (ctypes.POINTER(_pointer), ctypes.c_uint),
    "cudaStreamDestroy": (_pointer,),
    "cudaStreamSynchronize": (_pointer,),
    "cudaStreamBeginCapture": (_pointer, _int),
    "cudaStreamEndCapture": (_pointer, ctypes.POINTER(_pointer)),
    "cudaGraphInstantiateWithFlags": (ctypes.POINTER(_pointer), _pointer, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_pointer, _pointer),
    "cudaGraphDestroy": (_pointer,),
    "cudaGraphExecDestroy": (_pointer,),
    "cudaGetLastError": (),
}
SYMBOLS = (*_SIGNATURES, "cudaGetErrorString")


class CudaError(EnvironmentProblem):
    """A call into CUDA failed."""


def align(nbytes: int) -> int:
    """``nbytes`` rounded up to :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@functools.cache
def library() -> ctypes.CDLL:
    """CUDA's runtime library, wherever it is.

    Raises:
        EnvironmentProblem: it is nowhere: says where it was looked for.
    """
    names = ["libcudart.so", *(f"libcudart.so.{major}" for major in (13, 12))]
    for candidate in (*names, *map(str, _places(names))):
        try:
            found = ctypes.CDLL(candidate)
        except OSError:
            continue
        return prepare(found)
    raise EnvironmentProblem(
        f"CUDA's runtime library was not found ({', '.join(names)}; also in site-packages and /usr/local/cuda)",
        "JetPack and the CUDA toolkit bring it; or: pip install nvidia-cuda-runtime",
    )


def prepare(found: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the signatures of what is called."""
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, _int
    found.cudaGetErrorString.argtypes, found.cudaGetErrorString.restype = (_int,), ctypes.c_char_p
    return found


def _places(names: list[str]) -> Iterator[Path]:
    """Files outside the loader's path: of NVIDIA's wheels, and of the toolkit."""
    folders = [Path(entry) / "nvidia" / sub / "lib" for entry in sys.path for sub in ("cu13", "cuda_runtime")]
    for folder in (*folders, Path("/usr/local/cuda/lib64")):
        yield from (folder / name for name in names if (folder / name).is_file())


def _call(name: str, *arguments: Any) -> None:
    code = getattr(library(), name)(*arguments)
    if code:
        library().cudaGetLastError()  # or the next call reports this one
        why = library().cudaGetErrorString(code).decode(errors="replace")
        hint = (
            "close other programs, or build with a smaller --profile and --batch"
            if code == _MEMORY_ALLOCATION
            else None
        )
        raise CudaError(f"{name}: {why}", hint)


class DeviceMemory:
    """A block of device memory that frees itself."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address, self._free = 0, library().cudaFree
        address = _pointer()
        _call("cudaMalloc", ctypes.byref(address), max(nbytes, ALIGNMENT))
        self.address = address.value or 0

    def __del__(self) -> None:
        if self.address:
            self._free(self.address)
            self.address = 0


class HostMemory:
    """Page-locked memory of the host as a numpy array, which the GPU copies from and to without staging."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.address, self._free = 0, library().cudaFreeHost
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = _pointer()
        _call("cudaMallocHost", ctypes.byref(address), max(nbytes, 1))
        self.address = address.value or 0
        self.nbytes = nbytes
        memory = (ctypes.c_byte * nbytes).from_address(self.address)
        self.array: NDArray[Any] = np.frombuffer(memory, dtype=dtype).reshape(shape)
        self.array[...] = 0

    def __del__(self) -> None:
        if self.address:
            self._free(self.address)
            self.address = 0


class Graph:
    """Captured work that is launched with one call."""

    def __init__(self, handle: int) -> None:
        self._handle, self._destroy = handle, library().cudaGraphExecDestroy

    def launch(self, stream: Stream) -> None:
        _call("cudaGraphLaunch", self._handle, stream.handle)

    def __del__(self) -> None:
        self._destroy(self._handle)


class Stream:
    """A CUDA stream of its own: work in it runs in order."""

    def __init__(self) -> None:
        self.handle, self._destroy = 0, library().cudaStreamDestroy
        handle = _pointer()
        _call("cudaStreamCreateWithFlags", ctypes.byref(handle), _NON_BLOCKING)
        self.handle = handle.value or 0

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Copy a contiguous host array to the device and wait, as the array may be gone afterwards."""
        self.upload_async(target, source.ctypes.data, source.nbytes)
        self.synchronize()

    def download(self, target: NDArray[Any], source: int) -> None:
        """Copy to a contiguous host array and wait."""
        self.download_async(target.ctypes.data, source, target.nbytes)
        self.synchronize()

    def upload_async(self, target: int, source: int, nbytes: int) -> None:
        _call("cudaMemcpyAsync", target, source, nbytes, _HOST_TO_DEVICE, self.handle)

    def download_async(self, target: int, source: int, nbytes: int) -> None:
        _call("cudaMemcpyAsync", target, source, nbytes, _DEVICE_TO_HOST, self.handle)

    def copy_async(self, target: int, source: int, nbytes: int) -> None:
        """From device to device."""
        _call("cudaMemcpyAsync", target, source, nbytes, _DEVICE_TO_DEVICE, self.handle)

    def zero_async(self, target: int, nbytes: int) -> None:
        _call("cudaMemsetAsync", target, 0, nbytes, self.handle)

    def synchronize(self) -> None:
        _call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what ``work`` puts into this stream, without running it.

        Raises:
            EnvironmentProblem: something in it can't be captured; the stream is usable afterwards.
        """
        graph, executable = _pointer(), _pointer()
        _call("cudaStreamBeginCapture", self.handle, _CAPTURE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            library().cudaStreamEndCapture(self.handle, ctypes.byref(graph))
            library().cudaGetLastError()
            if graph.value:
                library().cudaGraphDestroy(graph)
            raise
        _call("cudaStreamEndCapture", self.handle, ctypes.byref(graph))
        try:
            _call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            library().cudaGraphDestroy(graph)
        return Graph(executable.value or 0)

    def __del__(self) -> None:
        if self.handle:
            self._destroy(self.handle)
            self.handle = 0
