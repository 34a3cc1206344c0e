"""The causal convolution as a module, under the parameter names of nn.Conv1d."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamba_export.ops.causal_conv1d import causal_conv1d
from mamba_export.spec import ModelSpec


class CausalConv1d(nn.Module):
    """Depthwise, with SiLU. ``weight`` is [C, K]; a model without a conv bias holds a zero one."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.conv_dim, spec.d_conv))
        self.bias = nn.Parameter(torch.empty(spec.conv_dim))

    def forward(self, x: Tensor, state: Tensor, seq_lens: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, L, C], state [B, C, K-1] → y [B, L, C], present state."""
        y, present = causal_conv1d(x, self.weight, self.bias, state, seq_lens, True)
        return y, present
