"""Lazy tensors and the files they lie in: one safetensors or torch file, or a set of shards."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mamba_export.errors import CheckpointError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "uint64": 8,
    "int32": 4,
    "uint32": 4,
    "int16": 2,
    "uint16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "complex64": 8,
    "complex128": 16,
}
WEIGHT_DTYPES = ("float16", "bfloat16", "float32", "float64")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_MAP_FROM = 1 << 20  # smaller tensors are read, not mapped
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)$")


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint; its values are read by :meth:`load` and not before.

    ``name`` is the canonical name, ``source_name`` the one in ``file``.
    """

    name: str
    source_name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    _load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    storage_key: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    """Equal for two tensors that share their bytes."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values in the checkpoint's own dtype."""
        return self.numel * ITEM_SIZES.get(self.dtype, 0)

    def load(self) -> torch.Tensor:
        """The values as a contiguous CPU tensor, memory-mapped where the format allows.

        Do not write into it: the file would not change, but the next :meth:`load` might.
        """
        return self._load()

    def renamed(self, name: str) -> LazyTensor:
        """The same tensor under another canonical name."""
        return replace(self, name=name)


class WeightFile(Protocol):
    """One opened weight file."""

    path: Path
    tensors: dict[str, LazyTensor]

    def close(self) -> None:
        """Let go of the file. Tensors already loaded stay valid."""


class Weights:
    """All tensors of one checkpoint under their source names, out of one file or several."""

    def __init__(self, files: Iterable[WeightFile], described_by: Path | None = None) -> None:
        self._files = list(files)
        self.paths = [file.path for file in self._files]
        self.tensors: dict[str, LazyTensor] = {}
        for file in self._files:
            for name, tensor in file.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor '{name}' is in two files: {self.tensors[name].file.name} and {file.path.name}",
                        "remove the file that does not belong to this checkpoint",
                    )
                self.tensors[name] = tensor
        self.where = described_by.name if described_by else " and ".join(path.name for path in self.paths[:2])

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_tensor(path: Path, size: int, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    """A tensor whose bytes lie in a file at ``offset``.

    A large one is a private mapping of its own part of the file, so that its pages go when it goes.

    Args:
        size: what the file's size was when it was opened; another size now is an error.
    """
    import torch

    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    buffer, start = _part(path, size, offset, count * dtype.itemsize)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=start).reshape(shape)


def _part(path: Path, size: int, offset: int, length: int) -> tuple[mmap.mmap | bytearray, int]:
    """A writable view of a part of a file that never reaches the file, and where in the view the part starts."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                raise CheckpointError(f"{path} changed while it was read", "copy or download the file again")
            if length >= _MAP_FROM and offset % 8 == 0:
                start = offset % mmap.ALLOCATIONGRANULARITY
                try:
                    return mmap.mmap(
                        file.fileno(), start + length, access=mmap.ACCESS_COPY, offset=offset - start
                    ), start
                except OSError:
                    pass  # too many open files or mappings: read it instead
            file.seek(offset)
            part = bytearray(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(part) != length:
        raise CheckpointError(f"{path} changed while it was read", "copy or download the file again")
    return part, 0


def open_weight_file(path: Path) -> WeightFile:
    """Open a safetensors or a torch file; which one it is, the first bytes say.

    Raises:
        CheckpointError: the file is empty, truncated, corrupted or of another kind.
        UsageError: the file cannot be read at all.
    """
    from mamba_export.checkpoint.safetensors_file import SafetensorsFile
    from mamba_export.checkpoint.torch_file import TorchFile

    if not path.is_file():
        raise UsageError(f"{path} is not a file", "give a folder, a weight file or a hub id (org/name)")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes)", "copy or download the file again")
    if head.startswith((b"version", b"<!DOCTYPE", b"<html")):
        raise CheckpointError(
            f"{path} is a text file (a Git LFS pointer or a web page), not weights",
            "download the real file, for example with 'git lfs pull' or the hub's client",
        )
    if head[:4] == b"GGUF":
        raise UnsupportedError(f"{path} is a GGUF file", "export from the original checkpoint instead")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return SafetensorsFile(path)
    return TorchFile(path)


def open_weights(paths: list[Path], described_by: Path | None = None) -> Weights:
    """Open all files of one checkpoint; none stays open when one fails."""
    opened: list[WeightFile] = []
    try:
        opened.extend(open_weight_file(path) for path in paths)
        return Weights(opened, described_by)
    except BaseException:
        for file in opened:
            file.close()
        raise


def open_index(index: Path) -> Weights:
    """Open the shards that a ``*.index.json`` lists, and check that each tensor is in the shard it names."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not JSON: {error}", "download the file again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} has no 'weight_map' of names to files", "download the file again") from error
    shards = sorted(set(names.values()))
    if not shards:
        raise CheckpointError(f"{index} lists no tensors", "download the file again")
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names a shard outside its folder: '{shard}'")
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"shard '{shard}' of {index.parent} is missing; {index.name} lists {len(shards)} shards",
                "download the missing file into the same folder",
            )
    weights = open_weights([index.parent / shard for shard in shards], described_by=index)
    for name, shard in names.items():
        found = weights.tensors.get(name)
        if found is None or found.file.name != shard:
            weights.close()
            where = "in no shard" if found is None else f"in '{found.file.name}'"
            raise CheckpointError(f"{index.name} says that tensor '{name}' is in '{shard}', but it is {where}")
    return weights


def complete_shards(paths: list[Path]) -> list[Path] | None:
    """The files, sorted, when they are one complete set ``…-00001-of-00003…``; None when they are not shards at all.

    Raises:
        CheckpointError: when one of the set is missing.
    """
    matches = {path.name: _SHARD.match(path.name) for path in paths}
    if not paths or not all(matches.values()):
        return None
    kinds = {(m["stem"], m["count"], m["suffix"]) for m in matches.values() if m}
    if len(kinds) != 1:
        return None
    stem, count, suffix = kinds.pop()
    folder = paths[0].parent
    wanted = [folder / f"{stem}-{i + 1:05d}-of-{count}{suffix}" for i in range(min(int(count), 10_000))]
    for path in wanted:
        if not path.is_file():
            raise CheckpointError(
                f"shard '{path.name}' of {folder} is missing", "download the missing file into the same folder"
            )
    return wanted
