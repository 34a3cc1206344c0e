"""ssd_scan in Triton, on tensor cores: a program keeps the state of some rows of a head and walks chunk by chunk.

Within a chunk, with S the running sum of Δ·A: y = (C Bᵀ ∘ e^(S_t - S_s) Δ_s) x + e^S_t C h, and the state becomes
e^S_end h + (e^(S_end - S_s) Δ_s x)ᵀ B. Differences of S are summed up from s to t one by one instead of subtracted: a
large step before them costs no precision. Pieces of a sequence as in :mod:`.selective_scan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .common import LOG2E, dense, join, pieces_for, row_length, silu, softplus, width

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ssd_scan"]

CHUNK, WARPS = 64, 4  # tokens at a time
STATE = 64 * 128  # elements of the state that a program keeps, in 16-bit types


@triton.jit
def scan_kernel(
    x, dt, A, B, C, D, dt_bias, start, z, seq_lens, y, final, sums, seqlen, piece, pieces, nheads, headdim, d_state,
    group_heads, dt_min, dt_max,
    x_batch, x_token, dt_batch, dt_token, B_batch, B_token, C_batch, C_token, z_batch, z_token,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, PER_CHANNEL: tl.constexpr, RAGGED: tl.constexpr, REVERSE: tl.constexpr,
    ENDS_ONLY: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, k = tl.program_id(2).to(tl.int64), tl.program_id(1)
    blocks = tl.cdiv(headdim, BLOCK_P)
    head = tl.program_id(0) // blocks
    row, n, i = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, T)
    inside, states = row < headdim, n < d_state
    length = row_length(seq_lens, batch, seqlen, RAGGED)
    channel, group = head * headdim + row, head // group_heads * d_state + n
    x, z, dt = (
        x + batch * x_batch + channel[None, :],
        z + batch * z_batch + channel[None, :],
        dt + batch * dt_batch + head,
    )
    B, C = B + batch * B_batch + group[None, :], C + batch * C_batch + group[None, :]
    y = y + batch * seqlen * nheads * headdim + channel[None, :]
    state_at = (head * headdim + row[:, None]) * d_state + n[None, :]
    both = inside[:, None] & states[None, :]
    size = nheads * headdim * d_state
    a, bias = tl.load(A + head) * LOG2E, tl.load(dt_bias + head)
    h = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    total = 0.0
    if not ENDS_ONLY:
        h += tl.load(start + (batch * pieces + k) * size + state_at, mask=both, other=0.0).to(tl.float32)
        skip = (
            tl.load(D + channel, mask=inside, other=0.0)
            if PER_CHANNEL
            else tl.load(D + head) + tl.zeros((BLOCK_P,), tl.float32)
        )
    end = tl.minimum((k + 1) * piece, length)
    for first in range(k * piece, end, T):
        s = first + i
        valid = s < end
        t = s.to(tl.int64)[:, None]
        if REVERSE:
            t = length - 1 - t
        tokens = valid[:, None] & inside[None, :]
        rows = valid[:, None] & states[None, :]
        step = tl.load(dt + tl.reshape(t, (T,)) * dt_token, mask=valid, other=0.0).to(tl.float32) + bias
        if SOFTPLUS:
            step = softplus(step)
        step = tl.where(valid, tl.minimum(tl.maximum(step, dt_min), dt_max), 0.0)
        log_decay = step * a
        value = tl.load(x + t * x_token, mask=tokens, other=0.0)
        b = tl.load(B + t * B_token, mask=rows, other=0.0)
        from_start = tl.cumsum(log_decay, 0)
        later = tl.where(i[:, None] > i[None, :], log_decay[:, None], 0.0)  # [t, s]: the steps behind s
        to_end = tl.sum(later, 0)
        if not ENDS_ONLY:
            c = tl.load(C + t * C_token, mask=rows, other=0.0)
            between = tl.cumsum(later, 0)
            causal = i[:, None] >= i[None, :]
            scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
            scores = tl.where(causal, scores * tl.exp2(between) * step[None, :], 0.0)
            out = tl.dot(scores.to(value.dtype), value, input_precision=PRECISION)
            carried = tl.dot(c, tl.trans(h.to(c.dtype)), input_precision=PRECISION)
            out += carried * tl.exp2(from_start)[:, None]
            out += skip[None, :] * value.to(tl.float32)
            if GATED:
                out *= silu(tl.load(z + t * z_token, mask=tokens, other=0.0).to(tl.float32))
            tl.store(y + t * (nheads * headdim), out.to(y.dtype.element_ty), mask=tokens)
        weighted = value.to(tl.float32) * (tl.exp2(to_end) * step)[:, None]
        chunk = tl.sum(log_decay, 0)
        h = h * tl.exp2(chunk) + tl.dot(tl.trans(weighted.to(b.dtype)), b, input_precision=PRECISION)
        total += tl.sum(step, 0)
    if ENDS_ONLY:
        tl.store(final + (batch * pieces + k) * size + state_at, h, mask=both)
        tl.store(sums + (batch * pieces + k) * nheads + head, total)
    else:
        if RAGGED:
            for first in range(tl.maximum(k * piece, length), tl.minimum((k + 1) * piece, seqlen), T):
                s = first + i
                padding = (s < tl.minimum((k + 1) * piece, seqlen))[:, None] & inside[None, :]
                zeros = tl.zeros((T, BLOCK_P), y.dtype.element_ty)
                tl.store(y + s.to(tl.int64)[:, None] * (nheads * headdim), zeros, mask=padding)
        if k == pieces - 1:
            tl.store(final + batch * size + state_at, h.to(final.dtype.element_ty), mask=both)


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
    z: Tensor | None = None, seq_lens: Tensor | None = None, dt_softplus: bool = True, dt_min: float = 0.0,
    dt_max: float = float("inf"), reverse: bool = False, *, pieces: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`mamba_export.ops.ssd_scan.ssd_scan_reference`; ``pieces`` 0 lets the device decide."""
    import torch

    batch, seqlen, nheads, headdim = x.shape
    groups, d_state = B.shape[2:]
    x, dt, B, C, z = (dense(v, 2) for v in (x, dt, B, C, z))
    state = state.contiguous()
    y, final = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
    wide = x.dtype == torch.float32
    block_n = width(d_state, 16)
    chunk = CHUNK // 2 if wide and block_n > 128 else CHUNK  # shared memory
    block_p = min(width(headdim, 16), max(16, (STATE // 2 if wide else STATE) // block_n))
    blocks = triton.cdiv(headdim, block_p) * nheads
    pieces = pieces or pieces_for(4 * blocks * batch, seqlen, CHUNK, 64, x.device)
    piece = triton.cdiv(triton.cdiv(seqlen, pieces), chunk) * chunk
    pieces = triton.cdiv(seqlen, piece)
    gate = x if z is None else z

    def launch(start: Tensor, final: Tensor, sums: Tensor, ends_only: bool) -> None:
        scan_kernel[(blocks, pieces, batch)](
            x, dt, A, B, C, D, dt_bias, start, gate, seq_lens, y, final, sums,
            seqlen, piece, pieces, nheads, headdim, d_state, nheads // groups, dt_min, dt_max,
            x.stride(0), x.stride(1), dt.stride(0), dt.stride(1), B.stride(0), B.stride(1),
            C.stride(0), C.stride(1), gate.stride(0), gate.stride(1),
            SOFTPLUS=dt_softplus, GATED=z is not None, PER_CHANNEL=D.dim() == 2, RAGGED=seq_lens is not None,
            REVERSE=reverse, ENDS_ONLY=ends_only, T=chunk, BLOCK_P=block_p, BLOCK_N=block_n,
            PRECISION="tf32x3" if wide else "tf32", num_warps=WARPS, num_stages=2,
        )  # fmt: skip

    start = state
    if pieces > 1:
        ends = torch.empty((batch, pieces, nheads, headdim, d_state), dtype=torch.float32, device=x.device)
        sums = torch.empty((batch, pieces, nheads), dtype=torch.float32, device=x.device)
        launch(state, ends, sums, True)
        start = join(ends, sums, A, state)
    launch(start, final, state, False)
    return y, final
