"""ssd_state_update: one token of the Mamba-2 scan; the step graph's op.

Shapes are those of ssd_scan with L = 1: x, z [B, 1, H, P], dt [B, 1, H], A [H], B and C [B, 1, G, N],
D [H] or [H, P], dt_bias [H], state [B, H, P, N].
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from mamba_export.ops.builder import Builder
from mamba_export.ops.dispatch import Op, on_gpu
from mamba_export.ops.opdef import Attributes, Inputs, OpDef, fake_scan, make_schema, onnx_op
from mamba_export.ops.ssd_scan import (
    INPUTS,
    NO_LIMIT,
    SHARED_ATTRIBUTES,
    SsdInputs,
    ssd_ort,
    ssd_scan_reference,
    update_state,
)

SCHEMA = make_schema(
    "MambaSsdStateUpdate",
    __doc__,
    inputs=INPUTS,
    outputs={"y": "T", "present_state": "S"},
    attributes=SHARED_ATTRIBUTES,
    extras=["z [B, 1, H, P] if has_z"],
)


@torch.library.custom_op("mamba_export::ssd_state_update", mutates_args=())
def ssd_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    z: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """The torch op. Returns y [B, 1, H, P] and the present state [B, H, P, N]."""
    return ssd_scan_reference(x, dt, A, B, C, D, dt_bias, state, z, None, dt_softplus, dt_min, dt_max)


def _reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    scan: Op = ssd_scan_reference
    return scan(*arguments[:9], None, *arguments[9:])


ssd_state_update.register_kernel("cuda")(on_gpu("ssd_state_update", _reference))
ssd_state_update.register_fake(fake_scan)


def _translate(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    dt_bias: Any,
    state: Any,
    z: Any = None,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float = NO_LIMIT,
) -> Any:
    extras = [] if z is None else [z]
    return onnx_op(SCHEMA)(
        *(x, dt, A, B, C, D, dt_bias, state, *extras),
        dt_softplus=int(dt_softplus),
        dt_min=float(dt_min),
        dt_max=float(dt_max),
        has_z=len(extras),
    )


def _portable(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    s = SsdInputs(op, inputs, attributes)

    def token(x: ir.Value) -> ir.Value:
        """Drop the time axis of length 1."""
        return op.Squeeze(x, op.i64([1]))

    new, y = update_state(op, s, s.state, token(s.dt), token(s.dtx()), token(s.B), token(s.C))
    return [s.finish(op.unsqueeze(y, 1)), new]


OP = OpDef(SCHEMA, torch.ops.mamba_export.ssd_state_update.default, _translate, _portable, ssd_ort)
