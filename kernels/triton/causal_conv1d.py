"""causal_conv1d in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .common import dense, row_length, silu, width

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["causal_conv1d"]


@triton.jit
def conv_kernel(
    x, weight, bias, state, y, present, seq_lens, seqlen, channels, x_batch, x_token,
    TAPS: tl.constexpr, RAGGED: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch, first = tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK_T
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = first + tl.arange(0, BLOCK_T)
    inside = c < channels
    length = row_length(seq_lens, batch, seqlen, RAGGED)
    rows = x + batch * x_batch + c[None, :]
    old = state + (batch * channels + c) * (TAPS - 1)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(TAPS):
        at = t + (j - (TAPS - 1))
        value = tl.load(
            rows + at.to(tl.int64)[:, None] * x_token,
            mask=((at >= 0) & (at < length))[:, None] & inside[None, :],
            other=0.0,
        )
        if first < TAPS - 1:
            before = tl.load(
                old[None, :] + (TAPS - 1 + at)[:, None], mask=(at < 0)[:, None] & inside[None, :], other=0.0
            )
            value = tl.where((at < 0)[:, None], before, value)
        tap = tl.load(weight + c * TAPS + j, mask=inside, other=0.0).to(tl.float32)
        total += tap[None, :] * value.to(tl.float32)
    if SILU:
        total = silu(total)
    total = tl.where((t < length)[:, None], total, 0.0)
    out = y + (batch * seqlen + t.to(tl.int64)[:, None]) * channels + c[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(t < seqlen)[:, None] & inside[None, :])
    if first == 0:
        for j in tl.static_range(TAPS - 1):
            end = tl.zeros((BLOCK_C,), tl.int32) + length - (TAPS - 1) + j
            kept = tl.load(x + batch * x_batch + end.to(tl.int64) * x_token + c, mask=inside & (end >= 0), other=0.0)
            older = tl.load(old + (TAPS - 1 + end), mask=inside & (end < 0), other=0.0)
            tl.store(present + (batch * channels + c) * (TAPS - 1) + j, tl.where(end < 0, older, kept), mask=inside)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, seq_lens: Tensor | None = None, activation: bool = True
) -> tuple[Tensor, Tensor]:
    """See :func:`mamba_export.ops.causal_conv1d.causal_conv1d_reference`."""
    import torch

    batch, seqlen, channels = x.shape
    x, weight, state = dense(x, 2), weight.contiguous(), state.contiguous()
    y, present = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
    block_t = min(16, width(seqlen))
    block_c = min(256 if seqlen > 1 else 128, width(channels, 16))
    grid = (triton.cdiv(channels, block_c), triton.cdiv(seqlen, block_t), batch)
    conv_kernel[grid](
        x, weight, bias, state, y, present, seq_lens, seqlen, channels, x.stride(0), x.stride(1),
        TAPS=weight.shape[1], RAGGED=seq_lens is not None, SILU=activation, BLOCK_T=block_t, BLOCK_C=block_c,
        num_warps=4 if seqlen > 1 else 1,
    )  # fmt: skip
    return y, present
