"""A small builder of ONNX nodes on onnx_ir, used to write function bodies and lowerings as plain Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

Flavour = Literal["portable", "ort", "ort-cpu"]
"""``portable``: standard ops, opset 20. ``ort``: ONNX Runtime's contrib ops too. ``ort-cpu``: the fastest of both on a
CPU."""
Array = np.ndarray[Any, Any]


class Builder:
    """Collects nodes: ``op.Mul(a, b)`` appends a node and returns its output value.

    Attribute access names the op type of the default domain; :meth:`contrib` builds ``com.microsoft`` nodes.
    Python numbers are not accepted as inputs: :meth:`f32` and :meth:`i64` make constants, whose node is shared.
    """

    def __init__(self, prefix: str = "", flavour: Flavour = "portable") -> None:
        self.nodes: list[ir.Node] = []
        self.prefix, self.flavour = prefix, flavour
        self._constants: dict[bytes, ir.Value] = {}

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str, attributes: dict[str, Any]
    ) -> list[ir.Value]:
        attrs = [a if isinstance(a, ir.Attr) else ir.convenience.convert_attribute(k, a) for k, a in attributes.items()]
        name = f"{self.prefix}{op_type}_{len(self.nodes)}"
        node = ir.Node(domain, op_type, inputs, attrs, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_out{i}"
        self.nodes.append(node)
        return list(node.outputs)

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def build(*inputs: ir.Value | None, **attributes: Any) -> ir.Value:
            return self.node(op_type, inputs, 1, "", attributes)[0]

        return build

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int = -1) -> list[ir.Value]:
        return self.node("Split", [x, self.i64(sizes)], len(sizes), "", {"axis": axis})

    def contrib(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> list[ir.Value]:
        return self.node(op_type, inputs, outputs, "com.microsoft", attributes)

    def constant(self, array: Array) -> ir.Value:
        key = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        if key not in self._constants:
            self._constants[key] = self.Constant(value=ir.AttrTensor("value", ir.tensor(array)))
        return self._constants[key]

    def f32(self, value: float) -> ir.Value:
        return self.constant(np.array(value, np.float32))

    def i64(self, values: int | Sequence[int]) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def to(self, x: ir.Value, dtype: ir.DataType, like: ir.DataType | None) -> ir.Value:
        """Cast ``x`` to ``dtype`` unless ``like``, the type it is known to have, is that already."""
        return x if like == dtype else self.Cast(x, to=int(dtype))

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        return self.Unsqueeze(x, self.i64(list(axes)))

    def silu(self, x: ir.Value) -> ir.Value:
        if self.flavour != "portable":
            return self.contrib("QuickGelu", x, alpha=1.0)[0]
        return self.Mul(x, self.Sigmoid(x))

    def flip(self, x: ir.Value, axis: int) -> ir.Value:
        """Reverse ``x`` along ``axis``."""
        last, past_first, step = [-1], [-(2**62)], [-1]
        return self.Slice(x, self.i64(last), self.i64(past_first), self.i64([axis]), self.i64(step))

    def valid_mask(self, x: ir.Value, seq_lens: ir.Value) -> ir.Value:
        """bool [B, L]: True at the positions of ``x`` [B, L, ...] that lie inside their row."""
        length = self.Gather(self.Shape(x), self.i64(1), axis=0)
        position = self.Range(self.i64(0), length, self.i64(1))
        lens = self.Cast(self.unsqueeze(seq_lens, 1), to=int(ir.DataType.INT64))
        return self.Less(self.unsqueeze(position, 0), lens)


def static_dim(value: ir.Value, axis: int) -> int:
    """The compile-time size of one axis of a traced value.

    Raises:
        ValueError: when the axis is dynamic or the shape unknown: a body can't be built then.
    """
    dim = None if value.shape is None else value.shape[axis]
    if not isinstance(dim, int):
        raise ValueError(f"axis {axis} of {value.name} is not static: {value.shape}")
    return dim
