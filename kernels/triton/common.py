"""What the Triton kernels share: activations, the pass that joins pieces of a sequence, the choice of pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(e^-|x|), the logarithm by its series where e^-|x| is too small to be added to 1."""
    w = tl.exp2(-tl.abs(x) * LOG2E)
    small = w * (1.0 - w * (0.5 - w * (0.3333333333 - w * (0.25 - w * (0.2 - w * 0.1666666667)))))
    return tl.maximum(x, 0.0) + tl.where(w < 0.06, small, tl.log(1.0 + w))


@triton.jit
def row_length(seq_lens, batch, seqlen, RAGGED: tl.constexpr):
    length = seqlen
    if RAGGED:
        length = tl.minimum(tl.maximum(tl.load(seq_lens + batch), 0), seqlen)
    return length


@triton.jit
def join_kernel(
    local, decay, A, state, starts, pieces, size, per_decay, per_A, BLOCK: tl.constexpr
):  # fmt: skip
    """starts[b, k] = the state before piece k: the end of piece k - 1 decayed over it, plus what it added itself.

    ``size`` values a row share a decay sum for each ``per_decay`` of them, and a value of A for each ``per_A``.
    """
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    h = tl.load(state + batch * size + i, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(A + i // per_A, mask=inside, other=0.0) * LOG2E
    for k in range(pieces):
        at = (batch * pieces + k) * size + i
        tl.store(starts + at, h, mask=inside)
        total = tl.load(decay + (batch * pieces + k) * (size // per_decay) + i // per_decay, mask=inside, other=0.0)
        h = tl.exp2(a * total) * h + tl.load(local + at, mask=inside, other=0.0)


def join(local: Tensor, decay: Tensor, A: Tensor, state: Tensor) -> Tensor:
    """The states before each piece [B, pieces, ...] from the pieces' own ends ``local`` and their sums of Δ."""
    import torch

    starts = torch.empty_like(local)
    batch, pieces = local.shape[:2]
    size = state[0].numel()
    per_decay, per_A = size // decay[0, 0].numel(), size // A.numel()
    grid = (triton.cdiv(size, 256), batch)
    join_kernel[grid](local, decay, A, state, starts, pieces, size, per_decay, per_A, BLOCK=256, num_warps=4)
    return starts


def pieces_for(programs: int, seqlen: int, unit: int, warps: int, device: torch.device) -> int:
    """How many pieces of a sequence make ``programs`` programs a piece come to ``warps`` a multiprocessor."""
    import torch

    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(warps * sms // programs, seqlen // (2 * unit), 64))


def dense(x: Any, outer: int) -> Any:
    """``x`` itself if it is dense behind its first ``outer`` dimensions, otherwise a dense copy."""
    if x is None:
        return None
    expected = 1
    for size, stride in zip(reversed(x.shape[outer:]), reversed(x.stride()[outer:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def width(n: int, least: int = 1) -> int:
    """The power of two that holds ``n``."""
    return max(least, 1 << (n - 1).bit_length())
