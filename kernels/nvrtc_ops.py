"""What the memory-bound ops launch where NVRTC stands in for the kernel library: the choices of ``cuda/<op>.cu`` again.

Instances are compiled one by one, as shapes ask for them. The two scans are not here: in their place is Triton.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from .library import KernelError, params_struct
from .nvrtc import Kernel

__all__ = ["OPS", "launch"]


class Launch(NamedTuple):
    header: str
    instance: str
    grid: tuple[int, int, int]
    block: tuple[int, int]
    arguments: tuple[Any, ...]


TYPES = ("float", "__half", "__nv_bfloat16")
SIZES = (4, 2, 2)

ConvArgs = params_struct(
    "ConvArgs",
    "ptr x weight bias state_in y state_out seq_lens; i64 x_batch x_token y_batch y_token;"
    "i32 seqlen channels tokens activation wide_weights vector_weights vector_state",
)
CONV_PIECE = 10000  # added to the tokens of the convolution that has them without a loop
SsdPlan = params_struct("SsdPlan", "i32 lanes lanes_log2")


def _aligned(size: int, *addresses: int | None) -> bool:
    return all((address or 0) % size == 0 for address in addresses)


def causal_conv1d(p: Any, sms: int) -> Launch:
    t, size = TYPES[p.dtype], SIZES[p.dtype]
    strides = (p.channels, p.x_batch_stride, p.x_token_stride, p.y_batch_stride, p.y_token_stride)
    v = 4 if _aligned(16, p.x, p.y) and all(n * size % 16 == 0 for n in strides) else 1
    warps, columns = 4, p.batch * -(-p.channels // (32 * v))
    pieces = size == 2 and p.width == v == 4 and 1 < p.seqlen <= 65535 * 6 * warps
    tokens = p.tactic
    if tokens < 0:
        fill = {n: 32 * columns * -(-p.seqlen // n) / sms for n in (16, 12, 8)}
        tokens = 16 if fill[16] >= 4096 and not pieces else 12 if fill[12] >= 256 else 4
        if pieces and fill[12] >= 256 and fill[8] < 6000:
            tokens = CONV_PIECE + (6 if fill[8] < 1400 else 8)
    piece = tokens > CONV_PIECE
    if piece:
        tokens -= CONV_PIECE
        if not pieces or tokens not in (6, 8):
            raise KernelError(f"causal_conv1d: no tactic {p.tactic} for this shape")
    else:
        tokens = max(tokens, p.width - 1, -(-p.seqlen // (65535 * warps)))
    same = {name: getattr(p, name) for name in ("x", "weight", "bias", "state_in", "y", "state_out", "seq_lens")}
    args = ConvArgs(
        **same,
        **{name: getattr(p, f"{name}_stride") for name in ("x_batch", "x_token", "y_batch", "y_token")},
        seqlen=p.seqlen,
        channels=p.channels,
        tokens=tokens,
        activation=p.activation,
        wide_weights=p.weight_dtype != p.dtype,
        vector_weights=_aligned(16, p.weight, p.bias),
        vector_state=_aligned(16, p.state_in, p.state_out),
    )
    header = "causal_conv1d_kernel.cuh"
    if p.seqlen == 1:
        step = f"mamba::conv::step_kernel<{t}, {p.width}, {v}>"
        return Launch(header, step, (-(-p.channels // (64 * v)), p.batch, 1), (64, 1), (args,))
    grid = (-(-p.channels // (32 * v)), -(-p.seqlen // (tokens * warps)), p.batch)
    kernel, last = ("piece_kernel", tokens) if piece else ("conv_kernel", 4)
    return Launch(header, f"mamba::conv::{kernel}<{t}, {p.width}, {v}, {last}>", grid, (32, warps), (args,))


def selective_state_update(p: Any, sms: int) -> Launch:
    t, s, size = TYPES[p.dtype], TYPES[p.state_dtype], SIZES[p.dtype]
    v = 16 // SIZES[p.state_dtype]
    lanes, threads, header = p.d_state // v, 128, "selective_state_update_kernel.cuh"
    covers = p.d_state % v == 0 and lanes in (1, 2, 4, 8, 16, 32) and _aligned(16, p.state_in, p.state_out, p.A)
    columns, rows = -(-p.dim * max(lanes, 1) // threads), p.tactic
    if rows < 0:
        rows = 4 if covers else 0
        while rows > 1 and (p.batch * p.dim * lanes / rows < 680 * sms or p.batch < rows):
            rows //= 2
    if rows == 0 or not covers:
        instance = f"mamba::update::generic_kernel<{t}, {s}>"
        return Launch(header, instance, (-(-p.dim * 8 // threads), p.batch, 1), (threads, 1), (p,))
    grid = (columns, -(-p.batch // rows), 1)
    width = min(v * size, 16)
    vector = _aligned(width, p.B, p.C) and all(n * size % width == 0 for n in (p.B_batch_stride, p.C_batch_stride))
    instance = f"mamba::update::update_kernel<{t}, {s}, {lanes}, {rows}>"
    return Launch(header, instance, grid, (threads, 1), (p, ctypes.c_int(p.dim // p.ngroups), ctypes.c_bool(vector)))


def ssd_state_update(p: Any, sms: int) -> Launch:
    t, s, size = TYPES[p.dtype], TYPES[p.state_dtype], SIZES[p.dtype]
    width, threads, header = 16 // SIZES[p.state_dtype], 128, "ssd_state_update_kernel.cuh"
    vectors, word = p.d_state // width, min(width * size, 16)
    covers = (
        p.d_state % width == 0
        and vectors in (1, 2, 4, 8, 16, 32, 64)
        and p.B_batch_stride % width == 0
        and p.C_batch_stride % width == 0
        and _aligned(word, p.B, p.C)
        and _aligned(16, p.state_in, p.state_out)
    )
    lanes = min(max(vectors, 1), 32)
    blocks = -(-p.batch * p.nheads * p.headdim * lanes // threads)
    rows = 4 if blocks >= 16 * sms and lanes >= 4 else 2 if blocks >= 8 * sms and lanes >= 2 else 1
    tactic = p.tactic if p.tactic >= 0 else {1: 1, 2: 2, 4: 3}[rows] if covers else 0
    if tactic == 0 or not covers:
        grid = (-(-p.headdim // (threads // 32)), p.nheads, p.batch)
        return Launch(header, f"mamba::ssd_update::any_kernel<{t}, {s}>", grid, (threads, 1), (p,))
    rows = 1 << (tactic - 1)
    grid = (-(-p.headdim // (threads // lanes * rows)), p.nheads, p.batch)
    instance = f"mamba::ssd_update::rows_kernel<{t}, {s}, {vectors // lanes}, {rows}>"
    return Launch(header, instance, grid, (threads, 1), (p, SsdPlan(lanes=lanes, lanes_log2=lanes.bit_length() - 1)))


OPS: dict[str, Callable[[Any, int], Launch]] = {
    "causal_conv1d": causal_conv1d,
    "selective_state_update": selective_state_update,
    "ssd_state_update": ssd_state_update,
}


@functools.cache
def _kernel(header: str, instance: str, device: int) -> Kernel:
    import torch

    return Kernel(header, instance, torch.cuda.get_device_capability(device))


@functools.cache
def _multiprocessors(device: int) -> int:
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(op: str, params: ctypes.Structure) -> None:
    """Runs ``op`` on torch's current stream and device."""
    import torch

    if op not in OPS:
        raise KernelError(f"{op} needs the kernel library: NVRTC compiles {', '.join(OPS)}")
    device = torch.cuda.current_device()
    what = OPS[op](params, _multiprocessors(device))
    kernel = _kernel(what.header, what.instance, device)
    kernel(what.grid, what.block, torch.cuda.current_stream().cuda_stream, *what.arguments)
