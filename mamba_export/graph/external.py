"""weights.bin: the parameters of both graphs, written once, streamed from the checkpoint tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch

from mamba_export.checkpoint import Checkpoint
from mamba_export.models.weights import load_parameter

WEIGHTS_FILE = "weights.bin"
# Large tensors start on a page, so that a runtime can map them; small ones on a cache line.
_PAGE, _LINE = 4096, 64
_TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True)
class Placement:
    """Where one tensor lies in weights.bin."""

    offset: int
    nbytes: int


def place_weights(graphs: list[ir.Model]) -> dict[str, Placement]:
    """Lay out all parameters of ``graphs``, each name once, and point the graphs at weights.bin.

    Initializers that have data already are small constants of the graph and stay in it. A name with a slash is a view:
    the bytes of the name before the slash, in another shape.

    Raises:
        ValueError: when two graphs disagree on the dtype or shape of an initializer.
    """
    placements: dict[str, Placement] = {}
    seen: dict[str, tuple[ir.DataType | None, str]] = {}
    offset = 0
    for model in graphs:
        for name, value in model.graph.initializers.items():
            if value.const_value is not None:
                continue
            if seen.setdefault(name, (value.dtype, str(value.shape))) != (value.dtype, str(value.shape)):
                raise ValueError(f"initializer {name} differs between the graphs")
            assert value.shape is not None and value.dtype is not None
            nbytes = math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)
            key = name.partition("/")[0]
            if key not in placements:
                align = _PAGE if nbytes >= _PAGE else _LINE
                offset = -(-offset // align) * align
                placements[key] = Placement(offset, nbytes)
                offset += nbytes
            place = placements[key]
            if place.nbytes != nbytes:
                raise ValueError(f"{name} has {nbytes} bytes, {key} has {place.nbytes}")
            value.const_value = ir.ExternalTensor(
                *(WEIGHTS_FILE, place.offset, place.nbytes, value.dtype), shape=value.shape, name=name
            )
    return placements


def write_weights(
    checkpoint: Checkpoint,
    graph: ir.Model,
    placements: dict[str, Placement],
    file: BinaryIO,
    tick: Callable[[int], None],
    fills: Mapping[str, Callable[[], torch.Tensor]] | None = None,
) -> None:
    """Write the data of every placed tensor, in order, holding one at a time.

    Args:
        checkpoint: where the tensors come from.
        graph: any of the placed graphs, for dtypes and shapes.
        placements: of :func:`place_weights`.
        file: open for writing in binary.
        tick: called with the number of bytes written after each tensor.
        fills: bytes of the tensors that do not come from the checkpoint.

    Raises:
        CheckpointError: when a tensor holds values that are not finite.
    """
    for name, place in placements.items():
        fill = (fills or {}).get(name)
        if fill is not None:
            tensor = fill()
        else:
            value = graph.graph.initializers[name]
            assert value.shape is not None and value.dtype is not None
            tensor = load_parameter(checkpoint, name, tuple(value.shape.numpy()), _TORCH_DTYPES[value.dtype])
        content = tensor.reshape(-1).view(torch.uint8)
        if content.numel() != place.nbytes:
            raise ValueError(f"{name} has {content.numel()} bytes, its place {place.nbytes}")
        file.write(b"\0" * (place.offset - file.tell()))
        file.write(content.numpy().data)
        tick(place.nbytes)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph alone; its initializers refer to weights.bin in the same folder."""
    ir.save(model, path)
