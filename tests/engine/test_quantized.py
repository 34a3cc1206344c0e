"""Quantized bundles as engines: TensorRT-RTX builds them, and the runner carries their states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_export import Bundle, calibrate, quantize
from mamba_export.engine import BuildOptions, Range, build_engines
from mamba_export.extras import available
from mamba_export.runtime import OrtRunner
from mamba_export.runtime.trt import TrtRunner
from mamba_export.verification import verify
from tests.engine.conftest import StandIn

Quantized = Callable[..., Bundle]
GPUS = {
    "w8a16": ("86", "89", "120"),
    "w8a8": ("86", "89", "120"),
    "w4a16-g64": ("86", "89", "120"),
    "fp8": ("89", "120"),
}


@pytest.fixture
def quantized(tiny_checkpoint: Path, tmp_path: Path) -> Quantized:
    """``quantized(recipe="w8a8", …)``: a quantized bundle of mamba1-tiny for TensorRT."""

    def make(**options: Any) -> Bundle:
        settings = {"target": "tensorrt", "verify": False, **options}
        if options["recipe"] != "w8a16":  # that one needs no statistics
            ids = np.random.default_rng(0).integers(0, 4096, 4 * 65).astype("<u2")
            ids.tofile(tmp_path / "tokens.bin")
            settings["calibration"] = tmp_path / "calib.safetensors"
            calibrate(tiny_checkpoint, tmp_path / "tokens.bin", settings["calibration"], windows=4, length=64)
        quantize(tiny_checkpoint, tmp_path / "bundle", **settings)
        return Bundle(tmp_path / "bundle", check=False)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("recipe", GPUS)
def test_recipes_build(recipe: str, quantized: Quantized, record_property: Callable[[str, object], None]) -> None:
    if not available("tensorrt_rtx"):
        pytest.skip("NOT TESTED: quantized engines; TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    bundle = quantized(recipe=recipe, dtype="fp16")
    options = BuildOptions("tensorrt-rtx", sm=GPUS[recipe], seq=Range(1, 64, 256))
    for row in build_engines(bundle, options).engines:
        gpus = " ".join(f"sm_{sm}" for sm in row["compute_capabilities"])
        record_property("engine", f"mamba1-tiny   {row['kind']:<8} {gpus} · {recipe} · {row['bytes'] / 1e6:.1f} MB")
        assert row["layers"]["DEQUANTIZE"] > 2 * bundle.spec.n_layer


@pytest.mark.slow
def test_a_fused_step_of_packed_rows_builds(
    quantized: Quantized, record_property: Callable[[str, object], None]
) -> None:
    """Through the node's body: the packed integers, as standard ops take them apart."""
    if not available("tensorrt_rtx"):
        pytest.skip("NOT TESTED: quantized engines; TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    bundle = quantized(recipe="w8a16", dtype="fp16", fuse_step=True)
    rows = build_engines(bundle, BuildOptions("tensorrt-rtx", sm=("89",), seq=Range(1, 64, 256))).engines
    for row in rows:
        size = f"{row['bytes'] / 1e6:.1f} MB"
        record_property("engine", f"mamba1-tiny   {row['kind']:<8} sm_89 · w8a16, fused step · {size}")
    assert sorted(row["kind"] for row in rows) == ["prefill", "step"]


def relative(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("state", ["int8", "fp16"])
def test_narrow_states_are_carried(state: str, quantized: Quantized, standin: StandIn) -> None:
    bundle = quantized(recipe="w8a16", dtype="fp32", state=state)
    standin.build(bundle, seq=Range(1, 8, 16))
    ids = np.random.default_rng(1).integers(0, 4096, (2, 30))
    trt, ort = TrtRunner(bundle), OrtRunner(bundle)
    logits, held = trt.prefill(ids[:, :16], trt.initial_state(2))
    wanted, truth = ort.prefill(ids[:, :16], ort.initial_state(2))
    assert relative(logits, wanted) < 3e-2  # ONNX Runtime may round activations of products with int8 weights
    loop, reference = trt.step_loop(held, 2), ort.step_loop(truth, 2)
    for t in range(16, 20):
        found, meant = loop.step(ids[:, t : t + 1]), reference.step(ids[:, t : t + 1])
        assert relative(found, meant) < 3e-2
    arrays = trt.state_to_numpy(held)
    assert not any(name.startswith("ssm_scale") for name in arrays)
    again = trt.state_to_numpy(trt.state_from_numpy(arrays))
    assert all(np.allclose(again[name], value, rtol=2e-2, atol=1e-6) for name, value in arrays.items())
    assert verify(bundle, runtime="tensorrt").ok
