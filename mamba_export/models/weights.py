"""From the checkpoint's tensors to the model's parameters: the only place where the two differ."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mamba_export.checkpoint import Checkpoint
from mamba_export.errors import CheckpointError
from mamba_export.models.lm import MambaLM, build_model, parameter_dtype


class WeightSource(Protocol):
    """Anything that gives the parameters of a model one by one, by name."""

    def __call__(self, name: str) -> Tensor: ...


def load_parameter(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One parameter of the model in ``dtype``, contiguous, read from the checkpoint now.

    ``A`` is computed as ``-exp(A_log)`` in float32, conv weights lose their middle axis, a conv bias that the model
    was trained without is zero.

    Raises:
        CheckpointError: when the tensor holds NaN or infinite values, or values that ``dtype`` can't hold.
    """
    source = name
    if name.endswith(".A"):
        source = f"{name}_log"
    if name.endswith("conv1d.bias") and source not in checkpoint.tensors:
        return torch.zeros(shape, dtype=dtype)
    lazy = checkpoint.tensors[source]
    tensor = lazy.load()
    if name.endswith(".A"):
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        tensor = torch.where(torch.isfinite(wide), -torch.exp(wide), torch.nan)  # exp would hide an A_log of -inf
    result = tensor.reshape(shape).to(dtype).contiguous()
    if not bool(torch.isfinite(result).all()):
        if bool(torch.isfinite(tensor).all()):
            peak = float(tensor.abs().max())
            name_of = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{lazy.source_name} holds {peak:.4g}, which {name_of} can't", "use --dtype bf16")
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{lazy.source_name} holds {bad} NaN or infinite values", "the checkpoint is damaged or training diverged"
        )
    return result


def load_model(checkpoint: Checkpoint, dtype: str = "fp32", compute: str | None = None, step: bool = False) -> MambaLM:
    """The torch model with the checkpoint's weights on the CPU.

    Args:
        checkpoint: an open checkpoint.
        dtype: the dtype the weights are rounded to, ``fp32``, ``fp16`` or ``bf16``.
        compute: the dtype the model then runs in; ``dtype`` when None. ``fp32`` or ``fp64`` makes it an oracle for
            a bundle whose weights are ``dtype``.
        step: build the model of the step graph.
    """
    model = build_model(checkpoint.spec, compute or dtype, step=step)
    state = {}
    for name, parameter in model.named_parameters():
        rounded = load_parameter(checkpoint, name, tuple(parameter.shape), parameter_dtype(name, dtype))
        state[name] = rounded.to(parameter.dtype)
    if checkpoint.spec.tie_embeddings:
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
