"""selective_scan on the CUDA kernels: same shapes and results as the torch op of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .library import KernelError, dtype_code, launch, params_struct, pointer, tactics

if TYPE_CHECKING:
    import ctypes

    from torch import Tensor

__all__ = ["chain_tactic", "channel_tactic", "selective_scan", "selective_scan_tactics"]

PARAMS = params_struct(
    "SelectiveScanParams",
    "i32 dtype batch seqlen dim ngroups d_state delta_softplus reverse tactic reserved;"
    "ptr u delta z B C y A D delta_bias initial_state final_state seq_lens;"
    "i64 u_batch_stride u_token_stride delta_batch_stride delta_token_stride z_batch_stride z_token_stride"
    " B_batch_stride B_token_stride C_batch_stride C_token_stride y_batch_stride y_token_stride;"
    "ptr workspace; size workspace_size",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(f"selective_scan: {message}")


def _float32(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> int | None:
    if tensor is None:
        return None
    _require(tensor.shape == shape and str(tensor.dtype) == "torch.float32" and tensor.is_contiguous(),
             f"{name} must be a contiguous float32 tensor of shape {list(shape)}")  # fmt: skip
    return tensor.data_ptr()


def _params(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    z: Tensor | None,
    seq_lens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    y: Tensor,
    final_state: Tensor | None,
    tactic: int,
) -> ctypes.Structure:
    batch, seqlen, dim = u.shape
    groups, d_state = B.shape[2:]
    fields: dict[str, int] = {}
    for name, x, shape in (
        *(("u", u, u.shape), ("delta", delta, u.shape), ("z", z, u.shape), ("y", y, u.shape)),
        *(("B", B, (batch, seqlen, groups, d_state)), ("C", C, (batch, seqlen, groups, d_state))),
    ):
        if x is None:
            continue
        _require(
            x.is_cuda and x.dtype == u.dtype and x.shape == shape, f"{name} must be {u.dtype} {list(shape)} on the GPU"
        )
        dense = x.stride(-1) == 1 or x.shape[-1] == 1
        _require(
            dense and (x.dim() == 3 or x.shape[2] == 1 or x.stride(2) == d_state),
            f"{name}: a token's row must be dense",
        )
        fields |= {name: x.data_ptr(), f"{name}_batch_stride": x.stride(0), f"{name}_token_stride": x.stride(1)}
    if seq_lens is not None:
        _require(str(seq_lens.dtype) == "torch.int32" and seq_lens.shape == (batch,), "seq_lens must be int32 [batch]")
    return PARAMS(
        **fields,
        dtype=dtype_code(u.dtype),
        batch=batch,
        seqlen=seqlen,
        dim=dim,
        ngroups=groups,
        d_state=d_state,
        delta_softplus=delta_softplus,
        reverse=reverse,
        tactic=tactic,
        A=_float32(A, (dim, d_state), "A"),
        D=_float32(D, (dim,), "D"),
        delta_bias=_float32(delta_bias, (dim,), "delta_bias"),
        initial_state=_float32(state, (batch, dim, d_state), "state"),
        final_state=_float32(final_state, (batch, dim, d_state), "final_state"),
        seq_lens=pointer(seq_lens),
    )


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    state: Tensor | None = None,
    z: Tensor | None = None,
    seq_lens: Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
    *,
    out: Tensor | None = None,
    final_state: Tensor | None = None,
    tactic: int = -1,
) -> tuple[Tensor, Tensor]:
    """Returns y [B, L, D] and the final state [B, D, N] float32 (in ``out`` and ``final_state`` if given)."""
    import torch

    y = torch.empty(u.shape, dtype=u.dtype, device=u.device) if out is None else out
    if final_state is None:
        final_state = torch.empty((u.shape[0], u.shape[2], A.shape[1]), dtype=torch.float32, device=u.device)
    options = (z, seq_lens, delta_softplus, reverse, y, final_state, tactic)
    launch("selective_scan", _params(u, delta, A, B, C, D, delta_bias, state, *options), u)
    return y, final_state


def selective_scan_tactics(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None = None
) -> list[int]:
    """The tactics that cover these inputs, the selector's choice first."""
    params = _params(u, delta, A, B, C, None, None, None, z, None, True, False, u, None, -1)
    return tactics("selective_scan", params)


def chain_tactic(lanes: int, groups: int, warps: int, copiers: int) -> int:
    """The tactic chain (struct Tactic in cuda/selective_scan.cuh), for tests and benchmarks.

    ``lanes`` of a channel are 2, 4 or 8; a block has ``groups`` of 32 / lanes channels with so many scanning ``warps``
    each, and ``copiers``, warps that copy.
    """
    return {2: 2, 4: 3, 8: 4}[lanes] | groups << 4 | warps << 12 | copiers << 17 | 1 << 20


def channel_tactic(pieces: int = 1, places: int = 0) -> int:
    """The tactic channel (struct Tactic in cuda/selective_scan.cuh) with rows in ``pieces``, for tests and benchmarks.

    The pieces run side by side, or with ``places`` in turn, in so many places of a multiprocessor. It covers any shape
    with 16 states; the selector lists it for those it is good at.
    """
    return 1 | places << 17 | pieces << 20


def generic_tactic(pieces: int = 1) -> int:
    """The tactic generic with rows in ``pieces``, likewise; it covers any shape."""
    return 8 << 12 | pieces << 20
