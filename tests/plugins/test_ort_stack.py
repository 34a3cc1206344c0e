"""MambaDecodeStack in the ONNX Runtime library, without a GPU: the adapter as it stands over a reference in double.

``stack/`` builds a library whose kernels are ``plugins/tensorrt/tests/stack_reference.cpp``: inputs, states, weights
and attributes have to reach the C interface as the function body has them, and what does not fit has to be refused.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from mamba_export.plugins import ort_library

from mamba_export import Bundle, export_onnx, quantize
from mamba_export.errors import EnvironmentProblem
from mamba_export.fused_step import OP_TYPE
from mamba_export.ops.decode_stack import ATTRIBUTES, decode_stack_reference
from mamba_export.runtime import OrtRunner
from mamba_export.runtime.ort_session import make_session
from tests.graph.test_fuse import CHECKPOINTS, by_model
from tests.make_checkpoints import make_statespaces
from tests.models.traced import traced_once

ROOT = Path(__file__).resolve().parents[2]
HERE, SOURCES = Path(__file__).parent / "stack", ROOT / "plugins" / "onnxruntime" / "src"
REFERENCE = ROOT / "plugins" / "tensorrt" / "tests"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-shared"]
TOLERANCE = {"fp32": 5e-6, "fp16": 5e-3}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``cpu``: computes the op on the CPU; ``cuda``: registers it as the library for GPUs does."""
    try:
        headers = ort_library.find_headers()
    except EnvironmentProblem as problem:
        pytest.skip(f"NOT TESTED, a fused step in the ONNX Runtime library: {problem} ({problem.hint})")
    compiler = shutil.which("g++") or pytest.skip("NOT TESTED, a fused step in the ONNX Runtime library: no g++")
    folder = tmp_path_factory.mktemp("stack")
    include = [f"-I{path}" for path in (SOURCES, REFERENCE, ROOT / "kernels" / "cuda" / "include")]
    sources = [SOURCES / "stack.cpp", SOURCES / "stack_op.cpp", REFERENCE / "stack_reference.cpp", *HERE.glob("*.cpp")]
    built = {}
    for name, flag in (("cpu", []), ("cuda", ["-DSTACK_ON_CUDA"])):
        built[name] = folder / f"lib{name}.so"
        command = [compiler, *FLAGS, *flag, *include, "-isystem", headers, *sources, "-o", built[name]]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Bundle]:
    base = tmp_path_factory.mktemp("bundles")
    made = {}
    with traced_once():
        for name, config in CHECKPOINTS.items():
            ckpt = make_statespaces(base / name, **config)
            for dtype in TOLERANCE:
                out = base / f"{name}-{dtype}"
                made[name, dtype] = export_onnx(ckpt, out, dtype=dtype, fuse_step=True, verify=False).bundle
    return made


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Fused steps by recipes: int8 by rows; int4 in groups, with int8 among it."""
    base, made = tmp_path_factory.mktemp("packed"), {}
    mixed = "weights: {type: int4, group: 32}\nhead: {type: int8}\nlayers: {'*.1.*': {weights: {type: int8}}}"
    for name, text, width in (("mamba1", "extends: w8a16", 128), ("mamba2", mixed, 256)):
        ckpt, recipe = make_statespaces(base / name, **{**CHECKPOINTS[name], "d_model": width}), base / f"{name}.yaml"
        recipe.write_text(text)
        made[name] = quantize(ckpt, base / f"{name}-out", recipe=recipe, fuse_step=True, verify=False).bundle
    return made


def feed_of(bundle: Bundle, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    feed: dict[str, Any] = {"input_ids": rng.integers(0, bundle.spec.vocab_size, (batch, 1))}
    kinds = {"fp32": np.float32, "fp16": np.float16}
    return feed | {s.name: rng.standard_normal((batch, *s.shape)).astype(kinds[s.dtype]) for s in bundle.states}


def open_model(model: onnx.ModelProto, bundle: Bundle, library: Path, **settings: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for name, value in settings.items():
        setattr(options, name, value)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    ort_library.register(options, library)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def step_model(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.file("step.onnx"), load_external_data=False)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@by_model
def test_the_library_and_the_function_body_agree(
    model: str,
    dtype: str,
    batch: int,
    bundles: dict[tuple[str, str], Bundle],
    libraries: dict[str, Path],
    tmp_path: Path,
) -> None:
    check_steps(bundles[model, dtype], batch, libraries["cpu"], tmp_path)


@pytest.mark.parametrize("batch", [1, 3])
@by_model
def test_the_library_takes_packed_integers(
    model: str, batch: int, packed: dict[str, Bundle], libraries: dict[str, Path], tmp_path: Path
) -> None:
    check_steps(packed[model], batch, libraries["cpu"], tmp_path)


def check_steps(bundle: Bundle, batch: int, library: Path, tmp_path: Path) -> None:
    """Some steps by the library and by the function body; the former by one kernel."""
    feed, dtype = feed_of(bundle, batch), bundle.manifest.dtype
    body = make_session(bundle, "step.onnx", library=None)
    node = open_model(
        step_model(bundle),
        bundle,
        library,
        enable_profiling=True,
        profile_file_prefix=str(tmp_path / "profile"),
    )
    wanted, found = feed, feed
    for _ in range(3):  # each from its own states
        answers = [session.run(None, given) for session, given in ((body, wanted), (node, found))]
        for ours, theirs in zip(answers[1], answers[0], strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            error = np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs.astype(np.float64))
            assert error < TOLERANCE[dtype]
        wanted, found = (
            {"input_ids": feed["input_ids"], **dict(zip(list(feed)[1:], answer[1:], strict=True))} for answer in answers
        )
    events = json.loads(Path(node.end_profiling()).read_text())
    assert {e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time")} == {OP_TYPE}


def test_groups_of_B_and_C_and_more_rows_than_tokens(libraries: dict[str, Path]) -> None:
    """What no checkpoint here has: the node alone, all operands fed, against the op's definition."""
    d_model, inner, heads, groups, state, layers, rows = 12, 24, 6, 2, 5, 2, 40
    channels = inner + 2 * groups * state
    layer = [(d_model,), (inner + channels + heads, d_model), (channels, 4), (channels,)]
    layer += [(heads,), (heads,), (heads,), (inner,), (d_model, inner)]
    shapes = [(2, channels, 3), (2, heads, inner // heads, state)] * layers
    shapes += [(rows, d_model), (d_model,), (rows, d_model), *(layer * layers)]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]
    for i in range(layers):  # A
        values[2 * layers + 3 + i * len(layer) + 5].abs_().neg_()
    attributes = {key: default for key, (default, _) in ATTRIBUTES.items()}
    attributes |= {"family": 2, "n_layer": layers, "nheads": heads, "ngroups": groups, "vocab_size": 33}
    ids = torch.tensor([[3], [31]])
    wanted = decode_stack_reference(ids, values[: 2 * layers], values[2 * layers :], attributes)
    names = ["ids", *(f"x{i}" for i in range(len(values)))]
    make, kinds = onnx.helper, [onnx.TensorProto.INT64] + [onnx.TensorProto.FLOAT] * len(values)
    given = [ids, *values]
    inputs = [make.make_tensor_value_info(*row) for row in zip(names, kinds, [v.shape for v in given], strict=True)]
    results = [f"y{i}" for i in range(len(wanted))]
    shown = zip(results, wanted, strict=True)
    outputs = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape) for name, value in shown]
    node = make.make_node(OP_TYPE, names, results, domain="mamba", name="decode_stack", **attributes)
    opsets = [make.make_opsetid("", 20), make.make_opsetid("mamba", 1)]
    model = make.make_model(make.make_graph([node], "step", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    ort_library.register(options, libraries["cpu"])
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=2e-6)


def attribute(model: onnx.ModelProto, name: str, value: int) -> None:
    (found,) = [a for a in model.graph.node[0].attribute if a.name == name]
    found.i = value


def reshape(model: onnx.ModelProto, index: int, dims: list[int]) -> None:
    """Give an input of the node other dimensions, of a graph input or (with as many bytes) of an initializer."""
    name = model.graph.node[0].input[index]
    for value in model.graph.input:
        if value.name == name:
            for dim, size in zip(list(value.type.tensor_type.shape.dim)[1:], dims, strict=True):
                dim.dim_value = size
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.dims[:] = dims


def retype(model: onnx.ModelProto, index: int, kind: int) -> None:
    name = model.graph.node[0].input[index]
    (value,) = [v for v in model.graph.input if v.name == name]
    value.type.tensor_type.elem_type = kind


REFUSALS = {
    "layers": (lambda m: attribute(m, "n_layer", 3), r"has 28 inputs and 5 outputs, .* ask for 40 and 7"),
    "family": (lambda m: attribute(m, "family", 3), r"attribute family = 3\S* is out of range"),
    "rank": (lambda m: attribute(m, "dt_rank", 1), r"attribute dt_rank, the width of dt_proj, is 1, expected"),
    "rows": (lambda m: attribute(m, "vocab_size", 4096), r"embedding has \d+ rows, attribute vocab_size is 4096"),
    "groups": (lambda m: attribute(m, "ngroups", 2), r"attribute ngroups is 2, expected 1"),
    "state": (lambda m: reshape(m, 1, [7, 2]), r"input conv_state_0 has shape \[any, 7, 2\], expected \[any, \d+, 2\]"),
    "state type": (lambda m: retype(m, 2, onnx.TensorProto.FLOAT16), "input ssm_state_0 is float16, expected float32"),
    "conv type": (lambda m: retype(m, 1, onnx.TensorProto.FLOAT16), "input conv_state_0 is float16, expected float32"),
    "ids": (lambda m: retype(m, 0, onnx.TensorProto.INT32), r"int32|INT32"),  # ONNX Runtime itself
}


@pytest.mark.parametrize("case", REFUSALS)
def test_nodes_that_do_not_fit_are_refused_when_a_session_is_made(
    case: str, bundles: dict[tuple[str, str], Bundle], libraries: dict[str, Path]
) -> None:
    change, message = REFUSALS[case]
    bundle = bundles["mamba1", "fp32"]
    model = step_model(bundle)
    change(model)
    with pytest.raises(Exception, match=message) as caught:
        open_model(model, bundle, libraries["cpu"])
    if case != "ids":
        assert "MambaDecodeStack 'decode_stack': " in str(caught.value) and "hint: export without" in str(caught.value)


def test_packed_rows_that_do_not_fit_are_refused(packed: dict[str, Bundle], libraries: dict[str, Path]) -> None:
    for name, value, message in (
        ("group_size", 1, "input embedding has rows of 48 words, expected 112 for 128 values"),
        ("packed_embedding", 0, "input embedding is int32, expected"),
    ):
        model = step_model(packed["mamba1"])
        attribute(model, name, value)
        with pytest.raises(Exception, match=message):
            open_model(model, packed["mamba1"], libraries["cpu"])
    model = step_model(packed["mamba1"])
    attribute(model, "weight_bits", 0)
    with pytest.raises(Exception, match=r"input (embedding|lm_head) is int32, expected float"):
        open_model(model, packed["mamba1"], libraries["cpu"])


def test_weights_that_do_not_fit_are_named(bundles: dict[tuple[str, str], Bundle], libraries: dict[str, Path]) -> None:
    bundle = bundles["mamba2", "fp32"]
    model = step_model(bundle)
    node = model.graph.node[0]
    (tensor,) = [t for t in model.graph.initializer if t.name == node.input[len(node.input) - 1]]
    tensor.dims[:] = list(reversed(tensor.dims))
    with pytest.raises(Exception, match=r"input layers\.1\.out_proj has shape \[\d+, \d+\], expected \[\d+, \d+\]"):
        open_model(model, bundle, libraries["cpu"])


def test_states_of_another_batch_are_errors(bundles: dict[tuple[str, str], Bundle], libraries: dict[str, Path]) -> None:
    bundle = bundles["mamba1", "fp32"]
    model = step_model(bundle)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = f"batch_{value.name}"
    session = open_model(model, bundle, libraries["cpu"])
    feed = feed_of(bundle, 2)
    feed["ssm_state_1"] = feed["ssm_state_1"][:1]
    with pytest.raises(Exception, match=r"'decode_stack': input ssm_state_1 has shape \[1, \d+, \d+\], expected \[2, "):
        session.run(None, feed)


def test_a_kernel_can_be_named(
    bundles: dict[tuple[str, str], Bundle], libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles["mamba1", "fp32"]
    monkeypatch.setenv("MAMBA_ORT_DECODE", "fused")
    session = open_model(step_model(bundle), bundle, libraries["cpu"])
    session.run(None, feed_of(bundle, 1))
    with pytest.raises(Exception, match="the fused kernel takes one row, input_ids has 3"):
        session.run(None, feed_of(bundle, 3))
    monkeypatch.setenv("MAMBA_ORT_DECODE", "chain")
    open_model(step_model(bundle), bundle, libraries["cpu"]).run(None, feed_of(bundle, 3))
    monkeypatch.setenv("MAMBA_ORT_DECODE", "fastest")
    with pytest.raises(Exception, match="MAMBA_ORT_DECODE is 'fastest', not chain or fused"):
        open_model(step_model(bundle), bundle, libraries["cpu"])


def test_a_library_for_gpus_leaves_the_cpu_to_the_function_body(
    bundles: dict[tuple[str, str], Bundle], libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles["mamba1", "fp32"]
    assert [ort_library.serves_cuda(libraries[name]) for name in ("cpu", "cuda")] == [False, True]
    with pytest.raises(Exception, match="computes it on CUDA alone"):
        open_model(step_model(bundle), bundle, libraries["cuda"])
    monkeypatch.setenv(ort_library.ENVIRONMENT_VARIABLE, str(libraries["cuda"]))
    runner = OrtRunner(bundle)
    logits, _ = runner.step(np.array([[1]]), runner.initial_state(1))
    assert logits.shape == (1, 1, bundle.spec.vocab_size)


def test_the_hint_of_the_library_becomes_a_hint(
    bundles: dict[tuple[str, str], Bundle], libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBA_ORT_DECODE", "fastest")
    with pytest.raises(EnvironmentProblem, match=r"can't run step\.onnx: .* not chain or fused") as caught:
        make_session(bundles["mamba1", "fp32"], "step.onnx", library=libraries["cpu"])
    assert "export without --fuse-step" in str(caught.value.hint)
