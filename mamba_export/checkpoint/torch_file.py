"""One torch file: a state dict saved by ``torch.save``, read without running any code it may hold."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_export.checkpoint.storage import LazyTensor
from mamba_export.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    import torch

# Keys under which training scripts put the state dict.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

_GLOBAL = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class|Unsupported operand)\s+(\S+)")


class TorchFile:
    """A torch file, memory-mapped when it is a zip (torch 1.6 and later), read whole when it is older."""

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = _load_weights_only(path)
        self.tensors = {name: _lazy(name, value, path) for name, value in _state_dict(loaded, path).items()}

    def close(self) -> None:
        """Drop the tensors; torch unmaps the file with the last of them."""
        self.tensors = {}


def _load_weights_only(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "export", "reading a checkpoint") from error
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        text = str(error)
        found = _GLOBAL.search(text)
        if found or "GLOBAL" in text or "weights_only" in text.lower() and "unsupported" in text.lower():
            what = f": it refers to '{found[1]}'" if found else ""
            raise CheckpointError(
                f"{path} would run code when loaded{what}; nothing of it was run",
                "save only the tensors: torch.save(model.state_dict(), path), or safetensors",
            ) from error
        raise CheckpointError(f"{path} is not a torch file, or it is damaged", _hint(path)) from error
    except MemoryError as error:
        raise CheckpointError(f"{path} asks for more memory than there is; it is damaged", _hint(path)) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} is truncated or damaged: {reason}", _hint(path)) from error


def _hint(path: Path) -> str:
    return f"copy or download {path.name} again"


def _state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(loaded, dict) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        for wrapper in WRAPPERS:
            if isinstance(loaded.get(wrapper), dict):
                return _state_dict(loaded[wrapper], path)
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


def _lazy(name: str, value: torch.Tensor, path: Path) -> LazyTensor:
    import torch

    if value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(f"{path}: tensor '{name}' is sparse or quantized; dense tensors are supported")
    tensor = value.detach()
    key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return LazyTensor(name, name, tuple(tensor.shape), dtype, path, tensor.contiguous, key)
