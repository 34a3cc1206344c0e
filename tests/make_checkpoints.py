"""Writes small random checkpoints of every format, for all tests.

Each function fills a folder (or a file) below the path it is given and returns that path. The weights are random but
sane: activations stay of order one, A is negative, dt lies in a usual range. The same seed gives the same values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mamba_export.checkpoint import expected_tensors
from mamba_export.checkpoint.codestral import spec_from_params
from mamba_export.checkpoint.statespaces import spec_from_config
from mamba_export.spec import ModelSpec

StateDict = dict[str, torch.Tensor]

# What mamba_ssm keeps in float32 when the model is converted to half precision.
_KEPT_FLOAT32 = ("A_log", ".D", "dt_bias")


def random_weights(spec: ModelSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> StateDict:
    """Random values for every tensor of ``expected_tensors(spec)``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    result = {}
    for name, shape in expected_tensors(spec).items():
        if name.endswith("A_log"):
            value = torch.empty(shape).uniform_(1.0, 16.0, generator=generator).log()
        elif name.endswith(("dt_proj.bias", "dt_bias")):
            dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(0.5), generator=generator).exp()
            value = dt + torch.log(-torch.expm1(-dt))
        elif name.endswith((".D", "norm.weight", "norm2.weight", "norm_f.weight")):
            value = 1 + 0.2 * normal(*shape)
        elif len(shape) == 1:
            value = 0.1 * normal(*shape)
        elif "embedding" in name or "lm_head" in name:
            value = 0.5 * normal(*shape)
        else:
            value = normal(*shape) / math.sqrt(math.prod(shape[1:]))
        result[name] = value.to(torch.float32 if name.endswith(_KEPT_FLOAT32) else dtype)
    return result


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


def save_weights(folder: Path, weights: StateDict, container: str = "bin") -> list[Path]:
    """Save a state dict into a folder.

    Args:
        container: ``bin``, ``bin-legacy`` (torch's format before zip), ``safetensors``, ``bin-sharded`` or
            ``safetensors-sharded`` (two shards and an index).
    """
    from safetensors.torch import save_file

    if container.startswith("safetensors"):
        untied = {}
        for name, tensor in weights.items():
            twin = any(tensor.data_ptr() == other.data_ptr() for other in untied.values() if tensor.numel())
            untied[name] = tensor.clone() if twin else tensor.contiguous()
        weights = untied
    if container == "bin" or container == "bin-legacy":
        path = folder / "pytorch_model.bin"
        torch.save(weights, path, _use_new_zipfile_serialization=container == "bin")
        return [path]
    if container == "safetensors":
        path = folder / "model.safetensors"
        save_file(weights, path, metadata={"format": "pt"})
        return [path]
    stem, suffix = ("model", ".safetensors") if container.startswith("safetensors") else ("pytorch_model", ".bin")
    names = list(weights)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map, paths = {}, []
    for i, half in enumerate(halves):
        path = folder / f"{stem}-{i + 1:05d}-of-{len(halves):05d}{suffix}"
        part = {name: weights[name] for name in half}
        if suffix == ".bin":
            torch.save(part, path)
        else:
            save_file(part, path, metadata={"format": "pt"})
        paths.append(path)
        weight_map.update(dict.fromkeys(half, path.name))
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    return paths


def make_statespaces(
    folder: Path,
    *,
    ssm_cfg: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    container: str = "bin",
    seed: int = 0,
    **config: Any,
) -> Path:
    """A folder as mamba_ssm's ``save_pretrained`` writes it; a tied head is saved beside the embedding, as it does."""
    folder.mkdir(parents=True, exist_ok=True)
    full: dict[str, Any] = {
        "d_model": 32,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 50,
        "ssm_cfg": ssm_cfg or {},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": True,
        **config,
    }
    write_json(folder / "config.json", full)
    weights = random_weights(spec_from_config(full, "config.json"), dtype, seed)
    if full["tie_embeddings"]:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    save_weights(folder, weights, container)
    return folder


def make_huggingface(
    folder: Path,
    model_type: str = "mamba",
    *,
    head: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """A folder that transformers' own ``save_pretrained`` writes, with weights away from their initialization."""
    import transformers

    kinds = {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM, transformers.MambaModel),
        "falcon_mamba": (
            transformers.FalconMambaConfig,
            transformers.FalconMambaForCausalLM,
            transformers.FalconMambaModel,
        ),
        "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM, transformers.Mamba2Model),
    }
    config_class, with_head, without_head = kinds[model_type]
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    if model_type == "mamba2":
        small.update(num_heads=8, head_dim=8, n_groups=2, chunk_size=16)
    torch.manual_seed(seed)
    model = (with_head if head else without_head)(config_class(**{**small, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "A_log" in name:
                parameter += 0.3 * noise
            elif parameter.dim() == 1:
                parameter += 0.1 * noise
            elif "embeddings" in name or "lm_head" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_codestral(
    folder: Path, *, prefix: str = "model.", dtype: torch.dtype = torch.float32, seed: int = 0, **params: Any
) -> Path:
    """``params.json`` and ``consolidated.safetensors``, as Codestral Mamba has them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    full: dict[str, Any] = {
        "dim": 64,
        "n_layers": 2,
        "vocab_size": 50,
        "n_groups": 2,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": False,
        "model_type": "mamba",
        **params,
    }
    write_json(folder / "params.json", full)
    weights = random_weights(spec_from_params(full, "params.json"), dtype, seed)
    save_file({prefix + name: value for name, value in weights.items()}, folder / "consolidated.safetensors")
    return folder


def to_huggingface_names(weights: StateDict) -> StateDict:
    """State-spaces names to those of transformers."""
    return {name.replace("backbone.embedding.", "backbone.embeddings."): value for name, value in weights.items()}


def make_bare(
    path: Path,
    *,
    wrapper: str | None = None,
    prefix: str = "",
    naming: str = "state-spaces",
    ssm_cfg: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """One file with a state dict and nothing beside it; the suffix of ``path`` decides torch or safetensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    full = {"d_model": 32, "n_layer": 2, "vocab_size": 48, "ssm_cfg": ssm_cfg or {}, **config}
    weights = random_weights(spec_from_config(full, "config.json"), dtype, seed)
    if naming == "huggingface":
        weights = to_huggingface_names(weights)
    weights = {prefix + name: value for name, value in weights.items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, path)
    return path


MAMBA2: dict[str, Any] = {"layer": "Mamba2", "d_state": 16, "headdim": 8}

# Small models that between them use every option; name → function that writes one below a folder.
CASES: dict[str, Callable[[Path], Path]] = {
    "ss-mamba1": lambda p: make_statespaces(p),
    "ss-mamba1-half": lambda p: make_statespaces(p, dtype=torch.float16, container="safetensors"),
    "ss-mamba1-odd": lambda p: make_statespaces(
        p,
        d_model=40,
        vocab_size=51,
        ssm_cfg={"layer": "Mamba1", "d_state": 5, "d_conv": 3, "expand": 1.5, "dt_rank": 7, "bias": True},
        tie_embeddings=False,
    ),
    "ss-mamba1-layernorm-mlp": lambda p: make_statespaces(
        p, rms_norm=False, d_intermediate=48, residual_in_fp32=False, ssm_cfg={"conv_bias": False}
    ),
    "ss-mamba2": lambda p: make_statespaces(p, ssm_cfg=dict(MAMBA2)),
    "ss-mamba2-groups-bias": lambda p: make_statespaces(
        p, ssm_cfg={**MAMBA2, "ngroups": 2, "bias": True, "conv_bias": False, "D_has_hdim": True}, tie_embeddings=False
    ),
    "ss-mamba2-partial": lambda p: make_statespaces(
        p, ssm_cfg={**MAMBA2, "d_ssm": 32, "d_conv": 2, "expand": 3, "norm_before_gate": True}, d_intermediate=130
    ),
    "ss-mamba2-gate-limit": lambda p: make_statespaces(
        p, rms_norm=False, ssm_cfg={**MAMBA2, "rmsnorm": False, "dt_limit": [0.01, 0.2], "chunk_size": 32}
    ),
    "hf-mamba": lambda p: make_huggingface(p, "mamba"),
    "hf-mamba-odd": lambda p: make_huggingface(
        p, "mamba", hidden_size=24, state_size=5, conv_kernel=3, expand=3, time_step_rank=7, use_bias=True
    ),
    "hf-mamba-untied": lambda p: make_huggingface(
        p, "mamba", use_conv_bias=False, tie_word_embeddings=False, layer_norm_epsilon=1e-3, residual_in_fp32=False
    ),
    "hf-falcon": lambda p: make_huggingface(p, "falcon_mamba", mixer_rms_eps=1e-4),
    "hf-mamba2": lambda p: make_huggingface(p, "mamba2"),
    "hf-mamba2-odd": lambda p: make_huggingface(
        p,
        "mamba2",
        hidden_size=24,
        expand=3,
        num_heads=6,
        head_dim=12,
        n_groups=3,
        state_size=7,
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        tie_word_embeddings=True,
        time_step_limit=(0.01, 0.2),
        layer_norm_epsilon=1e-3,
        chunk_size=5,
    ),
    "codestral": lambda p: make_codestral(p, dtype=torch.bfloat16),
    "bare-mamba1": lambda p: make_bare(p / "model.pt", wrapper="state_dict", prefix="module."),
    "bare-mamba2": lambda p: make_bare(p / "model.safetensors", ssm_cfg=dict(MAMBA2), naming="huggingface"),
}
