"""state-spaces folders: ``config.json`` + ``pytorch_model.bin``, as mamba_ssm's ``save_pretrained`` writes them."""

from __future__ import annotations

from typing import Any

from mamba_export.checkpoint.config import Options, make_spec, scaled
from mamba_export.errors import CheckpointError, UnsupportedError
from mamba_export.spec import ModelSpec

# Options of the modules that shape only the initialization or the choice of a kernel.
_INIT_1 = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "layer_idx", "device", "dtype")
_INIT_2 = (
    *("dt_min", "dt_max", "dt_init_floor", "A_init_range", "conv_init", "use_mem_eff_path", "sequence_parallel"),
    *("layer_idx", "device", "dtype"),
)
# Top-level entries that say nothing about the model's function.
_BOOKKEEPING = (
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_cfg", "initializer_range"),
    *("rescale_prenorm_residual", "fused_add_norm", "attn_cfg"),
)
_GATED_NORM_EPS = 1e-5
_NORM_EPS = 1e-5
_MLP_MULTIPLE = 128


def pad_to(value: int, multiple: int) -> int:
    """``value`` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def spec_from_config(config: dict[str, Any], where: str) -> ModelSpec:
    """The model that a state-spaces config describes.

    Raises:
        CheckpointError: an option is missing, of the wrong type or out of range.
        UnsupportedError: an option that this version does not export.
    """
    options = Options(config, where)
    layers = options.value("attn_layer_idx", [])
    if layers:
        raise UnsupportedError(
            f"{where}: attn_layer_idx = {layers}: layers of attention are not supported",
            "supported: models whose layers are all Mamba-1 or all Mamba-2",
        )
    d_model, n_layer = options.integer("d_model", 2560), options.integer("n_layer", 64)
    vocab_size, multiple = options.integer("vocab_size", 50277), options.integer("pad_vocab_size_multiple", 8)
    if multiple < 1:
        raise CheckpointError(f"{where}: pad_vocab_size_multiple = {multiple} must be at least 1")
    hidden = options.integer("d_intermediate", 0)
    if hidden < 0:
        raise CheckpointError(f"{where}: d_intermediate = {hidden} must not be negative")
    ssm_cfg = options.value("ssm_cfg", {})
    if not isinstance(ssm_cfg, dict):
        raise CheckpointError(f"{where}: 'ssm_cfg' is {ssm_cfg!r}, expected an object")
    common: dict[str, Any] = {
        "d_model": d_model,
        "n_layer": n_layer,
        "vocab_size": vocab_size,
        "padded_vocab_size": pad_to(vocab_size, multiple),
        "norm": "rms" if options.flag("rms_norm", True) else "layer",
        "norm_eps": _NORM_EPS,
        "residual_in_fp32": options.flag("residual_in_fp32", True),
        "tie_embeddings": options.flag("tie_embeddings", True),
        "d_intermediate": pad_to(hidden, _MLP_MULTIPLE),
    }
    options.ignore(_BOOKKEEPING)
    for key in options.rest():
        raise UnsupportedError(
            f"{where}: unknown option '{key}' = {config[key]!r}", "supported: mamba_ssm's MambaConfig"
        )
    return make_spec(where, **common, **mixer_fields(ssm_cfg, d_model, where))


def mixer_fields(ssm_cfg: dict[str, Any], d_model: int, where: str) -> dict[str, Any]:
    """The spec's fields that ``ssm_cfg`` decides, with the defaults of mamba_ssm's modules."""
    options = Options(ssm_cfg, f"{where}: ssm_cfg")
    layer = options.value("layer", "Mamba1")
    if layer == "Mamba1":
        fields = _mamba1(options, d_model)
    elif layer == "Mamba2":
        fields = _mamba2(options, d_model)
    else:
        raise UnsupportedError(f"{where}: ssm_cfg.layer = {layer!r} is not supported", "supported: Mamba1, Mamba2")
    for key in options.rest():
        raise UnsupportedError(
            f"{where}: unknown option ssm_cfg.{key} = {ssm_cfg[key]!r} for a {layer} layer",
            f"supported: the arguments of mamba_ssm's {layer} module",
        )
    return fields


def _mamba1(options: Options, d_model: int) -> dict[str, Any]:
    d_inner = scaled(options.where, options.number("expand", 2), d_model)
    auto = options.value("dt_rank", "auto") == "auto"
    fields = {
        "family": "mamba1",
        "d_inner": d_inner,
        "d_ssm": d_inner,
        "d_state": options.integer("d_state", 16),
        "d_conv": options.integer("d_conv", 4),
        "dt_rank": -(-d_model // 16) if auto else options.integer("dt_rank"),
        "proj_bias": options.flag("bias", False),
        "conv_bias": options.flag("conv_bias", True),
    }
    options.ignore(_INIT_1)
    return fields


def _mamba2(options: Options, d_model: int) -> dict[str, Any]:
    where = options.where
    for key, harmless in (("process_group", None), ("learnable_init_states", False)):
        if options.value(key) not in (None, harmless):
            raise UnsupportedError(f"{where}.{key} = {options.data[key]!r} is not supported", "supported: none")
    if options.value("activation", "silu") not in ("silu", "swish"):
        raise UnsupportedError(f"{where}.activation = {options.data['activation']!r}", "supported: silu, swish")
    expand = options.number("expand", 2)
    d_inner = scaled(where, expand, d_model)
    if d_inner != expand * d_model:
        raise CheckpointError(f"{where}: expand * d_model = {expand * d_model} is not a whole number")
    d_ssm, headdim, ngroups = (
        options.integer("d_ssm", d_inner),
        options.integer("headdim", 64),
        options.integer("ngroups", 1),
    )
    if headdim < 1 or ngroups < 1 or d_ssm % headdim or d_ssm % ngroups:
        raise CheckpointError(f"{where}: d_ssm = {d_ssm} is not a multiple of headdim = {headdim}, ngroups = {ngroups}")
    fields = {
        "family": "mamba2",
        "d_inner": d_inner,
        "d_ssm": d_ssm,
        "d_state": options.integer("d_state", 128),
        "d_conv": options.integer("d_conv", 4),
        "headdim": headdim,
        "nheads": d_ssm // headdim,
        "ngroups": ngroups,
        "chunk_size": options.integer("chunk_size", 256),
        "proj_bias": options.flag("bias", False),
        "conv_bias": options.flag("conv_bias", True),
        "gated_norm": options.flag("rmsnorm", True),
        "norm_before_gate": options.flag("norm_before_gate", False),
        "gated_norm_group_size": d_ssm // ngroups,
        "gated_norm_eps": _GATED_NORM_EPS,
        "D_has_hdim": options.flag("D_has_hdim", False),
        "dt_limit": options.pair("dt_limit"),
    }
    options.ignore(_INIT_2)
    return fields
