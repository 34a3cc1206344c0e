"""A conversation in a file: the recurrent state and the tokens behind it, a few hundred kilobytes.

The file is in safetensors format, so that any tool can read it. Its metadata says which checkpoint the state belongs
to; states lie in one layout ([batch, nheads, headdim, d_state] for Mamba-2) whatever the bundle's target, so that a
conversation can move between bundles of the same checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.errors import UsageError
from mamba_export.spec import ModelSpec
from mamba_export.states import Layout, state_table

FORMAT = "mamba-export-state"
VERSION = 1
_DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_MAX_HEADER = 64 << 20


@dataclass
class Snapshot:
    """Where the rows of a batch stand: all but the last of each row's tokens have gone through the model.

    Attributes:
        tokens: of each row, prompt and continuation.
        arrays: states [batch, …] by name, in ``PN`` layout.
        random: the generators of the sampler, one a row; empty after greedy decoding.
    """

    tokens: list[list[int]]
    arrays: dict[str, NDArray[Any]]
    random: list[dict[str, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size of the states."""
        return sum(array.nbytes for array in self.arrays.values())


def spec_hash(spec: ModelSpec) -> str:
    """A hash of every dimension and option of the model."""
    return hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode()).hexdigest()


def to_layout(arrays: dict[str, NDArray[Any]], spec: ModelSpec, layout: Layout) -> dict[str, NDArray[Any]]:
    """States between the file's ``PN`` layout and that of a target; the same function serves both ways."""
    if layout == "PN" or spec.family == "mamba1":
        return arrays
    return {
        name: np.ascontiguousarray(np.swapaxes(array, -1, -2)) if name.startswith("ssm_") else array
        for name, array in arrays.items()
    }


def save_state(path: str | Path, snapshot: Snapshot, spec: ModelSpec, checkpoint_sha256: str) -> int:
    """Write a snapshot. A kill at any moment leaves the old file or the new one.

    Args:
        path: the file to make or replace.
        snapshot: what to keep.
        spec: of the model.
        checkpoint_sha256: of the weights the state was computed with.

    Returns:
        the size of the file.

    Raises:
        UsageError: the file can't be written there.
    """
    path = Path(path)
    tensors: dict[str, Any] = {}
    data = bytearray()
    for name, array in snapshot.arrays.items():
        kind = "F16" if array.dtype == np.float16 else "F32"
        raw = np.ascontiguousarray(array, _DTYPES[kind]).tobytes()
        tensors[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    tokens = json.dumps(snapshot.tokens)
    random = json.dumps(snapshot.random)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "checkpoint_sha256": checkpoint_sha256,
        "spec_sha256": spec_hash(spec),
        "tokens": tokens,
        "random": random,
        "content_sha256": _content_hash(tokens, random, data),
    }
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    try:
        _write_atomic(path, len(header).to_bytes(8, "little") + header + bytes(data))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    return path.stat().st_size


def _content_hash(tokens: str, random: str, data: bytes | bytearray | memoryview) -> str:
    digest = hashlib.sha256(tokens.encode())
    digest.update(b"\0" + random.encode() + b"\0")
    digest.update(data)
    return digest.hexdigest()


def _write_atomic(path: Path, content: bytes) -> None:
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(0o644)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(partial).unlink()
        raise


def load_state(path: str | Path, spec: ModelSpec, checkpoint_sha256: str) -> Snapshot:
    """Read a snapshot back.

    Raises:
        UsageError: the file is missing, not a state file, truncated or damaged, or of another model.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    header, data = _split(path, content)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UsageError(f"{path} is not a state file", "make one with: mamba-export generate … --save-state FILE")
    if metadata.get("version") != str(VERSION):
        raise UsageError(f"{path} is of version {metadata.get('version')}, this mamba-export reads {VERSION}")
    if metadata.get("spec_sha256") != spec_hash(spec):
        raise UsageError(f"{path} belongs to a model of another shape", "load it with the bundle that saved it")
    if metadata.get("checkpoint_sha256") != checkpoint_sha256:
        raise UsageError(f"{path} belongs to other weights of this shape", "load it with the bundle that saved it")
    damaged = UsageError(f"{path} is damaged", "start again without --load-state")
    try:
        tokens, random = metadata["tokens"], metadata["random"]
        if _content_hash(tokens, random, data) != metadata["content_sha256"]:
            raise damaged
        arrays = {name: _array(entry, data) for name, entry in header.items()}
        snapshot = Snapshot(json.loads(tokens), arrays, json.loads(random))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged from error
    _check_shapes(path, snapshot, spec)
    return snapshot


def _split(path: Path, content: bytes) -> tuple[dict[str, Any], memoryview]:
    foreign = UsageError(f"{path} is not a state file", "make one with: mamba-export generate … --save-state FILE")
    length = int.from_bytes(content[:8], "little")
    if len(content) < 10 or length > _MAX_HEADER or content[8:9] != b"{":
        raise foreign
    truncated = UsageError(f"{path} is truncated", "start again without --load-state")
    if len(content) < 8 + length:
        raise truncated
    try:
        header = json.loads(content[8 : 8 + length])
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise foreign from error
    data = memoryview(content)[8 + length :]
    if not isinstance(end, int) or len(data) < end:
        raise truncated
    return header, data


def _array(entry: dict[str, Any], data: memoryview) -> NDArray[Any]:
    start, end = entry["data_offsets"]
    shape = tuple(int(dim) for dim in entry["shape"])
    array: NDArray[Any] = np.frombuffer(data[start:end], _DTYPES[entry["dtype"]]).reshape(shape)
    copy: NDArray[Any] = array.copy()
    return copy


def _check_shapes(path: Path, snapshot: Snapshot, spec: ModelSpec) -> None:
    batch = len(snapshot.tokens)
    wanted = {state.name: (batch, *state.shape) for state in state_table(spec, "fp32")}
    found = {name: array.shape for name, array in snapshot.arrays.items()}
    known = range(spec.vocab_size)
    good = all(row and all(isinstance(token, int) and token in known for token in row) for row in snapshot.tokens)
    if found != wanted or not batch or not good:
        raise UsageError(f"{path} does not hold the states of this model", "start again without --load-state")
