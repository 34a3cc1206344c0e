"""Quantized matrices in a fused step: packed rows where the node takes them, float matrices everywhere else.

The rows are those of ``kernels/packed_weights.py``, as int32 words: a type that every runtime has for a constant. In
the node's function body a model-local function makes matrices of them, in integer arithmetic of standard ops; a runtime
without the kernels folds it away with the other constants.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mamba_export.fused_step import PACKABLE, packed_name
from mamba_export.graph.passes import replace_node
from mamba_export.graph.quant import OPSET, QuantizePass
from mamba_export.ops.builder import Builder
from mamba_export.ops.opdef import DOMAIN
from mamba_export.quantized import EMBEDDING, HEAD, Linear, Matrix, QuantizedModel
from mamba_export.targets import Target

if TYPE_CHECKING:
    from mamba_export.kernels.packed_weights import Format

UNPACK = "MambaUnpackRows"
"""How the names of the functions begin: int32 words [rows, words of a row] → the matrix [rows, columns]. The shape
follows, since ONNX Runtime finds no overload of a function from within another."""


def step_format(model: QuantizedModel | None) -> Format | None:
    """The format of a model with the matrices that a fused step takes packed; None where they are all float.

    Raises:
        KernelError: the kernels lack that of a matrix.
    """
    from mamba_export.kernels.packed_weights import common_format, format_of

    linears = {} if model is None else model.linears
    found = [format_of(linear.weight) for name, linear in linears.items() if name.endswith(PACKABLE)]
    return common_format(found) if found else None


def shares_rows(model: QuantizedModel | None) -> bool:
    """Whether the embedding is the head's matrix, and so its packed rows."""
    head = None if model is None else model.linears.get(HEAD)
    return model is not None and head is not None and model.embedding is head.weight


class PackedQuantizePass(QuantizePass):
    """As :class:`QuantizePass`, for a step graph that is to be fused.

    Ensures: matrices of :data:`~mamba_export.fused_step.PACKABLE` names are products of unpacked rows, initializers
    named by :func:`~mamba_export.fused_step.packed_name`, and so is the lookup of an embedding that is the head's
    matrix; other quantized matrices are float initializers under their own names, with the values that the integers
    stand for.
    """

    def __init__(self, model: QuantizedModel, dtype: str, target: Target) -> None:
        super().__init__(model, dtype, target)
        self.form = step_format(model)
        self.unpacked: dict[str, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.functions, self.unpacked = model.functions, {}
        return super().call(model)

    def _stored(self, name: str, linear: Linear) -> str:
        return name

    def _dequantize(self, op: Builder, matrix: Matrix, name: str) -> ir.Value:
        if not name.endswith(PACKABLE):
            self.fills[name] = functools.partial(self._floats, matrix)
            return self.graph.initializers[name]
        if name not in self.unpacked:  # a tied matrix has two uses
            self.unpacked[name] = self._unpack(op, matrix, name)
        return self.unpacked[name]

    def _unpack(self, op: Builder, matrix: Matrix, name: str) -> ir.Value:
        from mamba_export.kernels.packed_weights import format_of, pack, row_bytes, told_apart, within

        form, rows, columns = self.form, len(matrix.values), matrix.columns
        assert form is not None
        own = within(form, format_of(matrix).bits)
        assert own == form or told_apart(form, columns), f"rows of {columns} int8 are as long as those of int4"
        words = row_bytes(own, columns) // 4

        def fill() -> Tensor:
            packed: Tensor = pack(matrix, self.torch_dtype, form=form)
            return packed.reshape(-1)

        packed = self._initializer(packed_name(name), ir.DataType.INT32, (rows, words), fill)
        (y,) = op.node(self._function(own, rows, words, columns), [packed], 1, DOMAIN, {})
        y.type, y.shape = ir.TensorType(self.float_type), ir.Shape([rows, columns])
        return y

    def _lookup(self, node: ir.Node, index: int) -> None:
        table, matrix = node.inputs[0], self.model.embedding
        if table is None or table.name != EMBEDDING or matrix is None:
            return
        if not shares_rows(self.model):
            self.fills[EMBEDDING] = functools.partial(self._floats, matrix)
            return
        op = Builder(f"lookup_{index}/")
        replace_node(node, op.nodes, [op.Gather(self._dequantize(op, matrix, HEAD), node.inputs[1], axis=0)])

    def _floats(self, matrix: Matrix) -> Tensor:
        return matrix.dequantize().to(self.torch_dtype).reshape(-1).view(torch.uint8)

    def _function(self, form: Format, rows: int, words: int, columns: int) -> str:
        """The function for such matrices, made when it is first needed."""
        name = f"{UNPACK}_{rows}x{columns}_int{form.bits}"
        key = (DOMAIN, name, "")
        if key not in self.functions:
            given = ir.Value(name="in_0", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([rows, words]))
            op = Builder(f"{name}/")
            result = unpack_rows(op, given, form, columns, self.float_type)
            graph = ir.Graph([given], [result], nodes=op.nodes, opset_imports={"": OPSET}, name=name)
            self.functions[key] = ir.Function(DOMAIN, name, "", graph=graph, attributes=[])
        return name


def unpack_rows(op: Builder, words: ir.Value, form: Format, columns: int, dtype: ir.DataType) -> ir.Value:
    """``kernels.packed_weights.unpack`` as a graph, for formats without zero points.

    Args:
        op: gets the nodes.
        words: int32 [rows, words of a row], little-endian.
        form: how the rows are packed.
        columns: values of a row.
        dtype: of the scales in the rows and of the result, float16 or bfloat16.

    Returns:
        ``dtype`` [rows, columns]: the integers times their scales in float32, rounded once, as DequantizeLinear does.
    """
    from mamba_export.kernels.packed_weights import ORDER

    assert not form.zeros
    bits, integers, groups, subs = form.bits, columns * form.bits // 32, form.groups(columns), 16 // form.bits
    q = _digits(op, _columns(op, words, 0, integers), 1 << bits)
    half = _i32(op, 1 << (bits - 1))
    if bits == 8:
        q = op.Mod(op.Add(q, half), _i32(op, 256))
    q = op.Cast(op.Sub(q, half), to=int(ir.DataType.FLOAT))
    inverse = sorted(range(8), key=lambda place: ORDER[bits][place])
    q = op.Gather(op.Reshape(q, op.i64([-1, columns // (32 * subs), 4, subs, 8])), op.i64(inverse), axis=4)
    q = op.Reshape(op.Transpose(q, perm=[0, 1, 3, 2, 4]), op.i64([-1, groups, columns // groups]))
    halves = _digits(op, _columns(op, words, integers, integers + (groups + 1) // 2), 1 << 16)
    halves = _columns(op, op.Reshape(halves, op.i64([-1, (groups + 1) // 2 * 2])), 0, groups)
    values = op.Mul(q, op.unsqueeze(_positive_floats(op, halves, dtype), 2))
    result = op.Reshape(op.Cast(values, to=int(dtype)), op.i64([-1, columns]))
    assert words.shape is not None
    result.type, result.shape = ir.TensorType(dtype), ir.Shape([words.shape[0], columns])
    return result


def _columns(op: Builder, x: ir.Value, first: int, past: int) -> ir.Value:
    return op.Slice(x, op.i64([first]), op.i64([past]), op.i64([1]))


def _i32(op: Builder, value: int) -> ir.Value:
    return op.constant(np.array(value, np.int32))


def _digits(op: Builder, words: ir.Value, base: int) -> ir.Value:
    """int32 [rows, n] → the digits of the words, taken as unsigned, from the lowest on: int32 [rows, n, digits]."""
    count = 32 // (base.bit_length() - 1)
    powers = op.constant(np.array([[[base**i for i in range(count)]]], np.int32))
    wide = op.unsqueeze(words, 2)
    whole = op.Div(op.Sub(wide, op.Mod(wide, powers)), powers)  # exact, so that it does not matter how Div rounds
    return op.Mod(whole, _i32(op, base))


def _positive_floats(op: Builder, halves: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The bits of finite positive 16-bit floats, int32, as float32."""
    mantissa, bias = {ir.DataType.FLOAT16: (10, 15), ir.DataType.BFLOAT16: (7, 127)}[dtype]
    one = 1 << mantissa
    exponent = op.Div(halves, _i32(op, one))
    hidden = op.Mul(op.Min(exponent, _i32(op, 1)), _i32(op, one))  # subnormal numbers have none
    fraction = op.Cast(op.Add(op.Mod(halves, _i32(op, one)), hidden), to=int(ir.DataType.FLOAT))
    powers = np.ldexp(np.float32(1), np.maximum(np.arange(1 << (15 - mantissa)), 1) - bias - mantissa)
    return op.Mul(op.Gather(op.constant(powers.astype(np.float32)), exponent, axis=0), fraction)
