"""One safetensors file: its header is read and checked here, its values stay on disk until they are asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_export.checkpoint.storage import ITEM_SIZES, LazyTensor, read_tensor
from mamba_export.errors import CheckpointError, MissingExtraError, UsageError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "U64": "uint64",
    "I32": "int32",
    "U32": "uint32",
    "I16": "int16",
    "U16": "uint16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}
_MAX_HEADER = 100_000_000
_AGAIN = "copy or download the file again"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
    """Dtype, shape and absolute offset of each tensor, and the file's size. Needs no package.

    Every offset is checked against the shape and the file before anything is read.

    Raises:
        CheckpointError: the file is truncated or its header lies.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > _MAX_HEADER:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: "
                    f"its header should have {length} bytes, the file has {size}",
                    _AGAIN,
                )
            raw = file.read(length)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged ({error})", _AGAIN) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is damaged (not a table of tensors)", _AGAIN)
    header.pop("__metadata__", None)
    start = 8 + length
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    extents = []
    for name, entry in header.items():
        dtype, shape, begin, end = _check_entry(path, name, entry)
        if end > size - start:
            raise CheckpointError(
                f"{path} is truncated: tensor '{name}' ends at byte {start + end}, the file has {size}", _AGAIN
            )
        entries[name] = (dtype, shape, start + begin)
        extents.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(extents):
        if begin != position:
            raise CheckpointError(
                f"{path}: the safetensors header is damaged (tensor '{name}' starts at {begin}, expected {position})",
                _AGAIN,
            )
        position = end
    if position != size - start:
        raise CheckpointError(
            f"{path}: the tensors take {position} bytes, but {size - start} follow the header", _AGAIN
        )
    return entries, size


def _check_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        code, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of tensor '{name}' is damaged", _AGAIN) from error
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers) or begin > end:
        raise CheckpointError(f"{path}: tensor '{name}' has the impossible shape {shape} at {begin}:{end}", _AGAIN)
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: tensor '{name}' has the unknown dtype {code!r}", f"known: {', '.join(DTYPES)}")
    expected = math.prod(shape) * ITEM_SIZES[dtype]
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor '{name}' of shape {list(shape)} and dtype {code} needs {expected} bytes, "
            f"the header gives it {end - begin}",
            _AGAIN,
        )
    return dtype, tuple(shape), begin, end


class SafetensorsFile:
    """A safetensors file. Each large tensor is mapped on its own, so that its pages go when it goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._closed = False
        entries, self._size = read_header(path)
        self.tensors = {name: self._lazy(name, *entry) for name, entry in entries.items()}

    def _lazy(self, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> LazyTensor:
        place = (str(self.path), offset)
        return LazyTensor(name, name, shape, dtype, self.path, lambda: self._read(dtype, shape, offset), place)

    def _read(self, dtype: str, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "export", "reading a checkpoint") from error
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        return read_tensor(self.path, self._size, getattr(torch, dtype), shape, offset)

    def close(self) -> None:
        """Refuse further reads. The file is only open while a tensor is read."""
        self._closed = True
