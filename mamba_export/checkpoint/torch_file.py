"""One torch file: a state dict saved by ``torch.save``, read without running any code it may hold."""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mamba_export.checkpoint.storage import LazyTensor, read_tensor
from mamba_export.errors import CheckpointError, MissingExtraError, UnsupportedError

if TYPE_CHECKING:
    import torch

_HARMLESS = re.compile(r"^(torch\.\w+|torch\._utils\._rebuild_\w+|torch\.storage\.\w+|collections\.OrderedDict)$")
# Keys under which training scripts put the state dict.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


class TorchFile:
    """A torch file, memory-mapped when it is a zip (torch 1.6 and later), read whole when it is older."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = _state_dict(_load_weights_only(path), path)
        self.tensors = {name: self._lazy(name, value) for name, value in self._values.items()}
        self._size = path.stat().st_size
        self._origin = _origin(path, self._values)

    def _lazy(self, name: str, value: torch.Tensor) -> LazyTensor:
        import torch

        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise UnsupportedError(
                f"{self.path}: tensor '{name}' is sparse, quantized or without values", "supported: dense tensors"
            )
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.stride())
        dtype = str(value.dtype).removeprefix("torch.")
        return LazyTensor(name, name, tuple(value.shape), dtype, self.path, lambda: self._read(name), place)

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._values:
            raise ValueError(f"{self.path} is closed")
        value = self._values[name].detach()
        if self._origin is None or not value.is_contiguous() or not value.numel():
            return value.contiguous()
        return read_tensor(self.path, self._size, value.dtype, tuple(value.shape), value.data_ptr() - self._origin)

    def close(self) -> None:
        """Drop the tensors; torch unmaps the file with the last of them."""
        self._values = {}


def _origin(path: Path, values: dict[str, torch.Tensor]) -> int | None:
    """The address at which torch has mapped the file; None when it has not, or when that is not certain.

    With it the place of a tensor in the file is known, and the tensor can be mapped on its own. torch maps the whole
    file at once, so pages that were read through its mapping would stay resident until the last tensor goes.
    """
    records = _record_offsets(path)
    addresses = {value.untyped_storage().data_ptr() for value in values.values() if value.numel()}
    if not records or not addresses:
        return None
    # The true origin is among these. A second one fits when a part of the file repeats the sizes of another, as the
    # state of an optimizer does.
    origins = (min(addresses) - offset for offset in records)
    fitting = [o for o in origins if o % mmap.PAGESIZE == 0 and all(address - o in records for address in addresses)]
    return fitting[0] if len(fitting) == 1 else None


def _record_offsets(path: Path) -> set[int]:
    """Where the values of each storage start in a torch zip; empty for other files and for foreign byte orders."""
    if not zipfile.is_zipfile(path):
        return set()
    offsets = set()
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            inner = info.filename.partition("/")[2]
            if inner == "byteorder":
                try:
                    native = archive.read(info) == sys.byteorder.encode()
                except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
                    native = False
                if not native:
                    return set()
            if inner.startswith("data/") and info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset)
                header = file.read(30)
                if len(header) == 30 and header[:4] == b"PK\x03\x04":
                    name, extra = struct.unpack("<HH", header[26:30])
                    offsets.add(info.header_offset + 30 + name + extra)
    return offsets


def _load_weights_only(path: Path) -> Any:
    zipped = _check_container(path)
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "export", "reading a checkpoint") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError as error:
        raise CheckpointError(f"{path} asks for more memory than there is; it is damaged", _hint(path)) from error
    except Exception as error:
        called = _foreign_global(path, zipped) if isinstance(error, pickle.UnpicklingError) else None
        if called:
            raise CheckpointError(
                f"{path} would run code when loaded (it calls '{called}'); nothing of it was run",
                "save only the tensors: torch.save(model.state_dict(), path), or safetensors",
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0][:160]
        raise CheckpointError(f"{path} is truncated or damaged: {reason}", _hint(path)) from error


def _check_container(path: Path) -> bool:
    """True for torch's zip format, False for the older pickles; anything else is an error that says what it is."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.partition("/")[2] for name in archive.namelist()]
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged: its list of contents is gone", _hint(path)
            ) from error
        if "data.pkl" not in names:
            raise CheckpointError(f"{path} is a zip file, but not one of torch", "give a file written by torch.save")
        if "constants.pkl" in names:
            raise UnsupportedError(
                f"{path} is a TorchScript archive", "save model.state_dict() with torch.save instead"
            )
        return True
    if len(head) < 2 or head[0] != 0x80 or head[1] > 5:
        raise CheckpointError(
            f"{path} is not a torch file (its first bytes are {head!r})", "give a .pt, .bin or .safetensors file"
        )
    return False


def _foreign_global(path: Path, zipped: bool) -> str | None:
    """The first name in the pickle that no state dict refers to, found by reading its opcodes, not by running them."""
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                return _foreign_opcode(io.BytesIO(archive.read(name)))
        with path.open("rb") as file:
            for _ in range(4):  # magic number, protocol, system, object
                found = _foreign_opcode(file)
                if found:
                    return found
    except Exception as error:  # a damaged stream of opcodes; the caller reports the damage
        raise CheckpointError(f"{path} is truncated or damaged", _hint(path)) from error
    return None


def _foreign_opcode(stream: IO[bytes]) -> str | None:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            found = str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
            found = ".".join(strings[-2:])
        else:
            if isinstance(argument, str):
                strings.append(argument)
            continue
        if not _HARMLESS.match(found):
            return found
    return None


def _hint(path: Path) -> str:
    return f"copy or download {path.name} again"


def _state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    import torch

    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict) or not loaded:
        kind = "an empty table" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise CheckpointError(
            f"{path} holds {kind}, not a state dict",
            f"expected names and tensors, possibly under one of: {', '.join(WRAPPERS)}",
        )
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: '{name}' is a {type(value).__name__}, expected a tensor",
                f"expected a state dict: names and tensors, possibly under one of: {', '.join(WRAPPERS)}",
            )
    return dict(loaded)
