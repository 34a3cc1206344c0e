"""The statistics file: what a calibration saw, in safetensors, with where it came from.

``ids`` [windows, length] are the windows themselves, so that whatever needs activations later (GPTQ, ranges after a
rotation) can run them again. ``input/LAYER/…`` are the fields of an :class:`~.observers.Observer` of each linear
layer's input; ``state/LAYER`` [channels, d_state] (or [nheads, d_state]) the largest magnitude of each entry of the
scan's state at the ends of windows.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_export.errors import UsageError

from .observers import Observer

FORMAT, VERSION = "mamba-export-calibration", "1"
_HINT = "make one with: mamba-export calibrate CKPT --data FILE -o calib.safetensors"


@dataclass
class Statistics:
    """Statistics of a calibration, complete or under way.

    Attributes:
        ids: int64 [windows, length].
        inputs: observers by layer name (``backbone.layers.0.mixer.in_proj``).
        states: by layer index, largest magnitudes of the SSM state.
        provenance: checkpoint name and sha256, data name and sha256, versions.
        done: windows that are in the statistics.
    """

    ids: Tensor
    inputs: dict[str, Observer] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    done: int = 0

    @property
    def complete(self) -> bool:
        return self.done == self.ids.shape[0]

    def check(self, checkpoint_sha256: str) -> None:
        """Refuse statistics of another checkpoint, of no data, or of activations that say nothing.

        Raises:
            UsageError: which of these it is.
        """
        if self.provenance.get("checkpoint_sha256") != checkpoint_sha256:
            raise UsageError(
                f"the statistics belong to another checkpoint ('{self.provenance.get('checkpoint')}', "
                f"sha256 {str(self.provenance.get('checkpoint_sha256'))[:8]}…)",
                "calibrate the checkpoint that is to be quantized",
            )
        self.check_values()

    def check_values(self) -> None:
        """Refuse activations that are not finite, or all zero.

        Raises:
            UsageError: names the layer.
        """
        for name, observer in self.inputs.items():
            peak = observer.peak
            if not bool(torch.isfinite(peak).all()) or not bool(torch.isfinite(observer.squares).all()):
                raise UsageError(
                    f"the input of {name} is not finite on the calibration data",
                    "the checkpoint is damaged, or its activations overflow: look at it with mamba-export perplexity",
                )
            if not bool((peak > 0).any()):
                raise UsageError(
                    f"the input of {name} is zero on all of the calibration data",
                    "the checkpoint is untrained or damaged, or the data is a single repeated token",
                )

    def save(self, path: Path) -> int:
        """Write the file, atomically; returns its size."""
        from safetensors.torch import save

        tensors = {"ids": self.ids.to(torch.int32)}
        for name, observer in self.inputs.items():
            tensors |= {f"input/{name}/{key}": value.cpu() for key, value in observer.tensors().items()}
        tensors |= {f"state/{i}": value.cpu() for i, value in self.states.items()}
        counted = {name: observer.tokens for name, observer in self.inputs.items()}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "done": str(self.done),
            "tokens": json.dumps(counted),
            "provenance": json.dumps(self.provenance),
        }
        content = save({key: value.contiguous() for key, value in tensors.items()}, metadata)
        try:
            handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                Path(partial).chmod(0o644)
                os.replace(partial, path)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}", "choose another -o") from error
        return len(content)


def load_statistics(path: str | Path) -> Statistics:
    """Read a statistics file.

    Raises:
        UsageError: it is missing, damaged, incomplete or something else.
    """
    found = read_statistics(Path(path))
    if not found.complete:
        raise UsageError(
            f"{path} is of a calibration that did not end ({found.done} of {found.ids.shape[0]} windows)",
            "run the same mamba-export calibrate again: it continues",
        )
    return found


def read_statistics(path: Path) -> Statistics:
    """:func:`load_statistics`, also of a calibration under way."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"no such statistics file: {path}", _HINT)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UsageError(f"{path} is not a statistics file", _HINT)
            if metadata.get("version") != VERSION:
                raise UsageError(f"{path} is of version {metadata.get('version')}, this mamba-export reads {VERSION}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        counted = json.loads(metadata["tokens"])
        grouped: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("input/"):
                _, name, kind = key.split("/")
                grouped.setdefault(name, {})[kind] = value
        return Statistics(
            ids=tensors["ids"].long(),
            inputs={name: Observer.restore(parts, counted[name]) for name, parts in grouped.items()},
            states={int(key[6:]): value for key, value in tensors.items() if key.startswith("state/")},
            provenance=json.loads(metadata["provenance"]),
            done=int(metadata["done"]),
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged or not a statistics file: {error}", _HINT) from error
