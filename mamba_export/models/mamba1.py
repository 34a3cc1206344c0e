"""The Mamba-1 mixer (Gu and Dao 2023, figure 3), with Falcon-Mamba's norm on B, C and dt as an option."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_export.models.conv import CausalConv1d
from mamba_export.ops.rms_norm import normalize
from mamba_export.ops.selective_scan import selective_scan
from mamba_export.ops.selective_state_update import selective_state_update
from mamba_export.spec import ModelSpec


class Mamba1Mixer(nn.Module):
    """Parameters keep state-spaces' names, except that ``A = -exp(A_log)`` is stored ready to use.

    A, D and the Δ bias are float32 whatever the dtype of the model.
    """

    def __init__(self, spec: ModelSpec, step: bool) -> None:
        super().__init__()
        self.spec, self.is_step = spec, step
        self.in_proj = nn.Linear(spec.d_model, spec.d_in_proj, bias=spec.proj_bias)
        self.conv1d = CausalConv1d(spec)
        self.x_proj = nn.Linear(spec.d_inner, spec.dt_rank + 2 * spec.ngroups * spec.d_state, bias=False)
        self.dt_proj = nn.Linear(spec.dt_rank, spec.d_inner)
        self.dt_proj.bias = nn.Parameter(torch.empty(spec.d_inner, dtype=torch.float32))
        self.A = nn.Parameter(torch.empty(spec.d_inner, spec.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(spec.d_inner, dtype=torch.float32))
        self.out_proj = nn.Linear(spec.d_inner, spec.d_model, bias=spec.proj_bias)

    def forward(
        self, x: Tensor, conv_state: Tensor, ssm_state: Tensor, seq_lens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, d_model], conv_state [B, d_inner, K-1], ssm_state [B, d_inner, N] → the same three, updated."""
        s = self.spec
        bc_width = s.ngroups * s.d_state
        u, z = torch.split(self.in_proj(x), [s.d_inner, s.d_inner], dim=-1)
        u, conv_state = self.conv1d(u, conv_state, seq_lens)
        dt, B, C = torch.split(self.x_proj(u), [s.dt_rank, bc_width, bc_width], dim=-1)
        if s.bcdt_norm_eps is not None:
            dt, B, C = (normalize(v, s.bcdt_norm_eps).to(x.dtype) for v in (dt, B, C))
        delta = F.linear(dt, self.dt_proj.weight)  # the bias is added in float32, inside the scan
        B, C = (v.unflatten(2, (s.ngroups, s.d_state)) for v in (B, C))
        operands = (u, delta, self.A, B, C, self.D, self.dt_proj.bias, ssm_state, z)
        if self.is_step:
            y, ssm_state = selective_state_update(*operands, True)
        else:
            y, ssm_state = selective_scan(*operands, seq_lens, True, False)
        return self.out_proj(y), conv_state, ssm_state
