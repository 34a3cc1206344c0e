"""selective_scan in Triton: a program keeps the state of a few channels in registers and walks along time.

Where batch and channels are too few to fill the device, a sequence is cut into pieces: a first pass finds what each
piece adds to the state, :func:`~.common.join` the states between them, and the full pass starts every piece from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .common import LOG2E, dense, join, pieces_for, row_length, silu, softplus, width

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["selective_scan"]

CHANNELS = 32  # of a program


@triton.jit
def step_size(delta, at, inside, bias, SOFTPLUS: tl.constexpr):
    dt = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    return dt


@triton.jit
def scan_kernel(
    u, delta, A, B, C, D, delta_bias, start, z, seq_lens, y, final, sums,
    seqlen, piece, pieces, dim, group_dim, d_state,
    u_batch, u_token, delta_batch, delta_token, B_batch, B_token, C_batch, C_token, z_batch, z_token,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, RAGGED: tl.constexpr, REVERSE: tl.constexpr, ENDS_ONLY: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Piece ``program_id(1)`` of the row; with ENDS_ONLY its end from a zero state, and its sum of Δ, nothing else."""
    batch, k = tl.program_id(2).to(tl.int64), tl.program_id(1)
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside, states = d < dim, n < d_state
    both = inside[:, None] & states[None, :]
    length = row_length(seq_lens, batch, seqlen, RAGGED)
    state_at = d[:, None] * d_state + n[None, :]
    a = tl.load(A + state_at, mask=both, other=0.0) * LOG2E
    bias = tl.load(delta_bias + d, mask=inside, other=0.0)
    group = (d // group_dim)[:, None] * d_state + n[None, :]
    u, delta, z = u + batch * u_batch + d, delta + batch * delta_batch + d, z + batch * z_batch + d
    B, C = B + batch * B_batch + group, C + batch * C_batch + group
    y = y + batch * seqlen * dim + d
    h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if not ENDS_ONLY:
        h += tl.load(start + (batch * pieces + k) * dim * d_state + state_at, mask=both, other=0.0).to(tl.float32)
        skip = tl.load(D + d, mask=inside, other=0.0)
    end = tl.minimum((k + 1) * piece, length)
    for s in range(k * piece, end):
        t = batch * 0 + s  # 64 bits
        if REVERSE:
            t = length - 1 - t
        dt = step_size(delta, t * delta_token, inside, bias, SOFTPLUS)
        x = tl.load(u + t * u_token, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(B + t * B_token, mask=both, other=0.0).to(tl.float32)
        h = tl.exp2(dt[:, None] * a) * h + (dt * x)[:, None] * b
        if ENDS_ONLY:
            total += dt
        else:
            c = tl.load(C + t * C_token, mask=both, other=0.0).to(tl.float32)
            out = tl.sum(h * c, axis=1) + skip * x
            if GATED:
                out *= silu(tl.load(z + t * z_token, mask=inside, other=0.0).to(tl.float32))
            tl.store(y + t * dim, out.to(y.dtype.element_ty), mask=inside)
    if ENDS_ONLY:
        tl.store(final + (batch * pieces + k) * dim * d_state + state_at, h, mask=both)
        tl.store(sums + (batch * pieces + k) * dim + d, total, mask=inside)
    else:
        if RAGGED:
            for s in range(tl.maximum(k * piece, length), tl.minimum((k + 1) * piece, seqlen)):
                tl.store(y + (batch * 0 + s) * dim, tl.zeros((BLOCK_D,), y.dtype.element_ty), mask=inside)
        if k == pieces - 1:
            tl.store(final + batch * dim * d_state + state_at, h.to(final.dtype.element_ty), mask=both)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, state: Tensor,
    z: Tensor | None = None, seq_lens: Tensor | None = None, delta_softplus: bool = True, reverse: bool = False,
    *, pieces: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`mamba_export.ops.selective_scan.selective_scan_reference`; ``pieces`` 0 lets the device decide."""
    import torch

    batch, seqlen, dim = u.shape
    groups, d_state = B.shape[2:]
    u, delta, B, C, z = (dense(v, 2) for v in (u, delta, B, C, z))
    state = state.contiguous()
    y, final = torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(state)
    block_d, block_n = min(CHANNELS, width(dim)), width(d_state)
    blocks = triton.cdiv(dim, block_d)
    pieces = pieces or pieces_for(blocks * batch, seqlen, 16, 64, u.device)
    piece = triton.cdiv(seqlen, pieces)
    gate = u if z is None else z

    def launch(start: Tensor, y: Tensor, final: Tensor, sums: Tensor, ends_only: bool) -> None:
        scan_kernel[(blocks, pieces, batch)](
            u, delta, A, B, C, D, delta_bias, start, gate, seq_lens, y, final, sums,
            seqlen, piece, pieces, dim, dim // groups, d_state,
            u.stride(0), u.stride(1), delta.stride(0), delta.stride(1), B.stride(0), B.stride(1),
            C.stride(0), C.stride(1), gate.stride(0), gate.stride(1),
            SOFTPLUS=delta_softplus, GATED=z is not None, RAGGED=seq_lens is not None, REVERSE=reverse,
            ENDS_ONLY=ends_only, BLOCK_D=block_d, BLOCK_N=block_n, num_warps=1 if block_n <= 32 else 4,
        )  # fmt: skip

    start = state
    if pieces > 1:
        ends = torch.empty((batch, pieces, dim, d_state), dtype=torch.float32, device=u.device)
        sums = torch.empty((batch, pieces, dim), dtype=torch.float32, device=u.device)
        launch(state, y, ends, sums, True)
        start = join(ends, sums, A, state)
    launch(start, y, final, state, False)
    return y, final
