"""Quantization in the graph: products and lookups of quantized matrices, explicit Q/DQ, and the state's type.

Two dialects. Where ONNX Runtime is the target, weight-only products become ``com.microsoft`` MatMulNBits and lookups
GatherBlockQuantized, whose blobs it multiplies as they are. Everywhere else, and for products whose input is quantized
too, weights go through DequantizeLinear and inputs through QuantizeLinear and DequantizeLinear: the form that TensorRT
(strongly typed) and ONNX Runtime fuse.

A quantized weight is named after the parameter: ``NAME.q`` and ``NAME.scale``. A name with a slash is a view: the same
bytes as the name before the slash, in another shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mamba_export.graph.passes import replace_node
from mamba_export.ops.builder import Builder
from mamba_export.quantized import EMBEDDING, HEAD, Linear, Matrix, QuantizedModel
from mamba_export.targets import Target

OPSET = 21
"""Of quantized graphs: the first with blocks in DequantizeLinear and with 4-bit integers."""
_FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TORCH_OF = {_FLOATS[name]: _TORCH[name] for name in _FLOATS}
_STORED = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}
_BITS = {"int8": 8, "int4": 4}

Fill = Callable[[], Tensor]


class QuantizePass(ir.passes.InPlacePass):
    """Replace products with, and lookups in, the matrices that ``model`` holds quantized.

    Requires: weights are still ``MatMul(x, Transpose(W))`` and ``Gather(W, ids)``.

    Args:
        model: the matrices and what happens to inputs.
        dtype: of the graph.
        target: tells the dialect.

    Attributes:
        fills: after the pass, where the data of the new initializers comes from; tensors of raw bytes.
    """

    def __init__(self, model: QuantizedModel, dtype: str, target: Target) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.float_type, self.torch_dtype = _FLOATS[dtype], _TORCH[dtype]
        self.contrib = target.contrib
        self.rows_first = not target.plugins  # TensorRT wants DequantizeLinear right behind a quantized constant
        self.fills: dict[str, Fill] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.graph = model.graph
        for index, node in enumerate(list(model.graph)):
            if node.op_type == "MatMul":
                self._product(node, index)
            elif node.op_type == "Gather":
                self._lookup(node, index)
        ir.passes.common.RemoveUnusedNodesPass()(model)
        for name in [EMBEDDING, HEAD, *self.model.linears]:
            value = model.graph.initializers.get(name)
            if value is not None and not value.uses():
                del model.graph.initializers[name]
        for name, tensor in self.model.floats.items():
            dtype = _TORCH_OF[model.graph.initializers[name].dtype]  # type: ignore[index]
            self.fills[name] = functools.partial(_raw_as, tensor, dtype)
        model.opset_imports[""] = OPSET
        for function in model.functions.values():
            function.graph.opset_imports[""] = OPSET
        return ir.passes.PassResult(model, modified=True)

    def _product(self, node: ir.Node, index: int) -> None:
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        weight = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        if weight is None or weight.name is None or not weight.is_initializer():
            return
        name = HEAD if weight.name == EMBEDDING else weight.name
        linear = self.model.linears.get(name)
        if linear is None:
            return
        op = Builder(f"quantized_{index}/")
        x = node.inputs[0]
        assert x is not None
        x = self._prepare(op, x, linear, name.removesuffix(".weight"))
        stored = self._stored(name, linear)
        if linear.input is not None:
            x = self._quantize_input(op, x, linear)
        # ONNX Runtime fuses int8 with int8 to one integer product; everything else goes by blocks there.
        by_blocks = linear.weight.kind == "int4" or (linear.weight.kind == "int8" and linear.input is None)
        if self.contrib and by_blocks:
            y = self._multiply_blocks(op, x, linear.weight, stored)
        else:
            y = op.MatMul(x, op.Transpose(self._dequantize(op, linear.weight, stored), perm=[1, 0]))
        replace_node(node, op.nodes, [y])

    def _stored(self, name: str, linear: Linear) -> str:
        """The parameter whose tensors hold the matrix."""
        return EMBEDDING if name == HEAD and self.model.embedding is linear.weight else name

    def _prepare(self, op: Builder, x: ir.Value, linear: Linear, layer: str) -> ir.Value:
        """Smoothing and rotation."""
        if linear.smooth is not None:
            smooth, dtype = linear.smooth, _TORCH[self.dtype]
            x = op.Mul(x, self._float(f"{layer}.smooth", tuple(smooth.shape), lambda: smooth.to(dtype)))
        if linear.rotation:
            from mamba_export.calibration.rotation import hadamard

            size, columns, dtype = linear.rotation, linear.weight.columns, _TORCH[self.dtype]
            h = self._float(f"hadamard.{size}", (size, size), lambda: hadamard(size).to(dtype))
            x = op.MatMul(op.Reshape(x, op.i64([0, 0, columns // size, size])), h)
            x = op.Reshape(x, op.i64([0, 0, columns]))
        return x

    def _quantize_input(self, op: Builder, x: ir.Value, linear: Linear) -> ir.Value:
        assert linear.input is not None
        stored = _STORED[linear.input.kind]
        scale = self._scalar(op, linear.input.scale)
        if linear.weight.kind == "int4" and not self.rows_first:
            # TensorRT has no product of int8 with int4: the same rounding in arithmetic that it does not match.
            low, high = self._scalar(op, -128.0), self._scalar(op, 127.0)
            return op.Mul(op.Clip(op.Round(op.Div(x, scale)), low, high), scale)
        zero = op.Constant(value=ir.AttrTensor("value", _zero(stored)))
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)

    def _scalar(self, op: Builder, value: float) -> ir.Value:
        tensor = torch.tensor(value, dtype=_TORCH[self.dtype])
        raw = (
            ir.Tensor(tensor.view(torch.int16).numpy().view(_FLOATS[self.dtype].numpy()))
            if (self.dtype == "bf16")
            else ir.tensor(tensor.numpy())
        )
        return op.Constant(value=ir.AttrTensor("value", raw))

    def _dequantize(self, op: Builder, matrix: Matrix, name: str) -> ir.Value:
        """The matrix [rows, columns] in the type of activations."""
        if matrix.group >= matrix.columns and matrix.kind != "int4":
            q = self._initializer(f"{name}.q", _STORED[matrix.kind], matrix.values.shape, lambda: _raw(matrix.values))
            scales = self._scales(matrix, name, per_row=True)
            return op.DequantizeLinear(q, scales, *self._int8_zeros(matrix, name, scales), axis=0)
        padded = matrix.groups * matrix.group
        shape = (matrix.values.shape[0], padded)
        q = self._initializer(f"{name}.q", _STORED[matrix.kind], shape, lambda: _pack_signed(matrix))
        scales = self._scales(matrix, name)
        zeros = self._int8_zeros(matrix, name, scales)
        wide = op.DequantizeLinear(q, scales, *zeros, axis=1, block_size=matrix.group)
        if padded == matrix.columns:
            return wide
        return op.Slice(wide, op.i64([0]), op.i64([matrix.columns]), op.i64([1]))

    def _int8_zeros(self, matrix: Matrix, name: str, scales: ir.Value) -> tuple[ir.Value, ...]:
        """Zero points of int8, which are 0, where sessions set session.x64quantprecision (see runtime.ort_products).

        It makes a single one for a matrix that has none, and ONNX Runtime's DequantizeLinear wants one beside each
        scale. It also can't move one tensor twice: each matrix has a view of its own of the same bytes.
        """
        if matrix.kind != "int8" or not self.contrib:
            return ()
        assert scales.shape is not None
        shape = tuple(scales.shape.numpy())
        view = f"zero.{'x'.join(map(str, shape))}/{name.removesuffix('.weight')}"
        fill = functools.partial(torch.zeros, shape, dtype=torch.uint8)
        return (self._initializer(view, ir.DataType.INT8, shape, fill),)

    def _scales(self, matrix: Matrix, name: str, per_row: bool = False) -> ir.Value:
        dtype = _TORCH[self.dtype]
        shape = matrix.scales.shape[:1] if per_row else matrix.scales.shape
        return self._float(f"{name}.scale", tuple(shape), lambda: matrix.scales.to(dtype))

    def _blocks(self, op: Builder, matrix: Matrix, name: str) -> tuple[int, int, ir.Value]:
        """Block size, blocks a row, and the float32 or float16 scales [rows, blocks] of a contrib op."""
        block, blocks = matrix.block, matrix.blocks
        rows = matrix.values.shape[0]
        half = torch.bfloat16 if self.dtype == "bf16" else torch.float16

        def fill() -> Tensor:
            return _by_block(matrix, matrix.scales).to(half)

        stored = ir.DataType.BFLOAT16 if self.dtype == "bf16" else ir.DataType.FLOAT16
        scales = self._initializer(f"{name}.scale", stored, (rows, blocks), lambda: _raw(fill()))
        return block, blocks, op.to(scales, _FLOATS[self.dtype], stored)

    def _multiply_blocks(self, op: Builder, x: ir.Value, matrix: Matrix, name: str) -> ir.Value:
        block, blocks, scales = self._blocks(op, matrix, name)
        rows, bits = matrix.values.shape[0], _BITS[matrix.kind]
        blob = block * bits // 8
        shape = (rows, blocks, blob)
        q = self._initializer(f"{name}.q", ir.DataType.UINT8, shape, lambda: _pack_unsigned(matrix, block * blocks))
        zeros = () if matrix.zeros is None else (self._zeros(matrix, name, blocks),)
        return op.contrib(
            "MatMulNBits",
            *(x, q, scales, *zeros),
            K=matrix.columns,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )[0]

    def _zeros(self, matrix: Matrix, name: str, blocks: int) -> ir.Value:
        """Zero points, two to a byte: uint8 [rows, ceil(blocks / 2)]."""
        rows = matrix.values.shape[0]

        def fill() -> Tensor:
            assert matrix.zeros is not None
            zeros = _by_block(matrix, matrix.zeros).to(torch.int16) + 8
            pairs = torch.nn.functional.pad(zeros, (0, blocks % 2)).to(torch.uint8).reshape(-1, 2)
            return pairs[:, 0] | (pairs[:, 1] << 4)

        return self._initializer(f"{name}.zero", ir.DataType.UINT8, (rows, -(-blocks // 2)), fill)

    def _lookup(self, node: ir.Node, index: int) -> None:
        table, matrix = node.inputs[0], self.model.embedding
        if table is None or table.name != EMBEDDING or matrix is None:
            return
        op = Builder(f"lookup_{index}/")
        ids = node.inputs[1]
        if self.contrib and matrix.kind != "fp8":
            block, blocks, scales = self._blocks(op, matrix, EMBEDDING)
            rows, bits = matrix.values.shape[0], _BITS[matrix.kind]
            padded = block * blocks
            q = self._initializer(
                f"{EMBEDDING}.q/rows",
                ir.DataType.UINT8,
                (rows, padded * bits // 8),
                lambda: _pack_unsigned(matrix, padded),
            )
            y = op.contrib(
                "GatherBlockQuantized",
                *(q, ids, scales),
                gather_axis=0,
                quantize_axis=1,
                block_size=block,
                bits=bits,
            )[0]
            if padded != matrix.columns:
                y = op.Slice(y, op.i64([0]), op.i64([matrix.columns]), op.i64([2]))
        elif self.rows_first and matrix.group >= matrix.columns and matrix.kind != "int4":
            q = self._initializer(
                f"{EMBEDDING}.q", _STORED[matrix.kind], matrix.values.shape, lambda: _raw(matrix.values)
            )
            scales = op.unsqueeze(op.Gather(self._scales(matrix, EMBEDDING, per_row=True), ids, axis=0), 2)
            one = self._scalar(op, 1.0)
            y = op.Mul(op.DequantizeLinear(op.Gather(q, ids, axis=0), one), scales)
        else:
            y = op.Gather(self._dequantize(op, matrix, EMBEDDING), ids, axis=0)
        replace_node(node, op.nodes, [y])

    def _float(self, name: str, shape: tuple[int, ...], fill: Fill) -> ir.Value:
        return self._initializer(name, _FLOATS[self.dtype], shape, lambda: _raw(fill()))

    def _initializer(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], fill: Fill) -> ir.Value:
        if name not in self.graph.initializers:
            self.graph.initializers.add(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)))
            self.fills.setdefault(name.partition("/")[0], fill)
        return self.graph.initializers[name]


def _by_block(matrix: Matrix, groups: Tensor) -> Tensor:
    """What groups have [rows, groups] for the blocks of a contrib op [rows, blocks]."""
    return groups.repeat_interleave(-(-matrix.blocks // matrix.groups), 1)[:, : matrix.blocks]


def _zero(dtype: ir.DataType) -> ir.TensorProtocol:
    if dtype == ir.DataType.INT8:
        return ir.tensor(np.zeros((), np.int8))
    return ir.Tensor(np.zeros((), dtype.numpy()), dtype=dtype)


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _raw_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return _raw(tensor.to(dtype))


def _padded(matrix: Matrix, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix.values, (0, columns - matrix.columns))


def _pack_signed(matrix: Matrix) -> Tensor:
    """ONNX's form: int8 as it is, int4 two to a byte, the first in the low half."""
    values = _padded(matrix, matrix.groups * matrix.group)
    if matrix.kind != "int4":
        return _raw(values)
    nibbles = (values.to(torch.int16) & 15).to(torch.uint8).reshape(-1, 2)
    return nibbles[:, 0] | (nibbles[:, 1] << 4)


def _pack_unsigned(matrix: Matrix, columns: int) -> Tensor:
    """The contrib ops' form: shifted to be unsigned; padding is zero, that is, half of the range."""
    values = _padded(matrix, columns).to(torch.int16)
    if matrix.zeros is not None:
        values = values + _by_block(matrix, matrix.zeros).repeat_interleave(matrix.block, 1)
    if matrix.kind == "int8":
        return _raw((values + 128).to(torch.uint8))
    nibbles = (values + 8).to(torch.uint8).reshape(-1, 2)
    return nibbles[:, 0] | (nibbles[:, 1] << 4)
