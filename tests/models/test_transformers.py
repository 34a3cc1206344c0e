"""transformers as oracle: models of unusual shapes, saved by it, give its logits through every target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamba_export import open_checkpoint
from tests.make_checkpoints import make_huggingface
from tests.models.compare import F32, TARGETS, Array, check_target, random_ids, relative, torch_logits

transformers = pytest.importorskip("transformers", reason="NOT TESTED: transformers, the oracle, is not installed")

CLASSES = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}

# Exported and run through every target.
EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba-odd-bias-untied": (
        "mamba",
        {
            "hidden_size": 27,
            "expand": 3,
            "state_size": 5,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "vocab_size": 53,
            "use_bias": True,
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "mamba-kernel-5-no-conv-bias": (
        "mamba",
        {"hidden_size": 20, "state_size": 1, "conv_kernel": 5, "use_conv_bias": False, "residual_in_fp32": False},
    ),
    "falcon-kernel-2": ("falcon_mamba", {"hidden_size": 24, "conv_kernel": 2, "state_size": 7, "mixer_rms_eps": 1e-4}),
    "mamba2-groups-limit": (
        "mamba2",
        {
            "hidden_size": 24,
            "expand": 3,
            "num_heads": 6,
            "head_dim": 12,
            "n_groups": 3,
            "state_size": 7,
            "conv_kernel": 3,
            "use_bias": True,
            "use_conv_bias": False,
            "tie_word_embeddings": True,
            "time_step_limit": (0.01, 0.2),
            "layer_norm_epsilon": 1e-3,
            "chunk_size": 5,
            "vocab_size": 53,
        },
    ),
    "mamba2-kernel-2-four-groups": (
        "mamba2",
        {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "n_groups": 4, "conv_kernel": 2, "residual_in_fp32": False},
    ),
}
# Compared through the torch model alone.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba-defaults": ("mamba", {}),
    "mamba-intermediate-size": ("mamba", {"hidden_size": 12, "expand": 1, "conv_kernel": 2, "num_hidden_layers": 3}),
    "mamba-wide-rank": ("mamba", {"hidden_size": 9, "time_step_rank": 19, "vocab_size": 7, "conv_kernel": 7}),
    "falcon-bias-untied": ("falcon_mamba", {"use_bias": True, "tie_word_embeddings": False, "conv_kernel": 5}),
    "falcon-rank": ("falcon_mamba", {"hidden_size": 15, "time_step_rank": 3, "state_size": 1}),
    "mamba2-one-head": ("mamba2", {"hidden_size": 10, "num_heads": 1, "head_dim": 20, "n_groups": 1, "chunk_size": 3}),
    "mamba2-head-dim-1": ("mamba2", {"hidden_size": 6, "num_heads": 12, "head_dim": 1, "n_groups": 2, "state_size": 3}),
    "mamba2-lower-limit": ("mamba2", {"time_step_limit": (0.3, float("inf")), "conv_kernel": 5, "use_bias": True}),
}
ALL = {**EXPORTED, **MORE}

Oracle = Callable[[str], tuple[Path, Array, Array]]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """``oracle(name)``: the saved folder, token ids, and transformers' logits in float64."""
    made: dict[str, tuple[Path, Array, Array]] = {}

    def make(name: str) -> tuple[Path, Array, Array]:
        if name not in made:
            kind, config = ALL[name]
            folder = make_huggingface(tmp_path_factory.mktemp(name) / "hf", kind, seed=len(made), **config)
            model = getattr(transformers, CLASSES[kind]).from_pretrained(folder, dtype=torch.float64).eval()
            ids = random_ids(model.config.vocab_size)
            with torch.no_grad():
                made[name] = folder, ids, model(torch.from_numpy(ids)).logits.double().numpy()
        return made[name]

    return make


@pytest.mark.parametrize("name", ALL)
def test_torch_model(name: str, oracle: Oracle) -> None:
    folder, ids, wanted = oracle(name)
    assert relative(torch_logits(folder, ids), wanted) < F32
    # transformers keeps float32 inside whatever the dtype, so its float64 is good to float32's rounding only.
    assert relative(torch_logits(folder, ids, compute="fp64"), wanted) < F32 / 10


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", EXPORTED)
def test_graphs(name: str, target: str, oracle: Oracle, tmp_path: Path) -> None:
    folder, ids, wanted = oracle(name)
    check_target(folder, tmp_path / target, target, ids, wanted)


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_in_the_spec(name: str, oracle: Oracle) -> None:
    """The comparison means something: the options reached the model."""
    folder, _, wanted = oracle(name)
    _, config = ALL[name]
    fields = {"hidden_size": "d_model", "state_size": "d_state", "conv_kernel": "d_conv", "n_groups": "ngroups"}
    fields |= {"num_heads": "nheads", "head_dim": "headdim", "vocab_size": "vocab_size", "use_bias": "proj_bias"}
    fields |= {"use_conv_bias": "conv_bias", "tie_word_embeddings": "tie_embeddings", "time_step_limit": "dt_limit"}
    fields |= {"time_step_rank": "dt_rank", "layer_norm_epsilon": "norm_eps", "residual_in_fp32": "residual_in_fp32"}
    with open_checkpoint(folder) as checkpoint:
        for key, value in config.items():
            if key in fields:
                assert getattr(checkpoint.spec, fields[key]) == value, key
        assert wanted.shape[2] == checkpoint.spec.vocab_size
        assert np.ptp(wanted) > 1
