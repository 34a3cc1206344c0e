"""Every recipe's bundle builds with TensorRT-RTX, for the GPUs that take its types."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mamba_export.bundle import Bundle
from mamba_export.engine import BuildOptions, Range, build_engines
from mamba_export.extras import available
from tests.calibration.conftest import MakeQuantized

if not available("tensorrt_rtx"):
    pytest.skip(
        "NOT TESTED: engines of quantized bundles; TensorRT-RTX is not installed (pip install tensorrt-rtx)",
        allow_module_level=True,
    )

CASES = [
    ("w8a16", "fp32", ("86", "89", "120")),
    ("w8a16-gptq", "fp32", ("86",)),
    ("w8a8", "fp32", ("86", "89", "120")),
    ("w4a16-g128", "fp32", ("86", "89", "120")),
    ("w4a16-g32", "fp32", ("86", "89", "120")),
    ("w4a8", "fp32", ("86", "89", "120")),
    ("fp8", "fp32", ("89", "120")),
    ("w8a16", "int8", ("86",)),
    ("w8a16", "fp16", ("86",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "state", "sm"), CASES)
def test_a_quantized_bundle_builds(
    make_quantized: MakeQuantized, tmp_path: Path, recipe: str, state: str, sm: tuple[str, ...]
) -> None:
    source = make_quantized(recipe=recipe, target="tensorrt", dtype="fp16", state=state, logits="last", verify=False)
    shutil.copytree(source, tmp_path / "bundle")
    options = BuildOptions(runtime="tensorrt-rtx", sm=sm, seq=Range(1, 64, 512))
    result = build_engines(Bundle(tmp_path / "bundle", check=False), options)
    assert [entry["kind"] for entry in result.engines] == ["prefill", "step"]
