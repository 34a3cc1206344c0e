"""The ONNX Runtime library against the references, on random shapes, and in whole models against the goldens.

It is built here, which needs ONNX Runtime's headers: set ONNXRUNTIME_ROOT to an unpacked release archive. The ops are
run from ``tensorrt-10.3`` graphs, which have no function bodies: nothing but the library can compute them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mamba_export.plugins import ort_library

from mamba_export import Bundle
from mamba_export.errors import EnvironmentProblem
from mamba_export.ops import DOMAIN
from mamba_export.runtime import OrtRunner
from tests.ops.onnx_runs import lower_op, node_inputs, sample_model
from tests.ops.oracle import assert_closed_form, assert_ragged
from tests.ops.samples import KINDS, Kind, Sample, examples, ragged_samples, run, samples

Array = np.ndarray[Any, Any]
F32 = 2e-5  # the bound of the function bodies; on usual inputs the kernels stay below 1e-6
TYPES = {torch.float16: (ir.DataType.FLOAT16, 2.0**-10), torch.bfloat16: (ir.DataType.BFLOAT16, 2.0**-7)}
MODELS = ("mamba1-tiny", "mamba1-small", "mamba2-small")
by_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The library, built in this test run or, in a test run that it starts, before."""
    built = os.environ.get(ort_library.ENVIRONMENT_VARIABLE)
    if built:
        yield Path(built)
        return
    try:
        headers = ort_library.find_headers()
    except EnvironmentProblem as problem:
        pytest.skip(f"NOT TESTED, the ONNX Runtime library: {problem} ({problem.hint})")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        assert ort_library.find() is None
        made = ort_library.build(headers)
        assert not made.cached and ort_library.build(headers).cached
        assert ort_library.find() == Path(made.path)
        yield Path(made.path)


def session(model: bytes | str, library: Path, threads: int = 1, profile: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    ort_library.register(options, library)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_op(
    library: Path,
    sample: Sample,
    lens: torch.Tensor | None = None,
    step: bool = False,
    threads: int = 1,
    target: str = "tensorrt-10.3",
) -> tuple[Array, Array]:
    model = lower_op(sample_model(sample, lens, step), target)
    feed = {f"x{i}": tensor.numpy() for i, tensor in enumerate(node_inputs(sample, lens))}
    y, present = session(ir.to_proto(model).SerializeToString(), library, threads).run(["y", "present"], feed)
    return y, present


@by_kind
@given(data=st.data())
@examples(25)
def test_prefill_on_random_shapes(library: Path, kind: Kind, data: st.DataObject) -> None:
    sample = data.draw(samples(kind))
    assert_closed_form(run_op(library, sample), sample, F32, F32)


@by_kind
@given(data=st.data())
@examples(15)
def test_steps_on_random_shapes(library: Path, kind: Kind, data: st.DataObject) -> None:
    sample = data.draw(samples(kind, max_length=1, reverse=False))
    assert_closed_form(run_op(library, sample, step=True), sample, F32, F32)


@by_kind
@given(data=st.data())
@examples(25)
def test_poisoned_padding_touches_nothing(library: Path, kind: Kind, data: st.DataObject) -> None:
    sample, lens = data.draw(ragged_samples(kind))
    assert_ragged(run_op(library, sample, lens), sample, lens)


def large_sample(kind: Kind, length: int, inner: tuple[int, ...], groups: int, d_state: int) -> Sample:
    """Longer than the kernels' chunks, wider than any vector, with the gate."""
    rng = np.random.default_rng(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape)).float()

    if kind == "conv":
        fixed = {"weight": normal(*inner, d_state), "bias": normal(*inner)}
        time = {"x": normal(2, length, *inner)}
        return Sample(kind, time, fixed, normal(2, *inner, d_state - 1), {"activation": True})
    x, dt, bias = ("u", "delta", "delta_bias") if kind == "scan" else ("x", "dt", "dt_bias")
    along = {x: normal(2, length, *inner), dt: normal(2, length, inner[0]) - 2}
    along |= {name: normal(2, length, groups, d_state) for name in ("B", "C")} | {"z": normal(2, length, *inner)}
    A = -torch.exp(normal(inner[0], d_state) if kind == "scan" else normal(inner[0]))
    fixed = {"A": A, "D": normal(inner[0]), bias: normal(inner[0])}
    options = {"softplus": True, "reverse": False, "dt_min": 0.0, "dt_max": 3.0}
    return Sample(kind, along, fixed, normal(2, *inner, d_state), options)


LARGE: list[tuple[Kind, int, tuple[int, ...], int, int]] = [
    ("conv", 131, (70,), 1, 4),
    ("conv", 65, (33,), 1, 3),
    ("scan", 131, (70,), 1, 16),
    ("scan", 64, (66,), 2, 21),
    ("scan", 65, (16,), 1, 64),
    ("ssd", 131, (4, 24), 2, 64),
    ("ssd", 66, (3, 64), 1, 128),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("kind", "length", "inner", "groups", "d_state"), LARGE)
def test_large_shapes_and_threads(
    library: Path, threads: int, kind: Kind, length: int, inner: tuple[int, ...], groups: int, d_state: int
) -> None:
    sample = large_sample(kind, length, inner, groups, d_state)
    assert_closed_form(run_op(library, sample, threads=threads), sample, 2e-6, 2e-6)
    one = sample.piece(0, 1)
    assert_closed_form(run_op(library, one, step=True, threads=threads), one, 2e-6, 2e-6)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("step", [False, True])
@by_kind
@given(data=st.data())
@examples(10)
def test_half_precision(library: Path, kind: Kind, step: bool, dtype: torch.dtype, data: st.DataObject) -> None:
    longest = 1 if step else 9
    sample = data.draw(samples(kind, max_length=longest, reverse=False, extreme=False)).to(dtype)
    if kind == "conv":  # weights and state have the type of the activations there
        halves = {name: value.to(dtype) for name, value in sample.fixed.items()}
        sample = Sample(kind, sample.time, halves, sample.state.to(dtype), sample.options)
    y, present = run(sample)
    type_, tolerance = TYPES[dtype]
    model = lower_op(sample_model(sample, step=step), "tensorrt-10.3")
    inputs = node_inputs(sample)
    floats_at_the_edge(model, type_)
    feed = {f"x{i}": tensor.float().numpy() for i, tensor in enumerate(inputs)}
    found_y, found_present = session(ir.to_proto(model).SerializeToString(), library).run(None, feed)
    np.testing.assert_allclose(found_y, y.float(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found_present, present.float(), rtol=tolerance, atol=1e-5)


def floats_at_the_edge(model: ir.Model, half: ir.DataType) -> None:
    """Casts around the graph: numpy has no bfloat16 to feed."""
    node = next(node for node in model.graph if node.domain == DOMAIN)
    for node_of_first in [n for n in model.graph if n is not node]:
        node.replace_input_with(0, node_of_first.inputs[0])
        model.graph.remove(node_of_first, safe=True)
    for index, value in enumerate(model.graph.inputs):
        if value.dtype == half:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            cast = ir.node("Cast", [value], attributes={"to": int(half)})
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(half), value.shape
            node.replace_input_with(index, cast.outputs[0])
            model.graph.insert_before(node, cast)
    for index, value in enumerate(list(model.graph.outputs)):
        if value.dtype == half:
            cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            cast.outputs[0].name = f"{value.name}_float"
            model.graph.append(cast)
            model.graph.outputs[index] = cast.outputs[0]


@by_kind
def test_a_function_body_does_not_hide_the_library(library: Path, kind: Kind, tmp_path: Path) -> None:
    sample = large_sample(kind, 5, (2, 4) if kind == "ssd" else (8,), 1, 4)
    model = lower_op(sample_model(sample), "tensorrt")
    assert len(model.functions) == 1
    feed = {f"x{i}": tensor.numpy() for i, tensor in enumerate(node_inputs(sample))}
    running = session(ir.to_proto(model).SerializeToString(), library, profile=tmp_path / "profile")
    running.run(None, feed)
    events = json.loads(Path(running.end_profiling()).read_text())
    ran = {event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")}
    assert any(name.startswith("Mamba") for name in ran) and not ran & {"Scan", "Conv", "Exp"}


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "base"])
def test_narrower_instruction_sets(library: Path, isa: str) -> None:
    """The tests of this file's ops once more, in a process that may not use wider vectors."""
    env = {**os.environ, ort_library.ENVIRONMENT_VARIABLE: str(library), "MAMBA_ORT_ISA": isa}
    chosen = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).mamba_ort_isa; "
    chosen += "f.restype = ctypes.c_char_p; print(f().decode())"
    told = subprocess.run(
        [sys.executable, "-c", chosen, str(library)], env=env, capture_output=True, text=True, check=True
    )
    if told.stdout.strip() != isa:
        pytest.skip(f"NOT TESTED, {isa}: this processor has none")
    select = "random_shapes or padding or large or half"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", select, __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def test_wrong_shapes_are_errors(library: Path) -> None:
    sample = large_sample("scan", 5, (8,), 1, 4)
    model = lower_op(sample_model(sample), "tensorrt-10.3")
    for value in model.graph.inputs:
        value.shape = None
    feed = {f"x{i}": tensor.numpy() for i, tensor in enumerate(node_inputs(sample))}
    feed["x7"] = feed["x7"][:, :, :3].copy()
    with pytest.raises(Exception, match=r"MambaSelectiveScan: state has shape \[2, 8, 3\], expected \[2, 8, 4\]"):
        session(ir.to_proto(model).SerializeToString(), library).run(None, feed)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_goldens(
    library: Path,
    name: str,
    make_bundle: Callable[..., Path],
    tiny_checkpoint: Path,
    shared_checkpoint: Callable[[str], Path],
) -> None:
    folder = tiny_checkpoint if name == tiny_checkpoint.name else shared_checkpoint(name)
    bundle = Bundle(make_bundle(ckpt=folder, target="tensorrt"), check=False)
    with np.load(folder / "golden.npz") as golden:
        ids, wanted = golden["input_ids"], golden["logits_last64"].astype(np.float64)
    runner = OrtRunner(bundle, threads=2, library=library)
    cut = ids.shape[1] - 3
    logits, state = runner.prefill(ids[:, :cut], runner.initial_state(1))
    found = [logits]
    for t in range(cut, ids.shape[1]):
        logits, state = runner.step(ids[:, t : t + 1], state)
        found.append(logits)
    last = np.concatenate(found, 1)[:, -wanted.shape[1] :]
    assert np.linalg.norm(last - wanted) / np.linalg.norm(wanted) < 1e-6
    assert np.array_equal(last.argmax(-1), wanted.argmax(-1))


def test_the_runner_finds_a_library_and_can_be_told_not_to(
    library: Path, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``tensorrt-10.3`` graphs change in memory unless the library computes their ops."""
    bundle = Bundle(make_bundle(target="tensorrt-10.3"), check=False)
    changed: list[Path] = []
    monkeypatch.setattr("mamba_export.graph.lower.for_stock_runtime", lambda path, *_: changed.append(path) or b"")
    monkeypatch.setenv(ort_library.ENVIRONMENT_VARIABLE, str(library))
    assert OrtRunner(bundle).step_session is not None and not changed
    with pytest.raises(EnvironmentProblem):
        _ = OrtRunner(bundle, library=None).step_session
    assert changed


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(ort_library.ENVIRONMENT_VARIABLE, raising=False)
    with pytest.raises(EnvironmentProblem, match=r"onnxruntime_c_api\.h\) were not found") as problem:
        ort_library.build(tmp_path)
    assert "ONNXRUNTIME_ROOT" in str(problem.value.hint)
    assert ort_library.find() is None
    monkeypatch.setenv(ort_library.ENVIRONMENT_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(EnvironmentProblem, match=r"none\.so"):
        ort_library.find()
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(EnvironmentProblem, match=r"can't load"):
        ort_library.register(ort.SessionOptions(), text)
