"""causal_conv1d on the CUDA kernels: same arguments and results as the torch op of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .library import Arguments, dtype_code, launch, params_struct

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["causal_conv1d"]

PARAMS = params_struct(
    "CausalConv1dParams",
    "i32 dtype weight_dtype batch seqlen channels width activation tactic;"
    "ptr x weight bias state_in y state_out seq_lens;"
    "i64 x_batch_stride x_token_stride y_batch_stride y_token_stride",
)


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
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    shape = (batch, channels, width - 1)
    if final_state is None:
        final_state = torch.empty(shape, dtype=x.dtype, device=x.device)
    a = Arguments("causal_conv1d", x)
    a.activation("x", x, x.shape, ("batch", "token"))
    a.constant("weight", weight, (channels, width), dtype=weight.dtype)
    a.constant("bias", bias, (channels,), dtype=weight.dtype)
    a.constant("state_in", state, shape, dtype=x.dtype)
    a.constant("seq_lens", seq_lens, (batch,), dtype=torch.int32)
    a.output("y", y, x.shape, x.dtype, ("batch", "token"))
    a.output("state_out", final_state, shape, x.dtype)
    params = PARAMS(
        **a.fields,
        dtype=dtype_code(x.dtype),
        weight_dtype=dtype_code(weight.dtype),
        batch=batch,
        seqlen=seqlen,
        channels=channels,
        width=width,
        activation=activation,
        tactic=tactic,
    )
    launch("causal_conv1d", params, x)
    return y, final_state
