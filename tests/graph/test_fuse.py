"""``fuse_step``: the step graph as one node, the same model in ONNX Runtime and in the op's reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mamba_export import Bundle, export_onnx, open_checkpoint
from mamba_export.errors import UsageError
from mamba_export.fused_step import OP_TYPE, parameter_names
from mamba_export.models.weights import load_model
from mamba_export.ops.decode_stack import SCHEMA, attributes_of_spec, decode_stack_reference
from mamba_export.states import state_table
from tests.make_checkpoints import make_statespaces
from tests.models.traced import traced_once

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "mamba1": {"vocab_size": 51, "ssm_cfg": {"d_conv": 3}},
    "mamba2": {
        "tie_embeddings": False,
        "residual_in_fp32": False,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 1},
    },
}
by_model = pytest.mark.parametrize("model", CHECKPOINTS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    return {name: make_statespaces(base / name, **config) for name, config in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Bundle]:
    base = tmp_path_factory.mktemp("bundles")
    with traced_once():
        return {
            (name, fuse): export_onnx(path, base / f"{name}-{fuse}", fuse_step=fuse).bundle
            for name, path in checkpoints.items()
            for fuse in (False, True)
        }


def step(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.file("step.onnx"), load_external_data=False)


@by_model
def test_one_node_and_everything_else_as_it_was(model: str, bundles: dict[tuple[str, bool], Bundle]) -> None:
    plain, fused = step(bundles[model, False]), step(bundles[model, True])
    (node,) = fused.graph.node
    assert (node.op_type, node.domain) == (OP_TYPE, "mamba")
    assert bundles[model, True].manifest.nodes["step"] == {OP_TYPE: 1}
    for values in ("input", "output"):
        a, b = (getattr(m.graph, values) for m in (plain, fused))
        assert [(v.name, v.type) for v in a] == [(v.name, v.type) for v in b]
    names = parameter_names(bundles[model, True].spec)
    weights = [
        {t.name: (t.data_type, tuple(t.dims)) for t in m.graph.initializer if t.name in names} for m in (plain, fused)
    ]
    assert weights[0] == weights[1]
    assert {t.name for t in fused.graph.initializer} == set(names)
    assert {"plugin_namespace", "plugin_version"} <= {a.name for a in node.attribute}
    assert list(node.output) == [o.name for o in fused.graph.output]
    body = next(f for f in fused.functions if f.name == OP_TYPE)
    assert len(body.node) >= len(plain.graph.node)
    kept, manifests = ("target", "dtype", "states", "spec"), [bundles[model, f].manifest for f in (False, True)]
    assert all(getattr(manifests[0], k) == getattr(manifests[1], k) for k in kept)


@by_model
def test_the_node_is_of_its_schema(model: str, bundles: dict[tuple[str, bool], Bundle]) -> None:
    (node,) = step(bundles[model, True]).graph.node
    spec = bundles[model, True].spec
    assert SCHEMA.name == OP_TYPE
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert {k: pytest.approx(v) for k, v in attributes_of_spec(spec).items()}.items() <= found.items()
    assert set(SCHEMA.attributes) == set(attributes_of_spec(spec))
    states = [s.name for s in state_table(spec, "fp32")]
    assert list(node.input) == ["input_ids", *states, *parameter_names(spec)]


@by_model
def test_onnx_runtime_and_the_reference_agree(
    model: str, checkpoints: dict[str, Path], bundles: dict[tuple[str, bool], Bundle]
) -> None:
    import onnxruntime

    spec = bundles[model, True].spec
    sessions = [
        onnxruntime.InferenceSession(str(bundles[model, fuse].file("step.onnx")), providers=["CPUExecutionProvider"])
        for fuse in (False, True)
    ]
    rng = np.random.default_rng(7)
    feed: dict[str, Any] = {"input_ids": rng.integers(0, spec.vocab_size, (3, 1))}
    feed |= {s.name: rng.standard_normal((3, *s.shape), np.float32) for s in state_table(spec, "fp32")}
    plain, fused = (session.run(None, feed) for session in sessions)
    with open_checkpoint(checkpoints[model]) as checkpoint:
        parameters = dict(load_model(checkpoint, "fp32", step=True).named_parameters())
    with torch.no_grad():
        reference = decode_stack_reference(
            torch.from_numpy(feed["input_ids"]),
            [torch.from_numpy(feed[s.name]) for s in state_table(spec, "fp32")],
            [parameters[name] for name in parameter_names(spec)],
            attributes_of_spec(spec),
        )
    for ours, theirs, exact in zip(fused, plain, reference, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours, exact.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["ort", "portable", "tensorrt-10.3"])
def test_targets_without_function_bodies_are_refused(target: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no place for a fused step"):
        export_onnx(checkpoints["mamba1"], tmp_path / "out", target=target, fuse_step=True)


def test_models_that_the_op_does_not_cover_are_refused(tmp_path: Path) -> None:
    ckpt = make_statespaces(tmp_path / "mlp", d_intermediate=24)
    with pytest.raises(UsageError, match="an MLP"):
        export_onnx(ckpt, tmp_path / "out", fuse_step=True)
    assert not (tmp_path / "out").exists()
