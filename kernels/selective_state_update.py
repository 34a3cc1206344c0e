"""selective_state_update on the CUDA kernels: same arguments and results as the torch op of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .library import Arguments, KernelError, dtype_code, launch, params_struct

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["selective_state_update"]

PARAMS = params_struct(
    "SelectiveStateUpdateParams",
    "i32 dtype state_dtype batch dim ngroups d_state delta_softplus tactic;"
    "ptr u delta z B C y A D delta_bias state_in state_out;"
    "i64 u_batch_stride delta_batch_stride z_batch_stride B_batch_stride C_batch_stride y_batch_stride",
)


def selective_state_update(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    z: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    out: Tensor | None = None,
    final_state: Tensor | None = None,
    tactic: int = -1,
) -> tuple[Tensor, Tensor]:
    """One token: u, delta, z [B, 1, D], B and C [B, 1, G, N], state [B, D, N] in float32, float16 or bfloat16.

    Returns y [B, 1, D] and the present state, in ``final_state`` if given, which may be ``state`` (in place).
    """
    import torch

    batch, seqlen, dim = u.shape
    groups, d_state = B.shape[2:]
    if seqlen != 1:
        raise KernelError("selective_state_update: one token at a time; selective_scan takes longer sequences")
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device) if out is None else out
    final_state = torch.empty_like(state) if final_state is None else final_state
    a = Arguments("selective_state_update", u)
    for name, x in (("u", u), ("delta", delta), ("z", z)):
        a.activation(name, x, u.shape, ("batch",))
    for name, x in (("B", B), ("C", C)):
        a.activation(name, x, (batch, 1, groups, d_state), ("batch",))
    a.constant("A", A, (dim, d_state))
    a.constant("D", D, (dim,))
    a.constant("delta_bias", delta_bias, (dim,))
    a.constant("state_in", state, (batch, dim, d_state), dtype=state.dtype)
    a.output("y", y, u.shape, u.dtype, ("batch",))
    a.output("state_out", final_state, state.shape, state.dtype)
    params = PARAMS(
        **a.fields,
        dtype=dtype_code(u.dtype),
        state_dtype=dtype_code(state.dtype),
        batch=batch,
        dim=dim,
        ngroups=groups,
        d_state=d_state,
        delta_softplus=delta_softplus,
        tactic=tactic,
    )
    launch("selective_state_update", params, u)
    return y, final_state
