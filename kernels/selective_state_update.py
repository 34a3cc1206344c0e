"""selective_state_update on the CUDA kernels: same shapes and results as the torch op of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .library import KernelError, dtype_code, launch, params_struct, pointer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["selective_state_update"]

PARAMS = params_struct(
    "SelectiveStateUpdateParams",
    "i32 dtype state_dtype batch dim ngroups d_state delta_softplus tactic;"
    "ptr u delta z B C y A D delta_bias state_in state_out;"
    "i64 u_batch_stride delta_batch_stride z_batch_stride B_batch_stride C_batch_stride y_batch_stride",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(f"selective_state_update: {message}")


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
    _require(seqlen == 1, "one token at a time; selective_scan takes longer sequences")
    fields: dict[str, int] = {}
    for name, x in (("u", u), ("delta", delta), ("z", z), ("B", B), ("C", C)):
        if x is None:
            continue
        _require(x.is_cuda and x.dtype == u.dtype, f"{name} must be {u.dtype} on the GPU")
        _require(
            x.stride(-1) == 1 and (x.dim() == 3 or groups == 1 or x.stride(2) == d_state),
            f"{name}: a row must be dense",
        )
        fields |= {name: x.data_ptr(), f"{name}_batch_stride": x.stride(0)}
    for name, x in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        _require(x is None or (str(x.dtype) == "torch.float32" and x.is_contiguous()), f"{name} must be dense float32")
    final_state = torch.empty_like(state) if final_state is None else final_state
    for x in (state, final_state):
        _require(x.shape == (batch, dim, d_state) and x.is_contiguous(), "state must be dense [batch, dim, d_state]")
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device) if out is None else out
    params = PARAMS(
        **fields,
        dtype=dtype_code(u.dtype),
        state_dtype=dtype_code(state.dtype),
        batch=batch,
        dim=dim,
        ngroups=groups,
        d_state=d_state,
        delta_softplus=delta_softplus,
        tactic=tactic,
        y=pointer(y),
        A=pointer(A),
        D=pointer(D),
        delta_bias=pointer(delta_bias),
        state_in=pointer(state),
        state_out=pointer(final_state),
        y_batch_stride=y.stride(0),
    )
    launch("selective_state_update", params, u)
    return y, final_state
