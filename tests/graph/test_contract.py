"""The bundle contract, section 3 and 4 of the design: names, dtypes, dims, dialects and weights of the graphs."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from mamba_export import Bundle, open_checkpoint
from mamba_export.bundle import CPU_GRAPHS
from mamba_export.targets import TARGETS
from tests.graph.conftest import MakeGraphs

FLOAT, HALF, BFLOAT, INT32, INT64 = (
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16),
    *(TensorProto.INT32, TensorProto.INT64),
)
VOCAB = {"mamba1": 51, "mamba2": 50}
# Rows of both tables: conv channels and d_conv - 1; then the SSM state without the batch.
STATES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "mamba1": ((64, 2), (64, 16)),  # d_inner = 2 * 32, d_conv = 3, d_state = 16
    "mamba2": ((32 + 2 * 2 * 6, 3), (4, 8, 6)),  # d_ssm + 2 groups * d_state; nheads, headdim, d_state
}
LAYERS = 2
CUSTOM = {
    "mamba1": ({"MambaCausalConv1d", "MambaSelectiveScan"}, {"MambaCausalConv1d", "MambaSelectiveStateUpdate"}),
    "mamba2": ({"MambaCausalConv1d", "MambaSsdScan"}, {"MambaCausalConv1d", "MambaSsdStateUpdate"}),
}
by_model = pytest.mark.parametrize("model", STATES)
by_target = pytest.mark.parametrize("target", TARGETS)
by_graph = pytest.mark.parametrize("graph", ["prefill.onnx", "step.onnx"])

Signature = list[tuple[str, int, tuple[int | str, ...]]]


def load(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(bundle.file(name), load_external_data=False)


def signature(values: Any) -> Signature:
    """Name, dtype and shape of graph inputs or outputs."""
    rows: Signature = []
    for value in values:
        kind = value.type.tensor_type
        rows.append((value.name, kind.elem_type, tuple(d.dim_param or d.dim_value for d in kind.shape.dim)))
    return rows


def state_rows(model: str, target: str, conv_dtype: int, prefix: str = "") -> Signature:
    conv, ssm = STATES[model]
    if target == "ort" and len(ssm) == 3:
        ssm = (ssm[0], ssm[2], ssm[1])  # LinearAttention keeps [nheads, d_state, headdim]
    rows: Signature = []
    for i in range(LAYERS):
        rows += [
            (f"{prefix}conv_state_{i}", conv_dtype, ("batch", *conv)),
            (f"{prefix}ssm_state_{i}", FLOAT, ("batch", *ssm)),
        ]
    return rows


@pytest.mark.parametrize(
    ("options", "conv_dtype"),
    [({}, FLOAT), ({"logits": "all", "ragged": True}, FLOAT), ({"dtype": "fp16"}, HALF), ({"dtype": "bf16"}, BFLOAT)],
    ids=["default", "all-ragged", "fp16", "bf16"],
)
@by_target
@by_model
def test_inputs_and_outputs(
    model: str, target: str, options: dict[str, Any], conv_dtype: int, graphs: MakeGraphs
) -> None:
    bundle = graphs(model, target, **options)
    lens: Signature = [("seq_lens", INT32, ("batch",))] if options.get("ragged") else []
    states = state_rows(model, target, conv_dtype)
    presents = state_rows(model, target, conv_dtype, "present_")
    prefill, step = load(bundle, "prefill.onnx").graph, load(bundle, "step.onnx").graph
    last: int | str = "seq" if options.get("logits") == "all" else 1
    assert signature(prefill.input) == [("input_ids", INT64, ("batch", "seq")), *states, *lens]
    assert signature(prefill.output) == [("logits", FLOAT, ("batch", last, VOCAB[model])), *presents]
    assert signature(step.input) == [("input_ids", INT64, ("batch", 1)), *states]
    assert signature(step.output) == [("logits", FLOAT, ("batch", 1, VOCAB[model])), *presents]
    names = {FLOAT: "fp32", HALF: "fp16", BFLOAT: "bf16"}
    table = [(row["name"], row["dtype"], tuple(row["shape"])) for row in bundle.manifest.states]
    assert table == [(name, names[dtype], shape) for name, dtype, shape in states]
    assert [row["present"] for row in bundle.manifest.states] == [name for name, _, _ in presents]


@by_graph
@by_model
def test_portable_is_standard_onnx(model: str, graph: str, graphs: MakeGraphs) -> None:
    bundle = graphs(model, "portable")
    proto = load(bundle, graph)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]
    assert {node.domain for node in every_node(proto.graph)} == {""}
    assert not proto.functions
    for node in every_node(proto.graph):
        assert onnx.defs.has(node.op_type, 20), node.op_type
    onnx.checker.check_model(str(bundle.file(graph)), full_check=True)


@pytest.mark.parametrize("options", [{}, {"logits": "all", "ragged": True}], ids=["default", "all-ragged"])
def test_graphs_for_a_cpu_have_the_same_face(options: dict[str, Any], graphs: MakeGraphs) -> None:
    """Target ort writes a second pair for Mamba-1: other nodes over the same inputs, outputs and weights."""
    bundle = graphs("mamba1", "ort", **options)
    for name, for_cpu in CPU_GRAPHS.items():
        assert bundle.graph(name, "cpu") == bundle.file(for_cpu)
        assert bundle.graph(name, "cuda") == bundle.file(name)
        main, other = load(bundle, name), load(bundle, for_cpu)
        assert signature(other.graph.input) == signature(main.graph.input)
        assert signature(other.graph.output) == signature(main.graph.output)
        assert regions(other) == regions(main)
        assert {o.domain: o.version for o in other.opset_import} == {"": 20, "com.microsoft": 1}
        kinds = [{node.op_type for node in every_node(proto.graph)} for proto in (main, other)]
        assert "LinearAttention" in kinds[0] - kinds[1]


@pytest.mark.parametrize(("model", "target"), [("mamba2", "ort"), ("mamba1", "portable"), ("mamba1", "tensorrt")])
def test_other_bundles_have_one_pair(model: str, target: str, graphs: MakeGraphs) -> None:
    bundle = graphs(model, target)
    assert not set(CPU_GRAPHS.values()) & {path.name for path in bundle.path.iterdir()}
    assert bundle.graph("step.onnx", "cpu") == bundle.file("step.onnx")


@by_graph
@by_model
def test_ort_uses_contrib_ops(model: str, graph: str, graphs: MakeGraphs) -> None:
    proto = load(graphs(model, "ort"), graph)
    domains = {o.domain: o.version for o in proto.opset_import}
    assert domains == {"": 20, "com.microsoft": 1}
    assert {node.domain for node in every_node(proto.graph)} == {"", "com.microsoft"}
    assert not proto.functions


@by_graph
@by_model
def test_tensorrt_keeps_plugin_nodes(model: str, graph: str, graphs: MakeGraphs) -> None:
    with_bodies, without = load(graphs(model, "tensorrt"), graph), load(graphs(model, "tensorrt-10.3"), graph)
    wanted = CUSTOM[model][graph == "step.onnx"]
    for proto in (with_bodies, without):
        custom = [node for node in every_node(proto.graph) if node.domain == "mamba"]
        assert Counter(node.op_type for node in custom) == dict.fromkeys(wanted, LAYERS)
        for node in custom:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes["plugin_namespace"] == b""
            assert attributes["plugin_version"] == b"1"
            assert all(node.input), "TensorRT rejects empty inputs"
        assert {node.domain for node in every_node(proto.graph)} == {"", "mamba"}
        assert {o.domain: o.version for o in proto.opset_import} == {"": 20, "mamba": 1}
    assert {(f.domain, f.name) for f in with_bodies.functions} == {("mamba", name) for name in wanted}
    assert not without.functions
    assert with_bodies.graph.node == without.graph.node
    onnx.checker.check_model(str(graphs(model, "tensorrt").file(graph)), full_check=True)


@by_target
@by_model
def test_weights_are_shared_and_lie_once(
    model: str, target: str, graphs: MakeGraphs, checkpoints: dict[str, Path]
) -> None:
    bundle = graphs(model, target)
    prefill, step = (regions(load(bundle, name)) for name in ("prefill.onnx", "step.onnx"))
    assert prefill == step
    spans = sorted(prefill.values())
    for (offset, length), (following, _) in itertools.pairwise(spans):
        assert offset + length <= following
    data = bundle.file("weights.bin").read_bytes()
    assert sum(spans[-1]) == len(data)
    with open_checkpoint(checkpoints[model]) as checkpoint:
        zero_biases = sum(
            length for name, (_, length) in prefill.items() if name not in checkpoint.tensors and "conv1d.bias" in name
        )
        assert sum(length for _, length in spans) == 4 * checkpoint.n_parameters + zero_biases
    contents = [data[offset : offset + length] for offset, length in spans]
    trained = [content for content in contents if any(content)]
    assert len(set(trained)) == len(trained), "no tensor twice"


@by_target
@by_model
def test_graphs_hold_no_weights(model: str, target: str, graphs: MakeGraphs) -> None:
    for name in ("prefill.onnx", "step.onnx"):
        proto = load(graphs(model, target), name)
        assert proto.ByteSize() < 150_000
        for node in every_node(proto.graph):
            for attribute in node.attribute:
                assert attribute.t.ByteSize() < 1000, f"{node.name} holds a constant"


@by_target
def test_manifest_counts_nodes(target: str, graphs: MakeGraphs) -> None:
    bundle = graphs("mamba1", target)
    assert {f"{kind}.onnx" for kind in bundle.manifest.nodes} == {p.name for p in bundle.path.glob("*.onnx")}
    for kind in bundle.manifest.nodes:
        proto = load(bundle, f"{kind}.onnx")
        assert bundle.manifest.nodes[kind] == dict(Counter(node.op_type for node in proto.graph.node))


def every_node(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of the graphs in their attributes."""
    nodes = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            nodes += every_node(attribute.g) if attribute.HasField("g") else []
    return nodes


def regions(proto: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Parameter → offset and length in weights.bin. Shapes and scalars that are no parameters stay in the graph."""
    found = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            assert len(tensor.raw_data) <= 64, tensor.name
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        assert entry["location"] == "weights.bin"
        found[tensor.name] = (int(entry["offset"]), int(entry["length"]))
    return found
