"""ssd_scan: the Mamba-2 scan (state space duality), one scalar decay a head.

Shapes: x, z [B, L, H, P], dt [B, L, H], A [H] (negative), B and C [B, L, G, N], D [H] or [H, P], dt_bias [H],
state [B, H, P, N]. Per head h of group g, with Δ = clamp(softplus(dt + dt_bias), dt_min, dt_max):
``S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t ⊗ B_t``, ``y_t = (S_t C_t + D x_t) silu(z_t)`` (Mamba-2, section 2.1 and 6).
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

INPUTS = {"x": "T", "dt": "T", "A": "S", "B": "T", "C": "T", "D": "S", "dt_bias": "S", "state": "S"}
NO_LIMIT = float(torch.finfo(torch.float32).max)
SHARED_ATTRIBUTES: dict[str, tuple[int | float, str]] = {
    "dt_softplus": (1, "1: Δ = softplus(dt + dt_bias), 0: Δ = dt + dt_bias"),
    "dt_min": (0.0, "lower limit of Δ"),
    "dt_max": (NO_LIMIT, "upper limit of Δ; the largest float32 means none"),
    "has_z": (0, "1: the gate z is the first trailing input"),
}
SCHEMA = make_schema(
    "MambaSsdScan",
    __doc__,
    inputs=INPUTS,
    outputs={"y": "T", "present_state": "S"},
    attributes={
        **SHARED_ATTRIBUTES,
        "reverse": (0, "1: the scan runs from the last valid token to the first"),
        "ragged": (0, "1: seq_lens is the last input"),
    },
    extras=["z [B, L, H, P] if has_z, else seq_lens if ragged", "seq_lens int32 [B] if ragged"],
)


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    z: Tensor | None = None,
    seq_lens: Tensor | None = None,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float = NO_LIMIT,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition: a loop over time in float32, or in float64 when ``x`` is.

    Returns:
        y [B, L, H, P] in the dtype of ``x`` (0 at padded positions) and the final state [B, H, P, N].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype, length, heads = x.dtype, x.shape[1], x.shape[2]
    x, B, C = (zero_padding(v, seq_lens).to(wide) for v in (x, B, C))
    delta = dt.to(wide) + dt_bias.to(wide)
    delta = F.softplus(delta, threshold=1000.0) if dt_softplus else delta
    delta = zero_padding(delta.clamp(dt_min, dt_max), seq_lens)
    B, C = (v.repeat_interleave(heads // B.shape[2], dim=2) for v in (B, C))  # [B, L, H, N]
    decay = torch.exp(delta * A.to(wide))[..., None, None]
    dtx = delta[..., None] * x
    h, y = state.to(wide), torch.empty_like(x)
    for t in range(length - 1, -1, -1) if reverse else range(length):
        h = decay[:, t] * h + dtx[:, t, :, :, None] * B[:, t, :, None, :]
        y[:, t] = (h @ C[:, t, :, :, None]).squeeze(-1)
    skip = D.to(wide) if D.dim() == 2 else D.to(wide)[:, None]
    y = y + skip * x
    if z is not None:
        y = y * F.silu(zero_padding(z, seq_lens).to(wide))
    if seq_lens is not None:
        y = y * valid_mask(length, seq_lens)[:, :, None, None]
    return y.to(dtype), h.contiguous()


@torch.library.custom_op("mamba_export::ssd_scan", mutates_args=())
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    z: Tensor | None,
    seq_lens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The torch op; see :func:`ssd_scan_reference` for shapes."""
    return ssd_scan_reference(*(x, dt, A, B, C, D, dt_bias, state, z, seq_lens, dt_softplus, dt_min, dt_max, reverse))


ssd_scan.register_kernel("cuda")(on_gpu("ssd_scan", ssd_scan_reference))
ssd_scan.register_fake(fake_scan)


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
    seq_lens: Any = None,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float = NO_LIMIT,
    reverse: bool = False,
) -> Any:
    extras = [v for v in (z, seq_lens) if v is not None]
    return onnx_op(SCHEMA)(
        *(x, dt, A, B, C, D, dt_bias, state, *extras),
        dt_softplus=int(dt_softplus),
        dt_min=float(dt_min),
        dt_max=float(dt_max),
        has_z=int(z is not None),
        reverse=int(reverse),
        ragged=int(seq_lens is not None),
    )


class SsdInputs:
    """The inputs of the op in float32 with padding cleared, heads folded: x [B, L, H·P], B and C [B, L, G·N]."""

    def __init__(self, op: Builder, inputs: Inputs, attributes: Attributes) -> None:
        x, dt, self.A, b, c, self.D, dt_bias, self.state = inputs[:8]
        self.op, self.dtype, wide = op, x.dtype, ir.DataType.FLOAT
        assert self.dtype is not None
        self.heads, self.headdim = static_dim(x, 2), static_dim(x, 3)
        self.groups, self.d_state = static_dim(b, 2), static_dim(b, 3)
        self.z = op.to(inputs[8], wide, self.dtype) if attributes["has_z"] else None
        self.mask = op.unsqueeze(op.valid_mask(x, inputs[-1]), 2) if attributes.get("ragged") else None
        channels, flat = op.i64([0, 0, self.heads * self.headdim]), op.i64([0, 0, self.groups * self.d_state])
        self.x = self._clean(op.Reshape(op.to(x, wide, self.dtype), channels))
        self.B = self._clean(op.Reshape(op.to(b, wide, self.dtype), flat))
        self.C = self._clean(op.Reshape(op.to(c, wide, self.dtype), flat))
        delta = op.Add(op.to(dt, wide, self.dtype), dt_bias)
        delta = op.Softplus(delta) if attributes["dt_softplus"] else delta
        low, high = attributes["dt_min"], attributes["dt_max"]
        if low > 0.0 or high < NO_LIMIT:
            delta = op.Clip(delta, op.f32(low), op.f32(high))
        self.dt = self._clean(delta)

    def _clean(self, x: ir.Value) -> ir.Value:
        return x if self.mask is None else self.op.Where(self.mask, x, self.op.f32(0.0))

    def per_head(self, x: ir.Value) -> ir.Value:
        """[B, L, H·P] → [B, L, H, P]."""
        return self.op.Reshape(x, self.op.i64([0, 0, self.heads, self.headdim]))

    def dtx(self) -> ir.Value:
        """Δ·x, [B, L, H, P]."""
        return self.op.Mul(self.op.unsqueeze(self.dt, 3), self.per_head(self.x))

    def finish(self, y: ir.Value) -> ir.Value:
        """Skip connection, gate, padding and cast: from S·C [B, L, H, P] to the op's output."""
        op = self.op
        rank = len(self.D.shape) if self.D.shape is not None else 1
        skip = self.D if rank == 2 else op.unsqueeze(self.D, 1)
        y = op.Add(y, op.Mul(self.per_head(self.x), skip))
        if self.z is not None:
            y = op.Mul(y, op.silu(self.z))
        if self.mask is not None:
            y = op.Where(op.unsqueeze(self.mask, 3), y, op.f32(0.0))
        return op.to(y, self.dtype, ir.DataType.FLOAT)  # type: ignore[arg-type]


def spread_groups(op: Builder, x: ir.Value, s: SsdInputs) -> ir.Value:
    """[B, G·N] → [B, H, N]: every head sees the B (or C) of its group."""
    if s.groups == 1:
        return op.Reshape(x, op.i64([0, 1, s.d_state]))
    each = s.heads // s.groups
    spread = op.Expand(op.Reshape(x, op.i64([0, s.groups, 1, s.d_state])), op.i64([1, s.groups, each, s.d_state]))
    return op.Reshape(spread, op.i64([0, s.heads, s.d_state]))


def update_state(
    op: Builder, s: SsdInputs, h: ir.Value, dt: ir.Value, dtx: ir.Value, b: ir.Value, c: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """One token: h [B, H, P, N], dt [B, H], dtx [B, H, P], b and c [B, G·N] → the new h and y [B, H, P]."""
    decay = op.unsqueeze(op.Exp(op.Mul(dt, s.A)), 2, 3)
    update = op.Mul(op.unsqueeze(dtx, 3), op.unsqueeze(spread_groups(op, b, s), 2))
    new = op.Add(op.Mul(h, decay), update)
    y = op.MatMul(new, op.unsqueeze(spread_groups(op, c, s), 3))
    return new, op.Squeeze(y, op.i64([3]))


def _scan_body(s: SsdInputs) -> ir.Graph:
    names = ["S", "dt_t", "dtx_t", "B_t", "C_t"]
    inputs = [ir.Value(name=f"{s.op.prefix}{n}", type=ir.TensorType(ir.DataType.FLOAT)) for n in names]
    op = Builder(f"{s.op.prefix}step_")
    outputs = update_state(op, s, *inputs)
    return ir.Graph(inputs, outputs, nodes=op.nodes, name=f"{s.op.prefix}scan_step")


def _portable(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    s = SsdInputs(op, inputs, attributes)
    backwards = int(attributes["reverse"])
    present, y = op.node(
        "Scan",
        [s.state, s.dt, s.dtx(), s.B, s.C],
        2,
        "",
        {
            "body": _scan_body(s),
            "num_scan_inputs": 4,
            "scan_input_axes": [1, 1, 1, 1],
            "scan_output_axes": [1],
            "scan_input_directions": [backwards] * 4,
            "scan_output_directions": [backwards],
        },
    )
    return [s.finish(y), present]


def ssd_ort(op: Builder, inputs: Inputs, attributes: Attributes) -> list[ir.Value]:
    """LinearAttention with the gated rule: q = C, k = B, v = Δx, log decay = ΔA; its state is [B, H, N, P].

    Serves ssd_scan and ssd_state_update. The graph's state inputs take that layout too (see the state table).
    """
    s = SsdInputs(op, inputs, attributes)
    reverse = attributes.get("reverse", 0)
    value = op.Reshape(s.dtx(), op.i64([0, 0, s.heads * s.headdim]))
    operands = [s.C, s.B, value, op.Mul(s.dt, s.A)]
    q, k, v, decay = (op.flip(x, 1) for x in operands) if reverse else operands
    y, present = op.contrib(
        "LinearAttention",
        *(q, k, v, s.state, decay),
        outputs=2,
        q_num_heads=s.groups,
        kv_num_heads=s.heads,
        update_rule="gated",
        scale=1.0,
    )
    return [s.finish(s.per_head(op.flip(y, 1) if reverse else y)), present]


OP = OpDef(SCHEMA, torch.ops.mamba_export.ssd_scan.default, _translate, _portable, ssd_ort)
