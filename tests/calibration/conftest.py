"""Statistics of mamba1-tiny, and quantized bundles of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_export import calibrate, quantize

MakeQuantized = Callable[..., Path]


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """2,048 tokens of text that the checkpoint knows: the README, through its tokenizer."""
    from mamba_export.tokens import load_tokenizer

    text = (tiny_checkpoint.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ids = load_tokenizer(tiny_checkpoint / "tokenizer.json").encode(text).ids[:2048]
    path = tmp_path_factory.mktemp("data") / "tokens.bin"
    np.array(ids, "<u2").tofile(path)
    return path


@pytest.fixture(scope="session")
def statistics_file(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, token_file: Path) -> Path:
    """A calibration of mamba1-tiny on 8 windows of 128 tokens."""
    path = tmp_path_factory.mktemp("statistics") / "calib.safetensors"
    calibrate(tiny_checkpoint, token_file, path, windows=8, length=128)
    return path


@pytest.fixture(scope="session")
def make_quantized(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, statistics_file: Path
) -> MakeQuantized:
    """``make_quantized(recipe="w8a8", target="ort", …)``: a verified bundle of mamba1-tiny, made once."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}

    def make(**options: Any) -> Path:
        options = {"target": "ort", "logits": "all", "calibration": statistics_file, **options}
        key = tuple(sorted((k, str(v)) for k, v in options.items()))
        if key not in made:
            made[key] = folder / str(len(made))
            quantize(tiny_checkpoint, made[key], **options)
        return made[key]

    return make
