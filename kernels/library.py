"""Finds and loads the CUDA kernel library (``libmamba_kernels.so``) and calls its C ABI through ctypes.

An op's wrapper declares its params struct with :func:`params_struct`, checks its tensors with :class:`Arguments` and
launches with :func:`launch`, which allocates the workspace, passes torch's current stream and turns an error status
into a :class:`KernelError`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_export.errors import EnvironmentProblem, MambaExportError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Arguments",
    "KernelError",
    "available",
    "covers",
    "dense",
    "dtype_code",
    "launch",
    "load",
    "params_struct",
    "pointer",
    "tactics",
]

LIBRARY_NAME = "libmamba_kernels.so"
ENVIRONMENT_VARIABLE = "MAMBA_KERNELS_LIBRARY"
_HERE = Path(__file__).resolve().parent


class KernelError(MambaExportError):
    """A kernel refused its arguments or failed to launch."""


def _candidates() -> list[Path]:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return [Path(named)]
    return [_HERE / LIBRARY_NAME, _HERE / "lib" / LIBRARY_NAME, _HERE.parent / "build" / LIBRARY_NAME]


@functools.cache
def load() -> ctypes.CDLL:
    """The library, loaded once: from ``MAMBA_KERNELS_LIBRARY``, the package, or ``build/`` beside it."""
    for path in _candidates():
        if path.is_file():
            library = ctypes.CDLL(str(path))
            library.mamba_status_string.restype = ctypes.c_char_p
            return library
    raise EnvironmentProblem(
        f"{LIBRARY_NAME} not found (looked at {', '.join(map(str, _candidates()))})",
        hint="cmake -S kernels/cuda -B build && cmake --build build",
    )


def available() -> bool:
    """Whether the library loads here (says nothing about a GPU)."""
    try:
        load()
    except (EnvironmentProblem, OSError):
        return False
    return True


_CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "f32": ctypes.c_float}


def params_struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A struct from ``"i32 dtype batch; ptr u y; size workspace_size"``, in the order of the C header."""
    kinds = {**_CTYPES, "ptr": ctypes.c_void_p, "size": ctypes.c_size_t}
    members: list[tuple[str, Any]] = []
    for group in fields.split(";"):
        kind, *names = group.split()
        members += [(n, kinds[kind]) for n in names]
    return type(name, (ctypes.Structure,), {"_fields_": members})


def dtype_code(dtype: Any) -> int:
    """``mamba_dtype`` of a torch dtype."""
    codes = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2}
    if str(dtype) not in codes:
        raise KernelError(f"dtype {dtype} is not supported by the kernels", hint="use float32, float16 or bfloat16")
    return codes[str(dtype)]


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor, outer: int) -> Tensor:
    """The tensor itself if it is dense behind its first ``outer`` dimensions, otherwise a dense copy."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[outer:]), reversed(tensor.stride()[outer:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


class Arguments:
    """The tensors of one call: checked, made dense where the kernels need it, and kept alive until the launch.

    ``fields`` collects pointers and strides under the names of the params struct.
    """

    def __init__(self, op: str, like: Tensor) -> None:
        self.op, self.device, self.dtype = op, like.device, like.dtype
        self.fields: dict[str, int | float | None] = {}
        self._alive: list[Tensor] = []

    def activation(self, name: str, tensor: Tensor | None, shape: tuple[int, ...], strides: tuple[str, ...]) -> None:
        """A tensor in the dtype of the activations, with a stride parameter for each of its first dimensions."""
        if tensor is None:
            return
        self._check(name, tensor, (tuple(shape),), self.dtype)
        tensor = dense(tensor, len(strides))
        self._add(name, tensor)
        self.fields |= {f"{name}_{which}_stride": tensor.stride(i) for i, which in enumerate(strides)}

    def constant(self, name: str, tensor: Tensor | None, *shapes: tuple[int, ...], dtype: Any = None) -> None:
        """A tensor dense throughout, float32 or ``dtype``, of one of ``shapes``."""
        import torch

        if tensor is not None:
            self._check(name, tensor, shapes, dtype or torch.float32)
            self._add(name, tensor.contiguous())

    def output(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: Any, strides: tuple[str, ...] = ()
    ) -> None:
        """A tensor to write to, dense behind the dimensions that have a stride parameter: never copied."""
        self._check(name, tensor, (tuple(shape),), dtype)
        if dense(tensor, len(strides)) is not tensor:
            raise KernelError(f"{self.op}: {name} must be dense")
        self._add(name, tensor)
        self.fields |= {f"{name}_{which}_stride": tensor.stride(i) for i, which in enumerate(strides)}

    def _check(self, name: str, tensor: Tensor, shapes: tuple[tuple[int, ...], ...], dtype: Any) -> None:
        if tensor.device != self.device or not tensor.is_cuda:
            raise KernelError(f"{self.op}: {name} is on {tensor.device}, but must be on one GPU with the others")
        if tensor.dtype != dtype:
            raise KernelError(f"{self.op}: {name} must be {dtype}, not {tensor.dtype}")
        if tuple(tensor.shape) not in shapes:
            raise KernelError(
                f"{self.op}: {name} has shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}"
            )

    def _add(self, name: str, tensor: Tensor) -> None:
        self._alive.append(tensor)
        self.fields[name] = tensor.data_ptr()


def tactics(op: str, params: ctypes.Structure) -> list[int]:
    """The tactics that cover the shape in ``params``, the selector's own choice first."""
    out = (ctypes.c_int32 * 256)()
    count = getattr(load(), f"mamba_{op}_tactics")(ctypes.byref(params), out, len(out))
    return list(out[:count])


def covers(op: str) -> bool:
    """Whether the CUDA kernel of ``op`` can be had here: from the library, or compiled at run time."""
    from . import nvrtc, nvrtc_ops

    return available() or (op in nvrtc_ops.OPS and nvrtc.available())


def launch(op: str, params: ctypes.Structure, like: Tensor) -> None:
    """Runs ``mamba_<op>`` on the current stream of the device of ``like``, with a workspace if the op asks for one.

    Where the library is not built, NVRTC makes the kernels that it can make.
    """
    import torch

    if not available():
        from . import nvrtc_ops

        if op in nvrtc_ops.OPS:
            with torch.cuda.device(like.device):
                nvrtc_ops.launch(op, params)
            return
    library = load()
    with torch.cuda.device(like.device):
        size_of = getattr(library, f"mamba_{op}_workspace")
        size_of.restype = ctypes.c_size_t
        size = size_of(ctypes.byref(params))
        workspace = torch.empty(size, dtype=torch.uint8, device=like.device) if size else None
        if hasattr(params, "workspace"):
            params.workspace, params.workspace_size = pointer(workspace), size
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(library, f"mamba_{op}")(ctypes.byref(params), stream)
    if status != 0:
        raise KernelError(f"{op}: {library.mamba_status_string(status).decode()}")
