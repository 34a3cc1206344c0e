"""The CUDA half of the ONNX Runtime library: op by op against the references, and whole models against the goldens.

Needs a GPU, onnxruntime-gpu and a library built with ``--cuda``. No node may fall back to the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from mamba_export.plugins import ort_library

from mamba_export import Bundle, quantize
from mamba_export.engine.device import find_device
from mamba_export.runtime import OrtRunner
from tests.ops.onnx_runs import lower_op, node_inputs, sample_model
from tests.ops.oracle import assert_closed_form
from tests.ops.samples import Kind
from tests.plugins.test_ort_library import LARGE, MODELS, large_sample

Array = np.ndarray[Any, Any]

if find_device() is None or "CUDAExecutionProvider" not in ort.get_available_providers():
    pytest.skip("NOT TESTED: ONNX Runtime's CUDA library; no GPU, or no onnxruntime-gpu", allow_module_level=True)


@pytest.fixture(scope="module")
def library() -> Path:
    found = ort_library.find(cuda=True)
    if found is None:
        pytest.skip("NOT TESTED: build it first: python -m mamba_export.plugins.ort_library --cuda")
    return found


@pytest.mark.parametrize(("kind", "length", "inner", "groups", "d_state"), LARGE)
def test_ops(library: Path, kind: Kind, length: int, inner: tuple[int, ...], groups: int, d_state: int) -> None:
    whole = large_sample(kind, length, inner, groups, d_state)
    for sample, step in ((whole, False), (whole.piece(0, 1), True)):
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        ort_library.register(options, library)
        model = ir.to_proto(lower_op(sample_model(sample, None, step), "tensorrt-10.3")).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CUDAExecutionProvider"])
        feed = {f"x{i}": tensor.numpy() for i, tensor in enumerate(node_inputs(sample, None))}
        y, present = session.run(["y", "present"], feed)
        assert_closed_form((y, present), sample, 1e-5, 1e-5)


@pytest.mark.parametrize("fuse_step", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("model", MODELS)
def test_models(
    library: Path,
    model: str,
    fuse_step: bool,
    tiny_checkpoint: Path,
    shared_checkpoint: Callable[[str], Path],
    make_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill, pieces of it, and the greedy text by steps recorded as CUDA graphs, in float32."""
    monkeypatch.setenv(ort_library.ENVIRONMENT_VARIABLE, str(library))
    ckpt = tiny_checkpoint if model == tiny_checkpoint.name else shared_checkpoint(model)
    bundle = make_bundle(ckpt=ckpt, target="tensorrt", **({"fuse_step": True} if fuse_step else {}))
    runner = OrtRunner(Bundle(bundle, check=False), device="cuda")
    with np.load(ckpt / "golden.npz") as data:
        ids, wanted = data["input_ids"], data["logits_last64"]
    head, state = runner.prefill(ids[:, :77], runner.initial_state(1))
    tail, _ = runner.prefill(ids[:, 77:], state)
    found = np.concatenate([head, tail], axis=1)[:, -wanted.shape[1] :]
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 2e-3  # TF32 products
    for case in json.loads((ckpt / "golden_greedy.json").read_text()):
        _, state = runner.prefill(np.array([case["prompt_ids"][:-1]]), runner.initial_state(1))
        loop, token = runner.step_loop(state, 1), case["prompt_ids"][-1]
        for expected in case["greedy_ids"]:
            token = int(loop.step(np.array([[token]]))[0, -1].argmax())
            assert token == expected, case["prompt"]
        rows = np.repeat(np.array([case["prompt_ids"][:9]]), 3, axis=0)  # more than one: of a fused step the chain
        _, state = runner.prefill(rows[:, :-1], runner.initial_state(3))
        together = runner.step_loop(state, 3).step(rows[:, -1:])
        assert np.allclose(together, together[:1], atol=1e-3)
    assert runner.cuda_graph
    assert torch.cuda.is_available()


@pytest.mark.parametrize("kernel", ["fused", "chain"])
@pytest.mark.parametrize("recipe", ["w8a16", "w4a16"])
@pytest.mark.parametrize("model", ["mamba1-small", "mamba2-small"])
def test_packed_integers(
    library: Path,
    model: str,
    recipe: str,
    kernel: str,
    shared_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fused step by a recipe: logits along the golden texts as the function body gives them on the CPU."""
    monkeypatch.setenv(ort_library.ENVIRONMENT_VARIABLE, str(library))
    monkeypatch.setenv("MAMBA_ORT_DECODE", kernel)
    ckpt, file = shared_checkpoint(model), tmp_path / f"{recipe}.yaml"
    rounded = "weights: {method: rtn}\nsmooth: 0\npromote: {bits: 0}\n" if recipe == "w4a16" else ""
    file.write_text(f"extends: {recipe}\n{rounded}")  # int8 head and, by w4a16, int4 layers
    bundle = quantize(ckpt, tmp_path / "out", recipe=file, dtype="fp16", fuse_step=True, verify=False).bundle
    same = total = 0
    for case in json.loads((ckpt / "golden_greedy.json").read_text()):
        logits = []
        for device in ("cpu", "cuda"):
            runner = OrtRunner(bundle, device=device)
            _, state = runner.prefill(np.array([case["prompt_ids"]]), runner.initial_state(1))
            loop = runner.step_loop(state, 1)
            steps = [loop.step(np.array([[token]]))[0, -1].copy() for token in case["greedy_ids"]]
            logits.append(np.stack(steps).astype(np.float64))
        assert np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0]) < 5e-3, case["prompt"]
        same, total = same + int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum()), total + len(logits[0])
    assert same >= 0.99 * total
