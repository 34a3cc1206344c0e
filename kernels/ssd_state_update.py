"""ssd_state_update on the CUDA kernels: same arguments and results as the torch op of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .library import Arguments, KernelError, dtype_code, launch, params_struct, tactics

if TYPE_CHECKING:
    import ctypes

    from torch import Tensor

__all__ = ["ssd_state_update", "ssd_state_update_tactics"]

PARAMS = params_struct(
    "SsdStateUpdateParams",
    "i32 dtype state_dtype batch nheads headdim ngroups d_state dt_softplus d_per_channel tactic;"
    "f32 dt_min dt_max; ptr x dt B C z y A D dt_bias state_in state_out;"
    "i64 x_batch_stride dt_batch_stride B_batch_stride C_batch_stride z_batch_stride y_batch_stride",
)


def _params(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, state: Tensor,
    z: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, y: Tensor, final_state: Tensor, tactic: int,
) -> tuple[ctypes.Structure, Arguments]:  # fmt: skip
    batch, seqlen, nheads, headdim = x.shape
    ngroups, d_state = B.shape[2:]
    if seqlen != 1:
        raise KernelError("ssd_state_update: one token at a time; ssd_scan takes longer sequences")
    a = Arguments("ssd_state_update", x)
    for name, tensor, shape in (
        *(("x", x, x.shape), ("z", z, x.shape), ("dt", dt, (batch, 1, nheads))),
        *(("B", B, (batch, 1, ngroups, d_state)), ("C", C, (batch, 1, ngroups, d_state))),
    ):
        a.activation(name, tensor, shape, ("batch",))
    a.constant("A", A, (nheads,))
    a.constant("D", D, (nheads,), (nheads, headdim))
    a.constant("dt_bias", dt_bias, (nheads,))
    a.constant("state_in", state, (batch, nheads, headdim, d_state), dtype=state.dtype)
    a.output("y", y, x.shape, x.dtype, ("batch",))
    a.output("state_out", final_state, state.shape, state.dtype)
    params = PARAMS(
        **a.fields,
        dtype=dtype_code(x.dtype),
        state_dtype=dtype_code(state.dtype),
        batch=batch,
        nheads=nheads,
        headdim=headdim,
        ngroups=ngroups,
        d_state=d_state,
        dt_softplus=dt_softplus,
        d_per_channel=D is not None and D.dim() == 2,
        tactic=tactic,
        dt_min=dt_min,
        dt_max=dt_max,
    )
    return params, a


def ssd_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    z: Tensor | None = None,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float = float("inf"),
    *,
    out: Tensor | None = None,
    final_state: Tensor | None = None,
    tactic: int = -1,
) -> tuple[Tensor, Tensor]:
    """One token: x and z [B, 1, H, P], dt [B, 1, H], B and C [B, 1, G, N], state [B, H, P, N] in float32, float16 or
    bfloat16; A and dt_bias [H], D [H] or [H, P].

    Returns y [B, 1, H, P] and the present state, in ``final_state`` if given, which may be ``state`` (in place).
    """
    import torch

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    final_state = torch.empty_like(state) if final_state is None else final_state
    options = (dt_softplus, dt_min, dt_max, y, final_state, tactic)
    params, alive = _params(x, dt, A, B, C, D, dt_bias, state, z, *options)
    launch("ssd_state_update", params, x)
    del alive
    return y, final_state


def ssd_state_update_tactics(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> list[int]:
    """The tactics that cover these inputs, the selector's choice first."""
    params, alive = _params(x, dt, A, B, C, None, None, state, None, True, 0.0, float("inf"), x, state, -1)
    found = tactics("ssd_state_update", params)
    del alive
    return found
