"""One-op ONNX models, lowered as the exporter lowers them and run in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from mamba_export.graph.lower import LowerOpsPass
from mamba_export.graph.trace import OPSET
from mamba_export.ops import DOMAIN, VERSION
from mamba_export.targets import Target, get_target
from tests.ops.samples import OP_TYPES, STEP_TYPES, Sample

Array = np.ndarray[Any, Any]
_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int32: ir.DataType.INT32,
}


def node_inputs(sample: Sample, seq_lens: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The dense inputs of the op's node, in order: what is absent is left out."""
    optional = [v for v in (sample.time.get("z"), seq_lens) if v is not None]
    if sample.kind == "conv":
        return [sample.time["x"], *sample.fixed.values(), sample.state, *optional]
    first, dt, B, C = list(sample.time.values())[:4]
    A, D, bias = sample.fixed.values()
    return [first, dt, A, B, C, D, bias, sample.state, *optional]


def node_attributes(sample: Sample, step: bool, ragged: bool) -> dict[str, Any]:
    """The node's attributes."""
    o = sample.options
    if sample.kind == "conv":
        return {"activation": int(o["activation"]), "ragged": int(ragged)}
    attributes: dict[str, Any] = {"has_z": int("z" in sample.time)}
    if sample.kind == "scan":
        attributes["delta_softplus"] = int(o["softplus"])
    else:
        attributes.update(dt_softplus=int(o["softplus"]), dt_min=float(o["dt_min"]), dt_max=float(o["dt_max"]))
    return attributes if step else {**attributes, "reverse": int(o["reverse"]), "ragged": int(ragged)}


def make_model(op_type: str, inputs: list[torch.Tensor], shapes: list[list[int | str]], **attributes: Any) -> ir.Model:
    """A graph of one node with two outputs; names in ``shapes`` are dynamic dims."""
    values = [
        ir.Value(name=f"x{i}", type=ir.TensorType(_DTYPES[tensor.dtype]), shape=ir.Shape(shape))
        for i, (tensor, shape) in enumerate(zip(inputs, shapes, strict=True))
    ]
    attrs = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    # A body may hand its first input on as an output; in a real graph that input is some node's result.
    first = ir.Node("", "Identity", values[:1], name="first")
    first.outputs[0].name, first.outputs[0].type, first.outputs[0].shape = "x", values[0].type, values[0].shape
    node = ir.Node(DOMAIN, op_type, [*first.outputs, *values[1:]], attrs, num_outputs=2, name="node")
    for output, name in zip(node.outputs, ("y", "present"), strict=True):
        output.name = name
    opsets = {"": OPSET, DOMAIN: VERSION}
    graph = ir.Graph(values, node.outputs, nodes=[first, node], opset_imports=opsets, name=op_type)
    return ir.Model(graph, ir_version=10)


def sample_model(sample: Sample, seq_lens: torch.Tensor | None = None, step: bool = False) -> ir.Model:
    """The graph that computes the sample's op: batch is dynamic, and the sequence unless ``step``."""
    inputs = node_inputs(sample, seq_lens)
    along_time = {id(value) for value in sample.time.values()}
    shapes: list[list[int | str]] = [list(tensor.shape) for tensor in inputs]
    for tensor, shape in zip(inputs, shapes, strict=True):
        if id(tensor) in along_time:
            shape[:2] = ["batch", 1 if step else "seq"]
        elif tensor is sample.state or tensor is seq_lens:
            shape[0] = "batch"
    op_type = (STEP_TYPES if step else OP_TYPES)[sample.kind]
    model = make_model(op_type, inputs, shapes, **node_attributes(sample, step, seq_lens is not None))
    state = next(i for i, tensor in enumerate(inputs) if tensor is sample.state)
    for output, like in zip(model.graph.outputs, (0, state), strict=True):
        output.type, output.shape = ir.TensorType(_DTYPES[inputs[like].dtype]), ir.Shape(shapes[like])
    return model


def find_target(name: str) -> Target:
    """A target by name; ``ort-cpu`` is what ``ort`` writes for CPUs beside its main graphs."""
    if name != "ort-cpu":
        return get_target(name)
    target = get_target("ort")
    assert target.cpu_flavour is not None
    return dataclasses.replace(target, flavour=target.cpu_flavour)


def lower_op(model: ir.Model, target: str) -> ir.Model:
    """The model in the dialect of ``target``."""
    found = find_target(target)
    LowerOpsPass(found)(model)
    if found.flavour != "portable":
        model.graph.opset_imports["com.microsoft"] = 1
    if not found.plugins:
        del model.opset_imports[DOMAIN]
    return model


@functools.lru_cache(maxsize=1)
def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def run_model(model: ir.Model, inputs: list[torch.Tensor]) -> tuple[Array, Array]:
    """Outputs y and present of a one-op model."""
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), _options(), providers=["CPUExecutionProvider"]
    )
    feed = {f"x{i}": tensor.numpy() for i, tensor in enumerate(inputs)}
    y, present = session.run(["y", "present"], feed)
    return y, present


def run_onnx(
    sample: Sample, target: str, seq_lens: torch.Tensor | None = None, step: bool = False
) -> tuple[Array, Array]:
    """The sample's op through ``target`` in ONNX Runtime; states in the layout of the torch op."""
    inputs = node_inputs(sample, seq_lens)
    model = lower_op(sample_model(sample, seq_lens, step), target)
    if sample.kind != "ssd" or find_target(target).ssm_layout == "PN":
        return run_model(model, inputs)
    inputs[7] = inputs[7].transpose(2, 3).contiguous()
    batch, heads, headdim, d_state = model.graph.inputs[7].shape
    model.graph.inputs[7].shape = model.graph.outputs[1].shape = ir.Shape([batch, heads, d_state, headdim])
    y, present = run_model(model, inputs)
    return y, present.swapaxes(2, 3)
