"""Codestral Mamba: ``params.json`` + ``consolidated.safetensors``; mamba_ssm's Mamba-2 under other option names."""

from __future__ import annotations

from typing import Any

from mamba_export.checkpoint import statespaces
from mamba_export.checkpoint.config import Options
from mamba_export.errors import UnsupportedError
from mamba_export.spec import ModelSpec

_SSM_OPTIONS = {
    # params.json: mamba_ssm's Mamba2 argument
    "n_groups": "ngroups",
    "ngroups": "ngroups",
    "d_state": "d_state",
    "state_size": "d_state",
    "d_conv": "d_conv",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "headdim": "headdim",
    "head_dim": "headdim",
    "chunk_size": "chunk_size",
    "dt_limit": "dt_limit",
    "d_ssm": "d_ssm",
    "rmsnorm": "rmsnorm",
    "norm_before_gate": "norm_before_gate",
    "D_has_hdim": "D_has_hdim",
    "bias": "bias",
    "conv_bias": "conv_bias",
}
_MODEL_OPTIONS = {
    "dim": "d_model",
    "n_layers": "n_layer",
    "vocab_size": "vocab_size",
    "rms_norm": "rms_norm",
    "residual_in_fp32": "residual_in_fp32",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "tie_embeddings": "tie_embeddings",
    "d_intermediate": "d_intermediate",
    "attn_layer_idx": "attn_layer_idx",
}
_DEFAULTS = {"tie_embeddings": False, "pad_vocab_size_multiple": 1}
_REQUIRED = ("dim", "n_layers", "vocab_size")
_IGNORED = ("model_type", "fused_add_norm", "max_batch_size", "max_seq_len", "attn_cfg")


def spec_from_params(params: dict[str, Any], where: str) -> ModelSpec:
    """The model that a ``params.json`` describes.

    Raises:
        CheckpointError: an option is missing, of the wrong type or out of range.
        UnsupportedError: another model type, or an unknown option.
    """
    options = Options(params, where)
    kind = options.value("model_type", "mamba")
    if kind != "mamba" or "n_heads" in params:
        raise UnsupportedError(f"{where}: model_type {kind!r} is not supported", "supported: mamba")
    for key in _REQUIRED:
        options.integer(key)
    config: dict[str, Any] = dict(_DEFAULTS)
    ssm_cfg: dict[str, Any] = {"layer": "Mamba2"}
    for key, value in params.items():
        if value is None:
            continue
        if key in _MODEL_OPTIONS:
            config[_MODEL_OPTIONS[key]] = value
        elif key in _SSM_OPTIONS:
            if ssm_cfg.setdefault(_SSM_OPTIONS[key], value) != value:
                raise UnsupportedError(f"{where}: '{key}' = {value!r} contradicts another name of the same option")
        elif key not in _IGNORED:
            known = ", ".join(sorted({*_MODEL_OPTIONS, *_SSM_OPTIONS}))
            raise UnsupportedError(f"{where}: unknown option '{key}' = {value!r}", f"supported: {known}")
    return statespaces.spec_from_config({**config, "ssm_cfg": ssm_cfg}, where)
