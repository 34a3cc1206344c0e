"""causal_conv1d on the CUDA kernels: same shapes and results as the torch op of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .library import KernelError, dtype_code, launch, params_struct, pointer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["causal_conv1d"]

PARAMS = params_struct(
    "CausalConv1dParams",
    "i32 dtype weight_dtype batch seqlen channels width activation tactic;"
    "ptr x weight bias state_in y state_out seq_lens;"
    "i64 x_batch_stride x_token_stride y_batch_stride y_token_stride",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(f"causal_conv1d: {message}")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_lens: Tensor | None = None,
    activation: bool = True,
    *,
    out: Tensor | None = None,
    final_state: Tensor | None = None,
    tactic: int = -1,
) -> tuple[Tensor, Tensor]:
    """Returns y [B, L, C] and the present state [B, C, K-1] (in ``out`` and ``final_state`` if given; the latter may
    be ``state``)."""
    import torch

    batch, seqlen, channels = x.shape
    width = weight.shape[1]
    _require(x.is_cuda and (x.stride(2) == 1 or channels == 1), "x must be on the GPU with dense channels")
    _require(weight.shape == (channels, width) and weight.is_contiguous(), "weight must be dense [channels, width]")
    for tensor, dtype, name in (
        (bias, weight.dtype, "bias"),
        (state, x.dtype, "state"),
        (final_state, x.dtype, "final_state"),
    ):
        _require(tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()), f"{name} must be dense {dtype}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if final_state is None:
        final_state = torch.empty((batch, channels, width - 1), dtype=x.dtype, device=x.device)
    params = PARAMS(
        dtype=dtype_code(x.dtype),
        weight_dtype=dtype_code(weight.dtype),
        batch=batch,
        seqlen=seqlen,
        channels=channels,
        width=width,
        activation=activation,
        tactic=tactic,
        x=pointer(x),
        weight=pointer(weight),
        bias=pointer(bias),
        state_in=pointer(state),
        y=pointer(y),
        state_out=pointer(final_state),
        seq_lens=pointer(seq_lens),
        x_batch_stride=x.stride(0),
        x_token_stride=x.stride(1),
        y_batch_stride=y.stride(0),
        y_token_stride=y.stride(1),
    )
    launch("causal_conv1d", params, x)
    return y, final_state
