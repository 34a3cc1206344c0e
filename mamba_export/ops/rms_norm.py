"""rms_norm: the residual add and RMSNorm before every mixer, traced as one op so that targets can fuse it.

Shapes: x [B, L, d], weight [d], residual [B, L, d] (absent before the first block).
``sum = x + residual`` (in the dtype of the residual), ``y = sum / sqrt(mean(sum²) + eps) * weight`` in float32.
No graph keeps this op: every target replaces it.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from mamba_export.ops.builder import Builder
from mamba_export.ops.opdef import Attributes, Inputs, OpDef, make_schema, onnx_op

SCHEMA = make_schema(
    "MambaAddRmsNorm",
    __doc__,
    inputs={"x": "T", "weight": "W"},
    outputs={"y": "T", "sum": "R"},
    attributes={
        "epsilon": (1e-5, "added to the mean of squares"),
        "has_residual": (1, "1: the residual is the trailing input"),
    },
    extras=["residual [B, L, d] if has_residual"],
)


def normalize(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without weight over the last axis, in at least float32; the result keeps that precision."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def add_rms_norm_reference(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The definition. Returns y in the dtype of ``x`` and the sum in the dtype of ``residual`` (of x without one)."""
    total = x.clone() if residual is None else x.to(residual.dtype) + residual
    y = normalize(total, eps)
    return (y * weight.to(y.dtype)).to(x.dtype), total


@torch.library.custom_op("mamba_export::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The torch op; see :func:`add_rms_norm_reference`."""
    return add_rms_norm_reference(x, weight, residual, eps)


@add_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x if residual is None else residual)


def _translate(x: Any, weight: Any, residual: Any = None, eps: float = 1e-5) -> Any:
    extras = [] if residual is None else [residual]
    return onnx_op(SCHEMA)(x, weight, *extras, epsilon=eps, has_residual=len(extras))


def _portable(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    x, weight = inputs[:2]
    narrow, stream, wide = x.dtype, inputs[-1].dtype if attributes["has_residual"] else x.dtype, ir.DataType.FLOAT
    assert narrow is not None and stream is not None
    total = op.Add(op.to(x, stream, narrow), inputs[2]) if attributes["has_residual"] else x
    value = op.to(total, wide, stream)
    # As a power and not as a product: the form in which ONNX Runtime and TensorRT know the norm, and fuse it.
    mean = op.ReduceMean(op.Pow(value, op.f32(2.0)), op.i64([-1]), keepdims=1)
    scaled = op.Div(value, op.Sqrt(op.Add(mean, op.f32(attributes["epsilon"]))))
    y = op.Mul(scaled, op.to(weight, wide, weight.dtype))
    return [op.to(y, narrow, wide), total]


def _ort(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    x, weight = inputs[:2]
    narrow, wide = x.dtype, ir.DataType.FLOAT
    if not attributes["has_residual"] or inputs[2].dtype != wide:
        return _portable(op, inputs, attributes)
    assert narrow is not None
    operands = [op.to(x, wide, narrow), inputs[2], op.to(weight, wide, weight.dtype)]
    y, mean, scale, total = op.contrib(
        "SkipSimplifiedLayerNormalization", *operands, outputs=4, epsilon=attributes["epsilon"]
    )
    mean.name = scale.name = ""  # optional outputs, not computed
    return [op.to(y, narrow, wide), total]


OP = OpDef(SCHEMA, torch.ops.mamba_export.add_rms_norm.default, _translate, _portable, _ort, plugin=False)
