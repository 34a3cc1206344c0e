"""The ops of the model in plain torch, scans in chunks: fast on CPU and GPU alike, and differentiable.

They compute what :mod:`mamba_export.ops` defines, for full rows and forward in time: what calibration needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_export.models import conv, lm, mamba1, mamba2
from mamba_export.ops.rms_norm import add_rms_norm_reference

CHUNK = 64
_CHUNK_1 = 16  # of Mamba-1, whose states take much memory


def selective_scan(
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
    """Mamba-1; shapes as in :mod:`mamba_export.ops.selective_scan`."""
    assert seq_lens is None and not reverse
    dt = delta + delta_bias
    dt = F.softplus(dt) if delta_softplus else dt
    each = A.shape[0] // B.shape[2]
    parts, h = [], state
    for start in range(0, u.shape[1], _CHUNK_1):
        piece = slice(start, start + _CHUNK_1)
        b, c = (x[:, piece].repeat_interleave(each, 2) if B.shape[2] > 1 else x[:, piece] for x in (B, C))
        decay = torch.exp(dt[:, piece, :, None] * A)
        states = (dt[:, piece] * u[:, piece])[..., None] * b  # becomes the state after every token
        h = _Recurrence.apply(decay, states, h)  # type: ignore[no-untyped-call]
        parts.append((h * c).sum(-1))
        h = h[:, -1]
    y = torch.cat(parts, 1) + D * u
    return (y if z is None else y * F.silu(z)), h


class _Recurrence(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + x_t along axis 1; decay and x [B, L, ...], h [B, ...] → all states [B, L, ...]."""

    @staticmethod
    def forward(ctx, decay: Tensor, x: Tensor, h: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        states = torch.empty_like(x)
        before = h
        for t in range(x.shape[1]):
            torch.addcmul(x[:, t], decay[:, t], before, out=states[:, t])
            before = states[:, t]
        ctx.save_for_backward(decay, states, h)
        return states

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        decay, states, h = ctx.saved_tensors
        dx = torch.empty_like(grad)
        dx[:, -1] = grad[:, -1]
        for t in range(grad.shape[1] - 2, -1, -1):
            torch.addcmul(grad[:, t], decay[:, t + 1], dx[:, t + 1], out=dx[:, t])
        ddecay = torch.empty_like(decay)
        torch.mul(dx[:, 1:], states[:, :-1], out=ddecay[:, 1:])
        torch.mul(dx[:, 0], h, out=ddecay[:, 0])
        return ddecay, dx, dx[:, 0] * decay[:, 0]


def ssd_scan(
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
    dt_max: float = float("inf"),
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mamba-2 (section 6 of the paper: products inside chunks, a recurrence between them)."""
    assert seq_lens is None and not reverse
    delta = dt + dt_bias
    delta = (F.softplus(delta) if dt_softplus else delta).clamp(dt_min, dt_max)
    each = x.shape[2] // B.shape[2]
    parts, h = [], state
    for start in range(0, x.shape[1], CHUNK):
        piece = slice(start, start + CHUNK)
        b, c = (v[:, piece].repeat_interleave(each, 2).transpose(1, 2) for v in (B, C))  # [B, H, T, N]
        step = delta[:, piece].transpose(1, 2)  # [B, H, T]
        total = (step * A[:, None]).cumsum(-1)
        value = (delta[:, piece, :, None] * x[:, piece]).transpose(1, 2)  # [B, H, T, P]
        gap = total[..., :, None] - total[..., None, :]
        causal = torch.ones(gap.shape[-2:], dtype=torch.bool, device=x.device).tril()
        weights = (c @ b.mT) * torch.exp(gap.masked_fill(~causal, -torch.inf))
        y = weights @ value + torch.exp(total)[..., None] * (c @ h.mT)
        tail = torch.exp(total[..., -1:] - total)
        h = torch.exp(total[..., -1])[..., None, None] * h + (value * tail[..., None]).mT @ b
        parts.append(y.transpose(1, 2))
    y = torch.cat(parts, 1) + (D if D.dim() == 2 else D[:, None]) * x
    return (y if z is None else y * F.silu(z)), h


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, seq_lens: Tensor | None = None, activation: bool = True
) -> tuple[Tensor, Tensor]:
    """The convolution as a sum of shifted products; shapes as in :mod:`mamba_export.ops.causal_conv1d`."""
    assert seq_lens is None
    kernel, length = weight.shape[1], x.shape[1]
    padded = torch.cat([state.transpose(1, 2), x], 1)
    y = bias + weight[:, 0] * padded[:, :length]
    for j in range(1, kernel):
        y = y + weight[:, j] * padded[:, j : j + length]
    return (F.silu(y) if activation else y), padded[:, length:].transpose(1, 2)


@contextlib.contextmanager
def fast_scans() -> Iterator[None]:
    """Inside, the torch model runs the ops of this file, in float32, and gradients flow through all of it."""
    ours: list[tuple[ModuleType, str, Any]] = [
        (mamba1, "selective_scan", selective_scan),
        (mamba2, "ssd_scan", ssd_scan),
        (conv, "causal_conv1d", causal_conv1d),
        (lm, "add_rms_norm", add_rms_norm_reference),
    ]
    before = [(module, name, vars(module)[name]) for module, name, _ in ours]
    for module, name, function in ours:
        vars(module)[name] = function
    try:
        yield
    finally:
        for module, name, function in before:
            vars(module)[name] = function
