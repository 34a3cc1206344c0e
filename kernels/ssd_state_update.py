"""One token of Mamba-2 on the CUDA kernel library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .library import KernelError, dtype_code, launch, params_struct, pointer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ssd_state_update"]

_Params = params_struct(
    "mamba_ssd_state_update_params",
    "i32 dtype state_dtype batch nheads headdim ngroups d_state dt_softplus d_per_channel tactic;"
    "f32 dt_min dt_max; ptr x dt B C z y A D dt_bias state_in state_out;"
    "i64 x_batch_stride dt_batch_stride B_batch_stride C_batch_stride z_batch_stride y_batch_stride",
)


def _row_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor[0].is_contiguous() else tensor.contiguous()


def ssd_state_update(
    state: Tensor,
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
    out_state: Tensor | None = None,
    out: Tensor | None = None,
    tactic: int = -1,
) -> Tensor:
    """``y`` [batch, nheads, headdim] of one token; the state is updated in place, or written to ``out_state``.

    state [batch, nheads, headdim, d_state] in float32, float16 or bfloat16; x [batch, nheads, headdim],
    dt [batch, nheads], B and C [batch, ngroups, d_state]; A, dt_bias [nheads]; D [nheads] or [nheads, headdim].
    """
    import torch

    batch, nheads, headdim, d_state = state.shape
    target = state if out_state is None else out_state
    y = torch.empty((batch, nheads, headdim), dtype=x.dtype, device=x.device) if out is None else out
    expected = {
        "x": (x, (batch, nheads, headdim)), "dt": (dt, (batch, nheads)), "B": (B, (batch, B.shape[1], d_state)),
        "C": (C, B.shape), "A": (A, (nheads,)), "z": (z, x.shape), "dt_bias": (dt_bias, (nheads,)),
        "out_state": (target, state.shape), "out": (y, x.shape),
    }  # fmt: skip
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise KernelError(f"ssd_state_update: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if D is not None and tuple(D.shape) not in ((nheads,), (nheads, headdim)):
        raise KernelError(f"ssd_state_update: D has shape {tuple(D.shape)}, not ({nheads},) or ({nheads}, {headdim})")
    for name, tensor in (("dt", dt), ("B", B), ("C", C), ("z", z)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise KernelError(f"ssd_state_update: {name} is {tensor.dtype}, but x is {x.dtype}")
    if not (state.is_contiguous() and target.is_contiguous() and target.dtype == state.dtype):
        raise KernelError("ssd_state_update: the state must be contiguous, in one dtype")

    if batch == 0:
        return y
    x, dt, B, C = _row_dense(x), _row_dense(dt), _row_dense(B), _row_dense(C)
    z = None if z is None else _row_dense(z)
    A = A.float().contiguous()
    D = None if D is None else D.float().contiguous()
    dt_bias = None if dt_bias is None else dt_bias.float().contiguous()
    p = _Params()
    p.dtype, p.state_dtype = dtype_code(x.dtype), dtype_code(state.dtype)
    p.batch, p.nheads, p.headdim, p.ngroups, p.d_state = batch, nheads, headdim, B.shape[1], d_state
    p.dt_softplus, p.tactic, p.d_per_channel = int(dt_softplus), tactic, int(D is not None and D.dim() == 2)
    p.dt_min, p.dt_max = dt_limit
    for name, tensor in (("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z), ("y", y)):
        setattr(p, name, pointer(tensor))
        if tensor is not None:
            setattr(p, f"{name}_batch_stride", tensor.stride(0))
    p.A, p.D, p.dt_bias = pointer(A), pointer(D), pointer(dt_bias)
    p.state_in, p.state_out = pointer(state), pointer(target)
    launch("ssd_state_update", p, like=x)
    return y
