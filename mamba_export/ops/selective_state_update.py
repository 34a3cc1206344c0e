"""selective_state_update: one token of the Mamba-1 scan; the step graph's op.

Shapes are those of selective_scan with L = 1: u, delta, z [B, 1, D], A [D, N], B and C [B, 1, G, N],
D and delta_bias [D], state [B, D, N].
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from mamba_export.ops.builder import Builder
from mamba_export.ops.dispatch import Op, on_gpu
from mamba_export.ops.opdef import Attributes, Inputs, OpDef, fake_scan, make_schema, onnx_op
from mamba_export.ops.selective_scan import INPUTS, ScanInputs, linear_attention, selective_scan_reference

SCHEMA = make_schema(
    "MambaSelectiveStateUpdate",
    __doc__,
    inputs=INPUTS,
    outputs={"y": "T", "present_state": "S"},
    attributes={
        "delta_softplus": (1, "1: Δ = softplus(delta + delta_bias), 0: Δ = delta + delta_bias"),
        "has_z": (0, "1: the gate z is the trailing input"),
    },
    extras=["z [B, 1, D] if has_z"],
)


@torch.library.custom_op("mamba_export::selective_state_update", mutates_args=())
def selective_state_update(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    state: Tensor,
    z: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The torch op. Returns y [B, 1, D] and the present state [B, D, N]."""
    return selective_scan_reference(u, delta, A, B, C, D, delta_bias, state, z, delta_softplus=delta_softplus)


def _reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    scan: Op = selective_scan_reference
    return scan(*arguments[:9], None, *arguments[9:])


selective_state_update.register_kernel("cuda")(on_gpu("selective_state_update", _reference))
selective_state_update.register_fake(fake_scan)


def _translate(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    delta_bias: Any,
    state: Any,
    z: Any = None,
    delta_softplus: bool = True,
) -> Any:
    extras = [] if z is None else [z]
    return onnx_op(SCHEMA)(
        *(u, delta, A, B, C, D, delta_bias, state, *extras),
        delta_softplus=int(delta_softplus),
        has_z=len(extras),
    )


def _portable(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    s = ScanInputs(op, inputs, attributes)
    groups, per_group, d_state = s.groups, s.channels // s.groups, s.d_state
    column = op.i64([0, groups, per_group, 1])
    decay = op.Exp(op.Mul(op.Reshape(s.dt, column), op.Reshape(s.A, op.i64([groups, per_group, d_state]))))
    # Both products over the state as matrix products: faster than broadcasting along so short an axis.
    update = op.MatMul(op.Reshape(op.Mul(s.dt, s.u), column), op.Reshape(s.B, op.i64([0, groups, 1, d_state])))
    h = op.Add(op.Mul(op.Reshape(s.state, op.i64([0, groups, per_group, d_state])), decay), update)
    y = op.MatMul(h, op.Reshape(s.C, op.i64([0, groups, d_state, 1])))  # [B, G, D/G, 1]
    y = op.Reshape(y, op.i64([0, 1, s.channels]))
    return [s.finish(y), op.Reshape(h, op.i64([0, s.channels, d_state]))]


def _ort_cpu(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    """Products that read rows as columns: with one group nothing is reshaped but Δ. A step is made of nodes so small
    that their number is what they cost, and a reshaped state is a copied state."""
    s = ScanInputs(op, inputs, attributes)
    if s.groups != 1:
        return _portable(op, inputs, attributes)
    decay = op.Exp(op.Mul(op.Reshape(s.dt, op.i64([0, s.channels, 1])), s.A))
    update = op.contrib("FusedMatMul", op.Mul(s.dt, s.u), s.B, transA=1)[0]
    h = op.Add(op.Mul(s.state, decay), update)
    return [s.finish(op.contrib("FusedMatMul", s.C, h, transB=1)[0]), h]


OP = OpDef(
    SCHEMA,
    torch.ops.mamba_export.selective_state_update.default,
    _translate,
    _portable,
    linear_attention,
    ort_cpu=_ort_cpu,
)
