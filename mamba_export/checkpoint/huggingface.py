"""Hugging Face folders of the model types ``mamba``, ``falcon_mamba`` and ``mamba2``.

What a config means is what transformers computes from it: defaults, ignored options and all.
"""

from __future__ import annotations

import re
from typing import Any

from mamba_export.checkpoint.config import Options, make_spec, scaled
from mamba_export.checkpoint.storage import LazyTensor
from mamba_export.errors import CheckpointError, UnsupportedError
from mamba_export.spec import ModelSpec

MODEL_TYPES = ("mamba", "falcon_mamba", "mamba2")

# Options that shape the initialization, the choice of a kernel, generation or training, never the trained function.
_IGNORED = (
    *("initializer_range", "rescale_prenorm_residual", "time_step_scale", "time_step_min", "time_step_max"),
    *("time_step_init_scheme", "time_step_floor", "use_cache", "use_mambapy", "use_falcon_mambapy"),
    *("A_initializer_range", "emb_initializer_range", "conv_initializer_range", "use_mem_eff_path"),
    *("use_associative_scan", "fused_add_norm", "pad_vocab_size_multiple", "d_model", "d_inner", "n_layer"),
    *("vocab_size", "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "name_or_path"),
    *(
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "use_bfloat16",
        "torchscript",
        "task_specific_params",
    ),
    *("problem_type", "id2label", "label2id", "num_labels", "finetuning_task", "prefix", "tokenizer_class"),
    *("chunk_size_feed_forward", "is_decoder", "is_encoder_decoder", "add_cross_attention", "max_position_embeddings"),
    *("cross_attention_hidden_size", "tie_encoder_decoder", "pruned_heads", "tf_legacy_loss", "use_return_dict"),
    *("min_length", "max_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
    *(
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "model_max_length",
    ),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "diversity_penalty"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "layer_types", "attn_cfg"),
    *("_attn_implementation_autoset", "attn_implementation", "_commit_hash", "_from_model_config", "is_composition"),
)
# Entries left over from conversions, which transformers ignores: harmless only with these values.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    "rms_norm": (True, None),
    "attn_layer_idx": ([], None),
    "d_intermediate": (0, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
}
_QUANTIZED_HINT = "export from the original, unquantized checkpoint; quantize with mamba-export afterwards"
# Falcon-Mamba's norms have no weights; some versions saved the ones they are imitated with.
_WEIGHTLESS = re.compile(
    r"^backbone\.layers\.\d+\.mixer\.(b_layernorm\.weight|c_layernorm\.weight|dt_layernorm\.weight|b_c_rms|dt_rms)$"
)


def rename(name: str) -> str:
    """transformers' name to the canonical one; a model saved without its head lacks ``backbone.``."""
    if name.startswith(("embeddings.", "embedding.", "layers.", "norm_f.")):
        name = "backbone." + name
    if name.startswith("backbone.embeddings."):
        name = name.replace("embeddings.", "embedding.", 1)
    return name


def spell(name: str) -> str:
    """The canonical name as transformers writes it."""
    return name.replace("backbone.embedding.", "backbone.embeddings.", 1)


def spec_from_config(config: dict[str, Any], where: str, assumptions: list[str] | None = None) -> ModelSpec:
    """The model that a Hugging Face config describes.

    Args:
        config: the content of ``config.json``.
        where: its name, for messages.
        assumptions: gains a sentence for each entry that transformers ignores although it looks meaningful.

    Raises:
        CheckpointError: an option is of the wrong type or out of range.
        UnsupportedError: another model type, a quantized model, or an option this version does not export.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UnsupportedError(f"{where}: model_type {kind!r} is not supported", f"supported: {', '.join(MODEL_TYPES)}")
    _refuse_foreign(config, where)
    options = Options(config, where)
    act = options.value("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UnsupportedError(f"{where}: hidden_act {act!r} is not supported", "supported: silu, swish")
    d_model = options.integer("hidden_size", 4096 if kind == "mamba2" else 768)
    vocab_size = options.integer("vocab_size", 32768 if kind == "mamba2" else 50280)
    fields: dict[str, Any] = {
        "d_model": d_model,
        "n_layer": options.integer("num_hidden_layers", 64 if kind == "mamba2" else 32),
        "vocab_size": vocab_size,
        "padded_vocab_size": vocab_size,
        "d_conv": options.integer("conv_kernel", 4),
        "norm": "rms",
        "norm_eps": options.number("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": options.flag("residual_in_fp32", True),
        "proj_bias": options.flag("use_bias", False),
        "conv_bias": options.flag("use_conv_bias", True),
        "tie_embeddings": options.flag("tie_word_embeddings", kind != "mamba2"),
    }
    fields.update(_mamba2(options, d_model) if kind == "mamba2" else _mamba1(options, d_model))
    if kind == "falcon_mamba":
        fields["bcdt_norm_eps"] = options.number("mixer_rms_eps", 1e-6)
    options.ignore([*_IGNORED, *_FOREIGN, "ssm_cfg"])
    if assumptions is not None:
        assumptions.extend(
            f"{where}: '{key}' = {config[key]!r} is ignored, as transformers ignores it" for key in options.rest()
        )
    return make_spec(where, **fields)


def _mamba1(options: Options, d_model: int) -> dict[str, Any]:
    expand = options.number("expand", 2)
    # A stored intermediate_size wins over expand in transformers; Falcon-Mamba 7B relies on it.
    stored = options.value("intermediate_size")
    d_inner = scaled(options.where, expand, d_model) if stored is None else options.integer("intermediate_size")
    auto = options.value("time_step_rank", "auto") == "auto"
    return {
        "family": "mamba1",
        "d_inner": d_inner,
        "d_ssm": d_inner,
        "d_state": options.integer("state_size", 16),
        "dt_rank": -(-d_model // 16) if auto else options.integer("time_step_rank"),
    }


def _mamba2(options: Options, d_model: int) -> dict[str, Any]:
    where = options.where
    d_inner = scaled(where, options.number("expand", 2), d_model)
    groups = options.integer("n_groups", 8)
    if groups < 1 or d_inner % groups:
        raise CheckpointError(f"{where}: the inner width {d_inner} is not a multiple of n_groups = {groups}")
    options.ignore(["time_step_rank", "intermediate_size"])
    return {
        "family": "mamba2",
        "d_inner": d_inner,
        "d_ssm": d_inner,
        "d_state": options.integer("state_size", 128),
        "nheads": options.integer("num_heads", 128),
        "headdim": options.integer("head_dim", 64),
        "ngroups": groups,
        "chunk_size": options.integer("chunk_size", 256),
        "gated_norm": True,
        "norm_before_gate": False,
        "gated_norm_group_size": d_inner // groups,
        "gated_norm_eps": options.number("layer_norm_epsilon", 1e-5),
        "dt_limit": options.pair("time_step_limit"),
    }


def _refuse_foreign(config: dict[str, Any], where: str) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(f"{where}: the checkpoint is quantized ({method})", _QUANTIZED_HINT)
    if config.get("auto_map"):
        raise UnsupportedError(
            f"{where}: auto_map: the model runs its own code, which is never executed",
            f"supported: transformers' own {', '.join(MODEL_TYPES)}",
        )
    for key, harmless in _FOREIGN.items():
        if key in config and config[key] not in harmless:
            raise UnsupportedError(
                f"{where}: '{key}' = {config[key]!r} is not supported for model_type {config['model_type']!r}",
                f"supported: {harmless[0]!r}",
            )
    ssm_cfg = config.get("ssm_cfg")
    if ssm_cfg:
        raise UnsupportedError(
            f"{where}: 'ssm_cfg' = {ssm_cfg!r} has no meaning for model_type {config['model_type']!r}",
            "supported: {}; a folder of mamba_ssm has no model_type (--format state-spaces)",
        )


def drop_weightless(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Leave out stored stand-ins for Falcon-Mamba's weightless norms, which must all be one.

    Raises:
        UnsupportedError: when one holds another value, for transformers' norms have no weights.
    """
    kept = {}
    for name, tensor in tensors.items():
        if not _WEIGHTLESS.match(name):
            kept[name] = tensor
        elif not bool((tensor.load() == 1).all()):
            raise UnsupportedError(
                f"tensor '{tensor.source_name}' in {tensor.file.name} is a weight on the norm of B, C or dt",
                "supported: norms without weights, as in transformers",
            )
    return kept
