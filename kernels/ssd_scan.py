"""Mamba-2 prefill (state-space dual form) on the CUDA kernel library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .library import KernelError, dtype_code, launch, params_struct, pointer, tactics

if TYPE_CHECKING:
    import ctypes

    from torch import Tensor

__all__ = ["ssd_scan", "ssd_scan_tactics"]

_Params = params_struct(
    "mamba_ssd_scan_params",
    "i32 dtype batch seqlen nheads headdim ngroups d_state dt_softplus d_per_channel tactic;"
    "f32 dt_min dt_max; ptr x dt B C z y A D dt_bias initial_state final_state seq_lens;"
    "i64 x_batch_stride x_token_stride dt_batch_stride dt_token_stride B_batch_stride B_token_stride"
    " C_batch_stride C_token_stride z_batch_stride z_token_stride y_batch_stride y_token_stride;"
    "ptr workspace; size workspace_size",
)


def _rows_dense(tensor: Tensor, inner: int) -> Tensor:
    """The tensor itself if the dimensions after [batch, seq] are dense, otherwise a dense copy."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[-inner:]), reversed(tensor.stride()[-inner:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _params(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], initial_state: Tensor | None,
    seq_lens: Tensor | None, y: Tensor, final_state: Tensor | None, tactic: int,
) -> tuple[ctypes.Structure, list[Tensor | None]]:  # fmt: skip
    """The params struct, and the tensors that must stay alive while it is used."""
    batch, seqlen, nheads, headdim = x.shape
    ngroups, d_state = B.shape[2:]
    expected = {
        "dt": (dt, (batch, seqlen, nheads)), "B": (B, (batch, seqlen, ngroups, d_state)), "C": (C, B.shape),
        "A": (A, (nheads,)), "z": (z, x.shape), "dt_bias": (dt_bias, (nheads,)), "y": (y, x.shape),
        "initial_state": (initial_state, (batch, nheads, headdim, d_state)), "seq_lens": (seq_lens, (batch,)),
    }  # fmt: skip
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise KernelError(f"ssd_scan: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    for name, tensor in (("dt", dt), ("B", B), ("C", C), ("z", z)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise KernelError(f"ssd_scan: {name} is {tensor.dtype}, but x is {x.dtype}")
    if D is not None and tuple(D.shape) not in ((nheads,), (nheads, headdim)):
        raise KernelError(f"ssd_scan: D has shape {tuple(D.shape)}, expected ({nheads},) or ({nheads}, {headdim})")

    x, B, C = _rows_dense(x, 2), _rows_dense(B, 2), _rows_dense(C, 2)
    dt = _rows_dense(dt, 1)
    z = None if z is None else _rows_dense(z, 2)
    A, D, dt_bias = A.float().contiguous(), _float(D), _float(dt_bias)
    initial_state = _float(initial_state)
    if seq_lens is not None:
        seq_lens = seq_lens.int().contiguous()
    p = _Params()
    p.dtype, p.batch, p.seqlen, p.nheads, p.headdim = dtype_code(x.dtype), batch, seqlen, nheads, headdim
    p.ngroups, p.d_state, p.dt_softplus, p.tactic = ngroups, d_state, int(dt_softplus), tactic
    p.d_per_channel = int(D is not None and D.dim() == 2)
    p.dt_min, p.dt_max = dt_limit
    for name, tensor in (("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z), ("y", y)):
        setattr(p, name, pointer(tensor))
        if tensor is not None:
            setattr(p, f"{name}_batch_stride", tensor.stride(0))
            setattr(p, f"{name}_token_stride", tensor.stride(1))
    p.A, p.D, p.dt_bias = pointer(A), pointer(D), pointer(dt_bias)
    p.initial_state, p.final_state, p.seq_lens = pointer(initial_state), pointer(final_state), pointer(seq_lens)
    return p, [x, dt, A, B, C, D, z, dt_bias, initial_state, seq_lens, y, final_state]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    seq_lens: Tensor | None = None,
    return_final_state: bool = False,
    out: Tensor | None = None,
    tactic: int = -1,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y`` [batch, seq, nheads, headdim], and the final state [batch, nheads, headdim, d_state] if asked for.

    x [batch, seq, nheads, headdim], dt [batch, seq, nheads], B and C [batch, seq, ngroups, d_state] may be slices
    of one projection; A [nheads] is negative. ``seq_lens`` [batch] marks right-padded rows.
    """
    import torch

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    final_state = None
    if return_final_state:
        shape = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
        final_state = torch.empty(shape, dtype=torch.float32, device=x.device)
    params, alive = _params(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, seq_lens, y, final_state, tactic
    )
    launch("ssd_scan", params, like=x)
    del alive
    return y if final_state is None else (y, final_state)


def ssd_scan_tactics(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None = None) -> list[int]:
    """The tactics that cover these inputs, the selector's choice first."""
    args = (x, dt, A, B, C, None, z, None, False, (0.0, float("inf")), None, None, x, None, -1)
    params, alive = _params(*args)
    found = tactics("ssd_scan", params)
    del alive
    return found
