"""selective_state_update in Triton: one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .common import LOG2E, dense, silu, softplus, width

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["selective_state_update"]


@triton.jit
def update_kernel(
    u, delta, A, B, C, D, delta_bias, state, z, y, present, dim, group_dim, d_state,
    u_batch, delta_batch, B_batch, C_batch, z_batch,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside, states = d < dim, n < d_state
    both = inside[:, None] & states[None, :]
    at = (batch * dim + d[:, None]) * d_state + n[None, :]
    h = tl.load(state + at, mask=both, other=0.0).to(tl.float32)
    a = tl.load(A + d[:, None] * d_state + n[None, :], mask=both, other=0.0)
    x = tl.load(u + batch * u_batch + d, mask=inside, other=0.0).to(tl.float32)
    dt = tl.load(delta + batch * delta_batch + d, mask=inside, other=0.0).to(tl.float32)
    dt += tl.load(delta_bias + d, mask=inside, other=0.0)
    if SOFTPLUS:
        dt = softplus(dt)
    row = (d // group_dim)[:, None] * d_state + n[None, :]
    b = tl.load(B + batch * B_batch + row, mask=both, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_batch + row, mask=both, other=0.0).to(tl.float32)
    h = tl.exp2(dt[:, None] * (a * LOG2E)) * h + (dt * x)[:, None] * b
    tl.store(present + at, h.to(present.dtype.element_ty), mask=both)
    out = tl.sum(h * c, axis=1) + tl.load(D + d, mask=inside, other=0.0) * x
    if GATED:
        out *= silu(tl.load(z + batch * z_batch + d, mask=inside, other=0.0).to(tl.float32))
    tl.store(y + batch * dim + d, out.to(y.dtype.element_ty), mask=inside)


def selective_state_update(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, state: Tensor,
    z: Tensor | None = None, delta_softplus: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`mamba_export.ops.selective_state_update.selective_state_update`."""
    import torch

    batch, _, dim = u.shape
    groups, d_state = B.shape[2:]
    u, delta, B, C, z = (dense(v, 1) for v in (u, delta, B, C, z))
    state = state.contiguous()
    y, present = torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(state)
    block_n = width(d_state)
    block_d = max(1, min(width(dim), 512 // block_n if batch * dim < 65536 else 2048 // block_n))
    update_kernel[(triton.cdiv(dim, block_d), batch)](
        u, delta, A, B, C, D, delta_bias, state, z, y, present, dim, dim // groups, d_state,
        u.stride(0), delta.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
        SOFTPLUS=delta_softplus, GATED=z is not None, BLOCK_D=block_d, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y, present
