"""Bundles for engine tests, copied so that engines can be written into them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_export.bundle import Bundle

CopyBundle = Callable[..., Bundle]


@pytest.fixture
def copy_bundle(make_bundle: Callable[..., Path], tmp_path: Path) -> CopyBundle:
    """``copy_bundle(ckpt=…, dtype=…)``: a bundle of target tensorrt of one's own."""

    def copy(**options: Any) -> Bundle:
        source = make_bundle(**{"target": "tensorrt", "logits": "last", "dtype": "fp16", **options})
        shutil.copytree(source, tmp_path / "bundle")
        return Bundle(tmp_path / "bundle", check=False)

    return copy
