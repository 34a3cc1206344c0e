"""Quantized bundles: every recipe and target, sizes, the torch model against the graphs, states, and the engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from mamba_export.calibration import simulate
from mamba_export.calibration.statistics import load_statistics

from mamba_export import OrtRunner, export_onnx, generate, perplexity, quantize
from mamba_export.bundle import STEP, WEIGHTS, Bundle
from mamba_export.checkpoint import open_checkpoint
from mamba_export.verification.report import TOLERANCES
from tests.calibration.conftest import MakeQuantized

RECIPES = ["w8a16", "w8a8", "w4a16-g128", "w4a16-g32", "w4a8", "fp8"]


CASES = [(recipe, "ort") for recipe in RECIPES]
CASES += [
    ("w8a8", "tensorrt"),
    ("w4a8", "tensorrt"),
    ("fp8", "tensorrt"),
    ("w8a8", "portable"),
    ("w4a16-g32", "portable"),
]


@pytest.mark.parametrize(("recipe", "target"), CASES)
def test_every_recipe_gives_a_verified_bundle(make_quantized: MakeQuantized, recipe: str, target: str) -> None:
    bundle = Bundle(make_quantized(recipe=recipe, target=target))
    assert bundle.manifest.verification is not None and bundle.manifest.verification["ok"]
    assert bundle.manifest.verification["tolerance"] == dataclasses.asdict(TOLERANCES["quantized"])
    assert bundle.manifest.quantization is not None and bundle.manifest.quantization["name"] == recipe
    assert bundle.manifest.opset == 21


@pytest.mark.parametrize(
    ("recipe", "ops"),
    [
        ("w8a16", {"MatMulNBits", "GatherBlockQuantized"}),
        ("w4a16-g32", {"MatMulNBits", "GatherBlockQuantized"}),
        ("w8a8", {"QuantizeLinear", "DequantizeLinear", "MatMulNBits"}),
        ("w4a8", {"QuantizeLinear", "DequantizeLinear", "MatMulNBits"}),
    ],
)
def test_graphs_for_onnx_runtime_use_its_fast_kernels(
    make_quantized: MakeQuantized, recipe: str, ops: set[str]
) -> None:
    bundle = Bundle(make_quantized(recipe=recipe))
    assert ops <= set(bundle.manifest.nodes["step"])
    assert "FusedMatMul" not in bundle.manifest.nodes["step"]


def test_integers_are_stored_as_such(make_quantized: MakeQuantized) -> None:
    kinds = {
        ("w8a8", "tensorrt"): onnx.TensorProto.INT8,
        ("w4a16-g32", "tensorrt"): onnx.TensorProto.INT4,
        ("w4a16-g32", "ort"): onnx.TensorProto.UINT8,
        ("fp8", "tensorrt"): onnx.TensorProto.FLOAT8E4M3FN,
    }
    for (recipe, target), kind in kinds.items():
        path = make_quantized(recipe=recipe, target=target)
        graph = onnx.load(path / STEP, load_external_data=False).graph
        stored = {i.name: i.data_type for i in graph.initializer}
        assert stored["backbone.layers.2.mixer.in_proj.weight.q"] == kind


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_int8_weights_for_onnx_runtime_have_their_zero_points(make_quantized: MakeQuantized, dtype: str) -> None:
    """And bundles of them open: in float16 they stay DequantizeLinear, on a CPU without VNNI of unsigned bytes."""
    graph = onnx.load(make_quantized(recipe="w8a8", dtype=dtype) / STEP, load_external_data=False).graph
    stored = {i.name: i for i in graph.initializer}
    rows = [n.input for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    assert len(rows) == 3 * 6 and len({zero for _, _, zero in rows}) == len(rows)
    for _, scale, zero in rows:
        assert stored[zero].data_type == onnx.TensorProto.INT8 and stored[zero].dims == stored[scale].dims


@pytest.mark.parametrize(
    ("recipe", "ratio"), [("w8a16", 0.52), ("w8a8", 0.52), ("w4a16-g128", 0.28), ("w4a16-g32", 0.31), ("w4a8", 0.30)]
)
def test_linear_layers_shrink_as_promised(make_quantized: MakeQuantized, recipe: str, ratio: float) -> None:
    path = make_quantized(recipe=recipe)
    graph = onnx.load(path / STEP, load_external_data=False).graph
    linear = [i for i in graph.initializer if "proj.weight" in i.name or "proj.smooth" in i.name]
    stored = sum(int(e.value) for i in linear for e in i.external_data if e.key == "length")
    spec = Bundle(path).spec
    values = spec.d_model * spec.d_in_proj + spec.d_inner * (spec.dt_rank + 2 * spec.d_state)
    values += spec.dt_rank * spec.d_inner + spec.d_inner * spec.d_model
    assert stored / (2 * values * spec.n_layer) <= ratio


def test_a_tied_table_is_stored_once(make_quantized: MakeQuantized, make_bundle: Callable[..., Path]) -> None:
    half = (make_bundle(dtype="fp16") / WEIGHTS).stat().st_size
    assert (make_quantized(recipe="w8a16") / WEIGHTS).stat().st_size < 0.56 * half


@pytest.mark.parametrize("recipe", ["w8a16", "w8a8", "w4a8"])
def test_the_simulated_model_has_the_perplexity_of_the_graphs(
    make_quantized: MakeQuantized, tiny_checkpoint: Path, token_file: Path, statistics_file: Path, recipe: str
) -> None:
    import torch

    from mamba_export.states import state_table

    ids = np.fromfile(token_file, "<u2").astype(np.int64)[:1025]
    found = perplexity(make_quantized(recipe=recipe), ids, window=256).perplexity
    with open_checkpoint(tiny_checkpoint) as checkpoint, torch.inference_mode():
        model = simulate(checkpoint, recipe, load_statistics(statistics_file), blocks=True)
        rows = torch.from_numpy(np.stack([ids[i : i + 257] for i in range(0, 1024, 256)]))
        states = [torch.zeros(4, *s.shape) for s in state_table(checkpoint.spec, "fp32")]
        logits = model(rows[:, :-1], states)[0]
        wanted = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).exp())
    assert abs(found / wanted - 1) < 4e-3  # a thousand tokens; the full measurement is benchmarks/quantization.py


@pytest.mark.parametrize("state", ["int8", "fp16"])
@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_narrow_states_keep_the_contract(make_quantized: MakeQuantized, state: str, target: str) -> None:
    bundle = Bundle(make_quantized(recipe="w8a16", state=state, target=target))
    rows = {row["name"]: row for row in bundle.manifest.states}
    assert rows["ssm_state_0"]["dtype"] == state and ("ssm_scale_0" in rows) == (state == "int8")
    runner = OrtRunner(bundle, threads=1)
    ids = np.arange(40, dtype=np.int64)[None] + 5
    _, whole = runner.prefill(ids, runner.initial_state(1))
    _, part = runner.prefill(ids[:, :17], runner.initial_state(1))
    for t in range(17, 40):
        _, part = runner.step(ids[:, t : t + 1], part)
    assert set(whole) == set(rows)
    a, b = runner.state_to_numpy(whole), runner.state_to_numpy(part)
    assert "ssm_scale_0" not in a
    for name, value in a.items():
        assert np.linalg.norm(value.astype(np.float64) - b[name]) < 0.06 * np.linalg.norm(value) + 1e-6, name
    back = runner.state_from_numpy(a)
    np.testing.assert_allclose(runner.state_to_numpy(back)["ssm_state_3"], a["ssm_state_3"], rtol=1e-6, atol=0)


def test_a_conversation_moves_between_bundles_of_any_state(make_quantized: MakeQuantized, tiny_bundle: Path) -> None:
    narrow = make_quantized(recipe="w8a16", state="int8")
    first = generate(narrow, "def read_file(path):", max_tokens=8, keep_state=True)
    assert len(first.token_ids) == 8 and first.snapshot is not None
    for bundle in (narrow, tiny_bundle):
        assert len(generate(bundle, resume=first.snapshot, max_tokens=4).token_ids) == 4


def test_untied_heads_and_mamba2_quantize_too(shared_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from mamba_export import calibrate

    ckpt = shared_checkpoint("mamba2-small")
    ids = np.random.default_rng(0).integers(0, 4096, 600)
    calibrate(ckpt, ids, tmp_path / "calib", windows=4, length=64)
    for recipe, state in (("w4a8", "int8"), ("w8a8", None)):
        result = quantize(
            ckpt, tmp_path / recipe, recipe=recipe, calibration=tmp_path / "calib", target="ort", state=state
        )
        assert result.verification is not None and result.verification.ok


def test_a_recipe_of_ones_own_leaves_parts_in_float(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: w8a16\nhead: {type: float}\nlayers:\n  'backbone.layers.[0-4].*': {weights: {type: float}}\n"
    )
    bundle = quantize(tiny_checkpoint, tmp_path / "out", recipe=path, target="ort").bundle
    assert bundle.manifest.nodes["step"]["MatMulNBits"] == 4
    assert bundle.manifest.nodes["step"]["FusedMatMul"] == 5 * 4 + 1


def test_float16_and_ragged_graphs_quantize_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = quantize(tiny_checkpoint, tmp_path / "out", recipe="w8a16", dtype="fp16", ragged=True)
    assert result.verification is not None and result.verification.ok


def test_the_same_bundle_twice(tiny_checkpoint: Path, statistics_file: Path, tmp_path: Path) -> None:
    hashes = set()
    for name in ("a", "b"):
        options = {"recipe": "w4a16", "calibration": statistics_file, "target": "ort", "verify": False}
        bundle = quantize(tiny_checkpoint, tmp_path / name, **options).bundle  # type: ignore[arg-type]
        hashes.add(bundle.manifest.files[WEIGHTS]["sha256"])
    assert len(hashes) == 1


def test_an_export_is_not_a_quantization(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_onnx(tiny_checkpoint, tmp_path / "out", target="ort", verify=False).bundle
    assert bundle.manifest.quantization is None and bundle.manifest.opset == 20
