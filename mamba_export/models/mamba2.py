"""The Mamba-2 mixer (Dao and Gu 2024, figure 6), with the options of mamba_ssm's module."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_export.models.conv import CausalConv1d
from mamba_export.ops.rms_norm import normalize
from mamba_export.ops.ssd_scan import NO_LIMIT, ssd_scan
from mamba_export.ops.ssd_state_update import ssd_state_update
from mamba_export.spec import ModelSpec


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels, gated by SiLU(z) before (the default) or after the norm."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.groups = spec.d_ssm // spec.gated_norm_group_size
        self.eps, self.norm_before_gate = spec.gated_norm_eps, spec.norm_before_gate
        self.weight = nn.Parameter(torch.empty(spec.d_ssm))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y and z [B, L, d_ssm] → [B, L, d_ssm]."""
        wide = torch.promote_types(y.dtype, torch.float32)
        gate = F.silu(z.to(wide))
        x = y.to(wide) if self.norm_before_gate else y.to(wide) * gate
        if self.groups > 1:
            x = normalize(x.unflatten(2, (self.groups, -1)), self.eps).flatten(2)
        else:
            x = normalize(x, self.eps)
        x = x * self.weight.to(wide)
        return (x * gate if self.norm_before_gate else x).to(y.dtype)


class Mamba2Mixer(nn.Module):
    """Parameters keep state-spaces' names, except that ``A = -exp(A_log)`` is stored ready to use.

    A, D and the Δ bias are float32 whatever the dtype of the model.
    """

    def __init__(self, spec: ModelSpec, step: bool) -> None:
        super().__init__()
        self.spec, self.is_step = spec, step
        self.in_proj = nn.Linear(spec.d_model, spec.d_in_proj, bias=spec.proj_bias)
        self.conv1d = CausalConv1d(spec)
        self.dt_bias = nn.Parameter(torch.empty(spec.nheads, dtype=torch.float32))
        self.A = nn.Parameter(torch.empty(spec.nheads, dtype=torch.float32))
        skip = (spec.nheads, spec.headdim) if spec.D_has_hdim else (spec.nheads,)
        self.D = nn.Parameter(torch.empty(*skip, dtype=torch.float32))
        self.norm = GatedRMSNorm(spec) if spec.gated_norm else None
        self.out_proj = nn.Linear(spec.d_inner, spec.d_model, bias=spec.proj_bias)

    def forward(
        self, x: Tensor, conv_state: Tensor, ssm_state: Tensor, seq_lens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, d_model], conv_state [B, conv_dim, K-1], ssm_state [B, H, P, N] → the same three, updated."""
        s = self.spec
        bc_width = s.ngroups * s.d_state
        sizes = [s.d_mlp, s.d_mlp, s.d_ssm, s.conv_dim, s.nheads]
        if s.d_mlp:
            z0, x0, z, xBC, dt = torch.split(self.in_proj(x), sizes, dim=-1)
        else:
            z, xBC, dt = torch.split(self.in_proj(x), sizes[2:], dim=-1)
        xBC, conv_state = self.conv1d(xBC, conv_state, seq_lens)
        u, B, C = torch.split(xBC, [s.d_ssm, bc_width, bc_width], dim=-1)
        u = u.unflatten(2, (s.nheads, s.headdim))
        B, C = (v.unflatten(2, (s.ngroups, s.d_state)) for v in (B, C))
        gate = None if self.norm is not None else z.unflatten(2, (s.nheads, s.headdim))
        low, high = s.dt_limit[0], NO_LIMIT if math.isinf(s.dt_limit[1]) else s.dt_limit[1]
        operands = (u, dt, self.A, B, C, self.D, self.dt_bias, ssm_state, gate)
        if self.is_step:
            y, ssm_state = ssd_state_update(*operands, True, low, high)
        else:
            y, ssm_state = ssd_scan(*operands, seq_lens, True, low, high, False)
        y = y.flatten(2)
        if self.norm is not None:
            y = self.norm(y, z)
        if s.d_mlp:
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        return self.out_proj(y), conv_state, ssm_state
