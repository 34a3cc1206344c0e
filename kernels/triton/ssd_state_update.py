"""ssd_state_update in Triton: one token of Mamba-2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .common import LOG2E, dense, silu, softplus, width

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ssd_state_update"]


@triton.jit
def update_kernel(
    x, dt, A, B, C, D, dt_bias, state, z, y, present, nheads, headdim, d_state, group_heads, dt_min, dt_max,
    x_batch, dt_batch, B_batch, C_batch, z_batch,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row, n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside, states = row < headdim, n < d_state
    both = inside[:, None] & states[None, :]
    channel = head * headdim + row
    at = ((batch * nheads + head) * headdim + row[:, None]) * d_state + n[None, :]
    h = tl.load(state + at, mask=both, other=0.0).to(tl.float32)
    value = tl.load(x + batch * x_batch + channel, mask=inside, other=0.0).to(tl.float32)
    group = head // group_heads * d_state + n
    b = tl.load(B + batch * B_batch + group, mask=states, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_batch + group, mask=states, other=0.0).to(tl.float32)
    step = tl.load(dt + batch * dt_batch + head).to(tl.float32) + tl.load(dt_bias + head)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.minimum(tl.maximum(step, dt_min), dt_max)
    h = tl.exp2(step * tl.load(A + head) * LOG2E) * h + (step * value)[:, None] * b[None, :]
    tl.store(present + at, h.to(present.dtype.element_ty), mask=both)
    skip = tl.load(D + channel, mask=inside, other=0.0) if PER_CHANNEL else tl.load(D + head)
    out = tl.sum(h * c[None, :], axis=1) + skip * value
    if GATED:
        out *= silu(tl.load(z + batch * z_batch + channel, mask=inside, other=0.0).to(tl.float32))
    tl.store(y + batch * nheads * headdim + channel, out.to(y.dtype.element_ty), mask=inside)


def ssd_state_update(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
    z: Tensor | None = None, dt_softplus: bool = True, dt_min: float = 0.0, dt_max: float = float("inf"),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`mamba_export.ops.ssd_state_update.ssd_state_update`."""
    import torch

    batch, _, nheads, headdim = x.shape
    groups, d_state = B.shape[2:]
    x, dt, B, C, z = (dense(v, 1) for v in (x, dt, B, C, z))
    state = state.contiguous()
    y, present = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
    block_n = width(d_state)
    block_p = max(1, min(width(headdim), 2048 // block_n))
    update_kernel[(triton.cdiv(headdim, block_p), nheads, batch)](
        x, dt, A, B, C, D, dt_bias, state, z, y, present, nheads, headdim, d_state, nheads // groups, dt_min, dt_max,
        x.stride(0), dt.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
        SOFTPLUS=dt_softplus, GATED=z is not None, PER_CHANNEL=D.dim() == 2,
        BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y, present
