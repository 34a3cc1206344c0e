from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_export import Bundle, export_onnx
from tests.make_checkpoints import make_statespaces
from tests.models.traced import traced_once

MakeGraphs = Callable[..., Bundle]

# Untied, padded vocabularies, biases, an MLP, groups: everything that brings initializers of its own.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "mamba1": {"vocab_size": 51, "ssm_cfg": {"d_conv": 3, "conv_bias": False}},
    "mamba2": {
        "tie_embeddings": False,
        "d_intermediate": 24,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 2, "d_ssm": 32, "bias": True},
    },
}


@pytest.fixture(scope="package")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    return {name: make_statespaces(base / name, **config) for name, config in CHECKPOINTS.items()}


@pytest.fixture(scope="package")
def graphs(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeGraphs]:
    """``graphs("mamba1", "ort", ragged=True)``: an exported bundle, made once; each model is traced once."""
    base = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[Any, ...], Bundle] = {}

    def make(model: str, target: str, **options: Any) -> Bundle:
        key = (model, target, *sorted(options.items()))
        if key not in made:
            out = base / "-".join(map(str, key)).replace("'", "")
            made[key] = export_onnx(checkpoints[model], out, target=target, verify=False, **options).bundle
        return made[key]

    with traced_once():
        yield make
