"""causal_conv1d: depthwise causal convolution over time with a carried state, fused SiLU.

Shapes: x [B, L, C], weight [C, K], bias [C], state [B, C, K-1] (the inputs before x, oldest first).
``y[b, t, c] = act(bias[c] + sum_j weight[c, j] * padded[b, t + j, c])`` with ``padded = concat(state, x)`` over time.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from mamba_export.ops.builder import Builder, static_dim
from mamba_export.ops.dispatch import on_gpu
from mamba_export.ops.masks import zero_padding
from mamba_export.ops.opdef import Attributes, Inputs, OpDef, make_schema, onnx_op

SCHEMA = make_schema(
    "MambaCausalConv1d",
    __doc__,
    inputs={"x": "T", "weight": "T", "bias": "T", "state": "T"},
    outputs={"y": "T", "present_state": "T"},
    attributes={
        "activation": (1, "0: none, 1: SiLU"),
        "ragged": (0, "1: the trailing input seq_lens is present"),
    },
    extras=["seq_lens int32 [B] if ragged"],
)


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, seq_lens: Tensor | None = None, activation: bool = True
) -> tuple[Tensor, Tensor]:
    """The definition, in the precision of the inputs (at least float32 inside).

    Returns:
        y [B, L, C], 0 at padded positions, and the present state [B, C, K-1]: the last K-1 valid inputs.
    """
    kernel = weight.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    x = zero_padding(x, seq_lens)
    padded = torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=2)  # [B, C, K-1+L]
    windows = padded.unfold(2, kernel, 1).to(wide)  # [B, C, L, K]
    y = (windows * weight.to(wide)[:, None, :]).sum(-1) + bias.to(wide)[:, None]
    y = y * torch.sigmoid(y) if activation else y
    if seq_lens is None:
        present = padded[:, :, padded.shape[2] - (kernel - 1) :].clone()
    else:
        index = seq_lens.long()[:, None] + torch.arange(kernel - 1, device=x.device)
        present = padded.gather(2, index[:, None, :].expand(-1, x.shape[2], -1))
    return zero_padding(y.transpose(1, 2).to(x.dtype), seq_lens).contiguous(), present.contiguous()


@torch.library.custom_op("mamba_export::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, seq_lens: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor]:
    """The torch op; see :func:`causal_conv1d_reference` for shapes."""
    return causal_conv1d_reference(x, weight, bias, state, seq_lens, activation)


causal_conv1d.register_kernel("cuda")(on_gpu("causal_conv1d", causal_conv1d_reference))


@causal_conv1d.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, seq_lens: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(state)


def _translate(x: Any, weight: Any, bias: Any, state: Any, seq_lens: Any = None, activation: bool = True) -> Any:
    extras = [] if seq_lens is None else [seq_lens]
    return onnx_op(SCHEMA)(x, weight, bias, state, *extras, activation=int(activation), ragged=len(extras))


def _present(op: Builder, padded: ir.Value, inputs: Inputs, attributes: Attributes) -> ir.Value:
    """The last K-1 valid columns of ``padded`` [B, C, K-1+L]."""
    columns = static_dim(inputs[1], 1) - 1
    if not attributes["ragged"]:
        return op.Slice(padded, op.i64([-columns]), op.i64([2**62]), op.i64([2]))
    lens = op.Cast(op.unsqueeze(inputs[4], 1), to=int(ir.DataType.INT64))
    index = op.unsqueeze(op.Add(lens, op.i64(list(range(columns)))), 1)  # [B, 1, K-1]
    shape = op.Shape(inputs[3])
    return op.GatherElements(padded, op.Expand(index, shape), axis=2)


def _mask(op: Builder, x: ir.Value, like: ir.Value, seq_lens: ir.Value) -> ir.Value:
    """``x`` with padded positions set to 0; ``like`` is any [B, L, ...] value with the same positions."""
    mask = op.unsqueeze(op.valid_mask(like, seq_lens), 2)
    return op.Where(mask, x, op.CastLike(op.f32(0.0), x))


def _portable(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    """Standard ops, in float32 like the definition: opset 20 has no bfloat16 Conv, and float16 rounds every product."""
    x, weight, bias, state = inputs[:4]
    channels, kernel = static_dim(weight, 0), static_dim(weight, 1)
    ragged = attributes["ragged"]
    dtype, wide = x.dtype, ir.DataType.FLOAT
    assert dtype is not None
    clean = _mask(op, x, x, inputs[4]) if ragged else x
    padded = op.Concat(state, op.Transpose(clean, perm=[0, 2, 1]), axis=2)
    columns, weight, bias = (op.to(v, wide, dtype) for v in (padded, weight, bias))
    if x.shape is not None and x.shape[1] == 1 and not ragged:
        product = op.ReduceSum(op.Mul(columns, weight), op.i64([2]), keepdims=0)  # [B, C]
        y = op.unsqueeze(op.Add(product, bias), 1)
        y = op.to(op.silu(y) if attributes["activation"] else y, dtype, wide)
    else:
        kernel_3d = op.Reshape(weight, op.i64([channels, 1, kernel]))
        y = op.Conv(columns, kernel_3d, bias, group=channels)
        y = op.to(op.silu(y) if attributes["activation"] else y, dtype, wide)
        y = op.Transpose(y, perm=[0, 2, 1])
        y = _mask(op, y, y, inputs[4]) if ragged else y
    return [y, _present(op, padded, inputs, attributes)]


def _ort(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    """ONNX Runtime's CausalConvWithState, channels first, float32 only on the CPU."""
    x, weight, bias, state = inputs[:4]
    channels, kernel = static_dim(weight, 0), static_dim(weight, 1)
    ragged = attributes["ragged"]
    dtype, wide = x.dtype, ir.DataType.FLOAT
    assert dtype is not None
    clean = _mask(op, x, x, inputs[4]) if ragged else x
    columns = op.Transpose(op.to(clean, wide, dtype), perm=[0, 2, 1])
    kernel_3d = op.Reshape(op.to(weight, wide, dtype), op.i64([channels, 1, kernel]))
    y, present = op.contrib(
        "CausalConvWithState",
        columns,
        kernel_3d,
        op.to(bias, wide, dtype),
        op.to(state, wide, dtype),
        outputs=2,
        activation="silu" if attributes["activation"] else "none",
    )
    y = op.to(op.Transpose(y, perm=[0, 2, 1]), dtype, wide)
    if not ragged:
        return [y, op.to(present, dtype, wide)]
    padded = op.Concat(state, op.Transpose(clean, perm=[0, 2, 1]), axis=2)
    return [_mask(op, y, y, inputs[4]), _present(op, padded, inputs, attributes)]


OP = OpDef(SCHEMA, torch.ops.mamba_export.causal_conv1d.default, _translate, _portable, _ort)
