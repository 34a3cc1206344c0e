"""selective_scan: the Mamba-1 scan, with fused Δ bias, softplus, skip D and gate z.

Shapes: u, delta, z [B, L, D], A [D, N] (negative), B and C [B, L, G, N], D and delta_bias [D], state [B, D, N].
Per channel d of group g, with Δ = softplus(delta + delta_bias):
``h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t``, ``y_t = (C_t · h_t + D u_t) silu(z_t)`` (Mamba, section 3.2, algorithm 2).
A, Δ, the state and all arithmetic are float32 whatever the activations are. ``reverse`` runs time backwards.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_export.ops.builder import Builder, static_dim
from mamba_export.ops.dispatch import on_gpu
from mamba_export.ops.masks import valid_mask, zero_padding
from mamba_export.ops.opdef import Attributes, Inputs, OpDef, fake_scan, make_schema, onnx_op

INPUTS = {"u": "T", "delta": "T", "A": "S", "B": "T", "C": "T", "D": "S", "delta_bias": "S", "state": "S"}
SCHEMA = make_schema(
    "MambaSelectiveScan",
    __doc__,
    inputs=INPUTS,
    outputs={"y": "T", "present_state": "S"},
    attributes={
        "delta_softplus": (1, "1: Δ = softplus(delta + delta_bias), 0: Δ = delta + delta_bias"),
        "has_z": (0, "1: the gate z is the first trailing input"),
        "reverse": (0, "1: the scan runs from the last valid token to the first"),
        "ragged": (0, "1: seq_lens is the last input"),
    },
    extras=["z [B, L, D] if has_z, else seq_lens if ragged", "seq_lens int32 [B] if ragged"],
)


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    state: Tensor,
    z: Tensor | None = None,
    seq_lens: Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition: a loop over time in float32, or in float64 when ``u`` is.

    Returns:
        y [B, L, D] in the dtype of ``u`` (0 at padded positions) and the final state [B, D, N].
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    u, B, C = (zero_padding(x, seq_lens) for x in (u, B, C))
    dt = delta.to(wide) + delta_bias.to(wide)
    dt = zero_padding(F.softplus(dt, threshold=1000.0) if delta_softplus else dt, seq_lens)
    x, h, A = u.to(wide), state.to(wide), A.to(wide)
    groups = B.shape[2]
    B, C = B.to(wide), C.to(wide)
    h = h.unflatten(1, (groups, -1))  # [B, G, D/G, N]
    A = A.unflatten(0, (groups, -1))
    dtx = (dt * x).unflatten(2, (groups, -1))
    dt = dt.unflatten(2, (groups, -1))
    y = torch.empty_like(dtx)
    for t in range(u.shape[1] - 1, -1, -1) if reverse else range(u.shape[1]):
        h = torch.exp(dt[:, t, :, :, None] * A) * h + dtx[:, t, :, :, None] * B[:, t, :, None, :]
        y[:, t] = (h @ C[:, t, :, :, None]).squeeze(-1)
    out = y.flatten(2) + D.to(wide) * x
    if z is not None:
        out = out * F.silu(zero_padding(z, seq_lens).to(wide))
    if seq_lens is not None:
        out = out * valid_mask(u.shape[1], seq_lens)[:, :, None]
    return out.to(u.dtype), h.flatten(1, 2).contiguous()


@torch.library.custom_op("mamba_export::selective_scan", mutates_args=())
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    state: Tensor,
    z: Tensor | None,
    seq_lens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The torch op; see :func:`selective_scan_reference` for shapes."""
    return selective_scan_reference(u, delta, A, B, C, D, delta_bias, state, z, seq_lens, delta_softplus, reverse)


selective_scan.register_kernel("cuda")(on_gpu("selective_scan", selective_scan_reference))
selective_scan.register_fake(fake_scan)


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
    seq_lens: Any = None,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> Any:
    extras = [x for x in (z, seq_lens) if x is not None]
    return onnx_op(SCHEMA)(
        *(u, delta, A, B, C, D, delta_bias, state, *extras),
        delta_softplus=int(delta_softplus),
        has_z=int(z is not None),
        reverse=int(reverse),
        ragged=int(seq_lens is not None),
    )


class ScanInputs:
    """The inputs of the op in float32 with padding cleared: what every body starts from."""

    def __init__(self, op: Builder, inputs: Inputs, attributes: Attributes) -> None:
        u, delta, self.A, b, c, self.D, delta_bias, self.state = inputs[:8]
        self.op, self.dtype, wide = op, u.dtype, ir.DataType.FLOAT
        assert self.dtype is not None
        self.z = op.to(inputs[8], wide, self.dtype) if attributes["has_z"] else None
        self.mask = op.unsqueeze(op.valid_mask(u, inputs[-1]), 2) if attributes.get("ragged") else None
        self.channels, self.d_state = static_dim(self.A, 0), static_dim(self.A, 1)
        self.groups = static_dim(b, 2)
        flat = op.i64([0, 0, self.groups * self.d_state])
        self.u = self._clean(op.to(u, wide, self.dtype))
        self.B = self._clean(op.Reshape(op.to(b, wide, self.dtype), flat))
        self.C = self._clean(op.Reshape(op.to(c, wide, self.dtype), flat))
        dt = op.Add(op.to(delta, wide, self.dtype), delta_bias)
        self.dt = self._clean(op.Softplus(dt) if attributes["delta_softplus"] else dt)

    def _clean(self, x: ir.Value) -> ir.Value:
        return x if self.mask is None else self.op.Where(self.mask, x, self.op.f32(0.0))

    def finish(self, y: ir.Value) -> ir.Value:
        """Skip connection, gate, padding and cast: from C·h [B, L, D] to the op's output."""
        op = self.op
        y = op.Add(y, op.Mul(self.u, self.D))
        if self.z is not None:
            y = op.Mul(y, op.silu(self.z))
        return op.to(self._clean(y), self.dtype, ir.DataType.FLOAT)  # type: ignore[arg-type]


def _portable(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    """ONNX's Scan over time with the state as [B, G, N, D/G].

    Channels last makes every operation of a step run along contiguous channels: the outer product of Δ and A and the
    sum over the state cost a fifth of what they cost with the state innermost. Nothing is as large as L times the
    state.
    """
    s = ScanInputs(op, inputs, attributes)
    groups, d_state = s.groups, s.d_state
    per_group = s.channels // groups
    along = op.i64([0, 0, groups, 1, per_group])
    operands = [
        op.Reshape(s.dt, along),
        op.Reshape(op.Mul(s.dt, s.u), along),
        op.Reshape(s.B, op.i64([0, 0, groups, d_state, 1])),
        op.Reshape(s.C, op.i64([0, 0, groups, 1, d_state])),
    ]
    a = op.Transpose(op.Reshape(s.A, op.i64([groups, per_group, d_state])), perm=[0, 2, 1])
    h = op.Transpose(op.Reshape(s.state, op.i64([0, groups, per_group, d_state])), perm=[0, 1, 3, 2])
    backwards = int(attributes["reverse"])
    h, y = op.node(
        "Scan",
        [h, *operands],
        2,
        "",
        {
            "body": _time_step(op.prefix, a),
            "num_scan_inputs": 4,
            "scan_input_axes": [1, 1, 1, 1],
            "scan_output_axes": [1],
            "scan_input_directions": [backwards] * 4,
            "scan_output_directions": [backwards],
        },
    )
    present = op.Reshape(op.Transpose(h, perm=[0, 1, 3, 2]), op.i64([0, s.channels, d_state]))
    return [s.finish(op.Reshape(y, op.i64([0, 0, s.channels]))), present]


def _time_step(prefix: str, a: ir.Value) -> ir.Graph:
    """The body of the Scan: h [B, G, N, D/G], dt and dt·u [B, G, 1, D/G], B [B, G, N, 1], C [B, G, 1, N] → h, y."""
    names = ["h", "dt_t", "dtu_t", "B_t", "C_t"]
    h, dt, dtu, b, c = (ir.Value(name=f"{prefix}{name}", type=ir.TensorType(ir.DataType.FLOAT)) for name in names)
    op = Builder(f"{prefix}step_")
    new = op.Add(op.Mul(h, op.Exp(op.Mul(dt, a))), op.Mul(b, dtu))
    return ir.Graph([h, dt, dtu, b, c], [new, op.MatMul(c, new)], nodes=op.nodes, name=f"{prefix}scan_step")


def linear_attention(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    """com.microsoft LinearAttention with the gated rule: q = C, k = B, one head a channel and d_v = 1.

    Serves selective_scan and selective_state_update.

    It has a kernel for CUDA, where a Scan would launch several a token. On a CPU it takes five times as long as the
    Scan, and it needs the decay Δ⊗A [B, L, D·N] in memory.
    """
    s = ScanInputs(op, inputs, attributes)
    decay = op.Reshape(op.Mul(op.unsqueeze(s.dt, 3), s.A), op.i64([0, 0, s.channels * s.d_state]))
    operands = [s.C, s.B, op.Mul(s.dt, s.u), decay]
    reverse = attributes.get("reverse", 0)
    q, k, value, decay = (op.flip(x, 1) for x in operands) if reverse else operands
    y, present = op.contrib(
        "LinearAttention",
        *(q, k, value, op.unsqueeze(s.state, 3), decay),
        outputs=2,
        q_num_heads=s.groups,
        kv_num_heads=s.channels,
        update_rule="gated",
        scale=1.0,
    )
    return [s.finish(op.flip(y, 1) if reverse else y), op.Squeeze(present, op.i64([3]))]


OP = OpDef(
    SCHEMA, torch.ops.mamba_export.selective_scan.default, _translate, _portable, linear_attention, ort_cpu=_portable
)
