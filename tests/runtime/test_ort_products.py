"""Integer products are exact on CPUs that would saturate, and other CPUs keep their fast ones."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mamba_export.bundle import STEP, Bundle
from mamba_export.runtime import ort_products
from mamba_export.runtime.ort_session import make_session
from tests.conftest import MakeBundle

ROWS, DEPTH, SCALE = 16, 8, 0.5
RECIPES = {
    "inputs": {"inputs": {"type": "int8"}},
    "inputs of some": {"inputs": {"type": "float"}, "layers": {"*.in_proj": {"inputs": {"type": "int8"}}}},
}
FLOAT_INPUTS = {"inputs": {"type": "float"}, "layers": {"*.in_proj": {"weights": {"type": "int4"}}}, "state": "int8"}
ENTRIES = {
    ("ort", False): {"session.x64quantprecision": "1"},
    ("ort", True): {"session.x64quantprecision": "1"},
    ("portable", False): {"session.disable_quant_qdq": "1"},
    ("tensorrt", True): {"session.disable_quant_qdq": "1", "session.disable_qdq_constant_folding": "1"},
}


def with_inputs(path: Path) -> Bundle:
    """The bundle, saying that inputs are int8."""
    bundle = Bundle(path, check=False)
    bundle.manifest.quantization = RECIPES["inputs"]
    return bundle


def large_products(zero_points: bool) -> bytes:
    """``y``: the largest int8 inputs times the largest int8 weights, as w8a8 graphs write them; ``z``: float inputs."""
    constants = {
        "scale": np.array(SCALE, np.float32),
        "zero": np.array(0, np.int8),
        "scales": np.full(ROWS, SCALE, np.float32),
        **{name: np.full((ROWS, DEPTH), 127, np.int8) for name in ("w", "v")},
        **{f"{name}.zero": np.zeros(ROWS, np.int8) for name in ("w", "v") if zero_points},
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["rounded"]),
    ]
    for x, w, y in (("rounded", "w", "y"), ("x", "v", "z")):
        given = [w, "scales", *([f"{w}.zero"] if zero_points else [])]
        nodes.append(helper.make_node("DequantizeLinear", given, [f"{w}.wide"], axis=0))
        nodes.append(helper.make_node("Transpose", [f"{w}.wide"], [f"{w}.turned"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [x, f"{w}.turned"], [y]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", DEPTH])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", ROWS]) for name in "yz"]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "large products", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("target", ["ort", "portable", "tensorrt"])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_largest_products_are_exact(rows: int, target: str, low_memory: bool, make_bundle: MakeBundle) -> None:
    if not ort_products.saturates():
        pytest.skip("NOT TESTED: integer products where they saturate; this CPU's do not (it has VNNI, or is no x86)")
    bundle = with_inputs(make_bundle(target=target))
    model = large_products(bundle.target.contrib)
    session = make_session(bundle, STEP, threads=1, library=None, low_memory=low_memory, change=lambda _: model)
    x = np.full((rows, DEPTH), 127 * SCALE, np.float32)
    for found in session.run(["y", "z"], {"x": x}):
        np.testing.assert_allclose(found, np.full((rows, ROWS), DEPTH * (127 * SCALE) ** 2), rtol=1e-5)


@pytest.mark.parametrize(("target", "low_memory"), ENTRIES)
def test_each_dialect_is_opened_in_its_way(
    target: str, low_memory: bool, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_inputs(make_bundle(target=target))
    monkeypatch.setattr(ort_products, "saturates", lambda: True)
    assert ort_products.exact_products(bundle, low_memory) == ENTRIES[target, low_memory]
    monkeypatch.setattr(ort_products, "saturates", lambda: False)
    assert ort_products.exact_products(bundle, low_memory) == {}


def test_only_int8_inputs_make_integer_products(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_products, "saturates", lambda: True)
    bundle = Bundle(tiny_bundle, check=False)
    for recipe, rounds in [(None, False), (FLOAT_INPUTS, False), *((recipe, True) for recipe in RECIPES.values())]:
        bundle.manifest.quantization = recipe
        assert bundle.integer_inputs == bool(ort_products.exact_products(bundle)) == rounds


def test_the_cpu_is_asked_and_its_flags_agree() -> None:
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        pytest.skip("NOT TESTED: what this CPU saturates, against its flags; it is no x86, or Linux does not list them")
    flags = set(info.read_text(encoding="utf-8").partition("\nflags")[2].partition("\n")[0].split())
    exact = flags & {"avx_vnni", "avx512_vnni", "amx_int8"}
    assert ort_products.saturates() == ("avx2" in flags and not exact)
