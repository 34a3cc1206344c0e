"""The language model: embedding, blocks (residual, norm, mixer, optional MLP), final norm, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_export.models.mamba1 import Mamba1Mixer
from mamba_export.models.mamba2 import Mamba2Mixer
from mamba_export.ops.rms_norm import add_rms_norm
from mamba_export.spec import Family, ModelSpec

MIXERS: dict[Family, Callable[[ModelSpec, bool], nn.Module]] = {"mamba1": Mamba1Mixer, "mamba2": Mamba2Mixer}


class AddNorm(nn.Module):
    """The residual add and the norm that follows it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.d_model))
        self.bias = nn.Parameter(torch.empty(spec.d_model)) if spec.norm == "layer" else None

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and residual [B, L, d_model] → the normed sum in the dtype of x, and the sum."""
        dtype = x.dtype
        if residual is None and self.spec.residual_in_fp32:
            x = x.to(torch.promote_types(dtype, torch.float32))
        if self.bias is None:
            y, total = add_rms_norm(x, self.weight, residual, self.spec.norm_eps)
            return y.to(dtype), total
        total = x if residual is None else x.to(residual.dtype) + residual
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        y = F.layer_norm(total.to(wide), (self.spec.d_model,), weight, bias, self.spec.norm_eps)
        return y.to(dtype), total


class GatedMLP(nn.Module):
    """mamba_ssm's MLP: ``fc2(a * silu(b))`` with ``[a, b] = fc1(x)``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.hidden = spec.d_intermediate
        self.fc1 = nn.Linear(spec.d_model, 2 * spec.d_intermediate, bias=False)
        self.fc2 = nn.Linear(spec.d_intermediate, spec.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = torch.split(self.fc1(x), [self.hidden, self.hidden], dim=-1)
        out: Tensor = self.fc2(y * F.silu(gate))
        return out


class Block(nn.Module):
    def __init__(self, spec: ModelSpec, step: bool) -> None:
        super().__init__()
        self.norm = AddNorm(spec)
        self.mixer = MIXERS[spec.family](spec, step)
        self.norm2 = AddNorm(spec) if spec.d_intermediate else None
        self.mlp = GatedMLP(spec) if spec.d_intermediate else None

    def forward(
        self, x: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor, seq_lens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, residual = self.norm(x, residual)
        x, conv_state, ssm_state = self.mixer(x, conv_state, ssm_state, seq_lens)
        if self.norm2 is not None and self.mlp is not None:
            x, residual = self.norm2(x, residual)
            x = self.mlp(x)
        return x, residual, conv_state, ssm_state


class Backbone(nn.Module):
    def __init__(self, spec: ModelSpec, step: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.padded_vocab_size, spec.d_model)
        self.layers = nn.ModuleList(Block(spec, step) for _ in range(spec.n_layer))
        self.norm_f = AddNorm(spec)


class MambaLM(nn.Module):
    """A Mamba language model over explicit states.

    Args:
        spec: the model.
        step: build the step graph's model (one token); otherwise prefill (any length).
        logits: ``last`` keeps the logits of the last valid token only.
    """

    def __init__(self, spec: ModelSpec, step: bool = False, logits: Literal["last", "all"] = "all") -> None:
        super().__init__()
        self.spec, self.logits = spec, logits
        self.backbone = Backbone(spec, step)
        self.lm_head = nn.Linear(spec.d_model, spec.padded_vocab_size, bias=False)
        if spec.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, input_ids: Tensor, states: list[Tensor], seq_lens: Tensor | None = None) -> tuple[Tensor, ...]:
        """Run the model over a piece of a sequence.

        Args:
            input_ids: int64 [B, L], L = 1 for the step model.
            states: conv and ssm state of every layer, in the order of :func:`mamba_export.states.state_table`.
            seq_lens: int32 [B], the valid length of each right-padded row; None when all are full.

        Returns:
            float32 logits [B, L or 1, vocab_size], then the present states in the order of ``states``.
        """
        x = self.backbone.embedding(input_ids)
        residual: Tensor | None = None
        presents: list[Tensor] = []
        for i, layer in enumerate(self.backbone.layers):
            x, residual, *present = layer(x, residual, states[2 * i], states[2 * i + 1], seq_lens)
            presents += present
        if self.logits == "last" and x.shape[1] != 1:
            assert residual is not None
            x, residual = _last_valid(x, seq_lens), _last_valid(residual, seq_lens)
        x, _ = self.backbone.norm_f(x, residual)
        logits = self.lm_head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.spec.padded_vocab_size != self.spec.vocab_size:
            logits = logits[..., : self.spec.vocab_size]
        return (logits, *presents)


def _last_valid(x: Tensor, seq_lens: Tensor | None) -> Tensor:
    """[B, L, d] → [B, 1, d] at the last valid position of every row."""
    if seq_lens is None:
        return x.select(1, -1).unsqueeze(1)
    index = (seq_lens.long() - 1)[:, None, None].expand(-1, 1, x.shape[2])
    return torch.gather(x, 1, index)


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
KEPT_WIDE = (".A", ".D", ".dt_bias", ".dt_proj.bias")
"""Parameters that stay float32 in every dtype."""


def build_model(
    spec: ModelSpec, dtype: str = "fp32", step: bool = False, logits: Literal["last", "all"] = "all"
) -> MambaLM:
    """A :class:`MambaLM` without storage for its weights (meta device), in inference mode.

    Args:
        spec: the model.
        dtype: ``fp32``, ``fp16``, ``bf16``, or ``fp64`` for a reference in double precision.
        step: see :class:`MambaLM`.
        logits: see :class:`MambaLM`.
    """
    with torch.device("meta"):
        model = MambaLM(spec, step, logits)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(parameter_dtype(name, dtype))
    return model.eval()


def parameter_dtype(name: str, dtype: str) -> torch.dtype:
    """The torch dtype in which parameter ``name`` is held by a model of ``dtype``."""
    if name.endswith(KEPT_WIDE):
        return torch.float64 if dtype == "fp64" else torch.float32
    return _DTYPES[dtype]
