"""Finds and loads the CUDA kernel library (``libmamba_kernels.so``) and calls its C ABI through ctypes.

An op's wrapper declares its params struct with :func:`params_struct` and launches it with :func:`launch`, which
allocates the workspace, passes torch's current stream and turns an error status into a :class:`KernelError`.
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

__all__ = ["KernelError", "available", "dtype_code", "launch", "load", "params_struct", "pointer", "tactics"]

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


def tactics(op: str, params: ctypes.Structure) -> list[int]:
    """The tactics that cover the shape in ``params``, the selector's own choice first."""
    out = (ctypes.c_int32 * 256)()
    count = getattr(load(), f"mamba_{op}_tactics")(ctypes.byref(params), out, len(out))
    return list(out[:count])


def launch(op: str, params: ctypes.Structure, like: Tensor) -> None:
    """Runs ``mamba_<op>`` on the current stream of the device of ``like``, with a workspace if the op asks for one."""
    import torch

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
