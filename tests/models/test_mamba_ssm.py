"""mamba_ssm's own naming and options, against the numpy model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.make_checkpoints import make_codestral, make_statespaces
from tests.models import numpy_model
from tests.models.compare import F32, TARGETS, Array, check_target, random_ids, relative, torch_logits

M2: dict[str, Any] = {"layer": "Mamba2", "d_state": 6, "headdim": 8}
EXPORTED: dict[str, dict[str, Any]] = {
    "mamba1-odd": {
        "d_model": 20,
        "vocab_size": 51,
        "tie_embeddings": False,
        "ssm_cfg": {"d_state": 5, "d_conv": 3, "expand": 1.5, "dt_rank": 7, "bias": True},
    },
    "mamba1-layernorm-mlp": {
        "d_model": 16,
        "rms_norm": False,
        "d_intermediate": 40,
        "residual_in_fp32": False,
        "ssm_cfg": {"conv_bias": False},
    },
    "mamba2-groups-bias-channel-D": {
        "vocab_size": 49,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": False,
        "ssm_cfg": {**M2, "ngroups": 2, "bias": True, "conv_bias": False, "D_has_hdim": True, "d_conv": 2},
    },
    "mamba2-partial-mlp": {
        "d_intermediate": 24,
        "ssm_cfg": {**M2, "d_ssm": 32, "expand": 3, "ngroups": 4, "norm_before_gate": True, "d_conv": 5},
    },
    "mamba2-gate-limit": {
        "rms_norm": False,
        "ssm_cfg": {**M2, "rmsnorm": False, "dt_limit": [0.01, 0.2], "D_has_hdim": True, "d_ssm": 48},
    },
}
MORE: dict[str, dict[str, Any]] = {
    "mamba1": {},
    "mamba1-kernel-8": {
        "ssm_cfg": {"d_conv": 8, "d_state": 1, "dt_rank": 1},
        "pad_vocab_size_multiple": 1,
        "vocab_size": 3,
    },
    "mamba1-layernorm-bias": {"rms_norm": False, "d_model": 7, "ssm_cfg": {"bias": True, "expand": 3}},
    "mamba2": {"ssm_cfg": dict(M2)},
    "mamba2-one-layer": {"n_layer": 1, "ssm_cfg": {**M2, "headdim": 1, "ngroups": 8, "d_state": 1}},
    "mamba2-lower-limit": {"ssm_cfg": {**M2, "dt_limit": [0.2, float("inf")], "norm_before_gate": True, "ngroups": 2}},
    "mamba2-partial-gate": {"ssm_cfg": {**M2, "d_ssm": 16, "rmsnorm": False, "bias": True}, "d_model": 24},
    "mamba2-layernorm-mlp-untied": {
        "rms_norm": False,
        "d_intermediate": 130,
        "tie_embeddings": False,
        "residual_in_fp32": False,
        "ssm_cfg": {**M2, "ngroups": 2},
    },
}
ALL = {**EXPORTED, **MORE}
Oracle = Callable[[str], tuple[Path, Array, Array]]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """``oracle(name)``: the saved folder, token ids, and the numpy model's logits."""
    made: dict[str, tuple[Path, Array, Array]] = {}

    def make(name: str) -> tuple[Path, Array, Array]:
        if name not in made:
            folder = make_statespaces(tmp_path_factory.mktemp(name) / "ss", seed=len(made), **ALL[name])
            config = json.loads((folder / "config.json").read_text())
            state = torch.load(folder / "pytorch_model.bin", weights_only=True)
            ids = random_ids(config["vocab_size"])
            made[name] = folder, ids, numpy_model.logits(config, {k: v.numpy() for k, v in state.items()}, ids)
        return made[name]

    return make


@pytest.mark.parametrize("name", ALL)
def test_torch_model(name: str, oracle: Oracle) -> None:
    folder, ids, wanted = oracle(name)
    assert relative(torch_logits(folder, ids), wanted) < F32


@pytest.mark.parametrize("name", ALL)
def test_torch_model_in_float64(name: str, oracle: Oracle) -> None:
    """In double precision both are exact, but for A, which is made from A_log in float32 as mamba_ssm does it."""
    folder, ids, wanted = oracle(name)
    assert relative(torch_logits(folder, ids, compute="fp64"), wanted) < 1e-6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", EXPORTED)
def test_graphs(name: str, target: str, oracle: Oracle, tmp_path: Path) -> None:
    folder, ids, wanted = oracle(name)
    check_target(folder, tmp_path / target, target, ids, wanted)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["mamba1-layernorm-mlp", "mamba2-partial-mlp"])
def test_float16_graphs(name: str, target: str, oracle: Oracle, tmp_path: Path) -> None:
    """float16 weights and activations; a residual stream in float16 too where the config asks for it."""
    folder, ids, _ = oracle(name)
    wanted = torch_logits(folder, ids, "fp16", "fp32")
    assert relative(torch_logits(folder, ids, "fp16"), wanted) < 5e-3
    check_target(folder, tmp_path / target, target, ids, wanted, limit=5e-3, dtype="fp16")


def test_codestral(tmp_path: Path) -> None:
    """Codestral's files are mamba_ssm's model under other config names."""
    from safetensors.torch import load_file

    folder = make_codestral(tmp_path / "codestral")
    params = json.loads((folder / "params.json").read_text())
    weights = {k.removeprefix("model."): v.numpy() for k, v in load_file(folder / "consolidated.safetensors").items()}
    config = {
        "n_layer": params["n_layers"],
        "vocab_size": params["vocab_size"],
        "d_intermediate": 0,
        "rms_norm": True,
        "tie_embeddings": params["tie_embeddings"],
        "ssm_cfg": {"layer": "Mamba2", "ngroups": params["n_groups"]},
    }
    ids = random_ids(params["vocab_size"])
    assert relative(torch_logits(folder, ids), numpy_model.logits(config, weights, ids)) < F32
