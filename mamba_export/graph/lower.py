"""Lower a traced graph to a target: replace ops by bodies, or keep them as plugin nodes with function bodies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mamba_export.graph.passes import FoldConstantsPass, FoldReshapesPass, FuseLinearPass, WidenPass, replace_node
from mamba_export.graph.quant import QuantizePass
from mamba_export.graph.trace import OPSET
from mamba_export.ops import DOMAIN, OPS, OpDef
from mamba_export.ops.builder import Builder
from mamba_export.spec import ModelSpec
from mamba_export.states import StateType, state_table
from mamba_export.targets import Target, get_target

# What TensorRT's parser reads on a node to find its plugin (namespace "" and version "1").
_SSM_TYPES: dict[ir.DataType | None, StateType] = {ir.DataType.FLOAT16: "fp16", ir.DataType.INT8: "int8"}
PLUGIN_ATTRIBUTES = {"plugin_namespace": "", "plugin_version": "1"}


def lower_for_cpu(
    model: ir.Model, spec: ModelSpec, dtype: str, target: Target, quantize: QuantizePass | None = None
) -> ir.Model | None:
    """A copy of the traced ``model``, lowered to the target's CPU flavour; None where that makes no difference."""
    if target.cpu_flavour is None:
        return None
    ops = [OPS[node.op_type] for node in model.graph if node.domain == DOMAIN]
    if all(op.body(target.cpu_flavour) is op.body(target.flavour) for op in ops):
        return None
    return lower(model.clone(), spec, dtype, dataclasses.replace(target, flavour=target.cpu_flavour), quantize)


def lower(
    model: ir.Model, spec: ModelSpec, dtype: str, target: Target, quantize: QuantizePass | None = None
) -> ir.Model:
    """The traced ``model`` in the dialect of ``target``, quantized if asked; changed in place and returned."""
    passes: list[ir.passes.PassBase] = [LowerOpsPass(target), FoldReshapesPass()]
    if quantize is not None:
        passes.append(quantize)
    if target.contrib:
        passes.append(FuseLinearPass())
    passes += [FoldConstantsPass(), ir.passes.common.RemoveUnusedNodesPass()]
    ir.passes.Sequential(*passes)(model)
    _set_state_shapes(model, spec, dtype, target)
    used = {node.domain for node in model.graph}
    for domain in [d for d in model.opset_imports if d not in used | {""}]:
        del model.opset_imports[domain]
    if "com.microsoft" in used:
        model.opset_imports["com.microsoft"] = 1
    return model


def _set_state_shapes(model: ir.Model, spec: ModelSpec, dtype: str, target: Target) -> None:
    """State inputs and outputs get the shapes of the target's state table."""
    values = {v.name: v for v in [*model.graph.inputs, *model.graph.outputs]}
    ssm: StateType = _SSM_TYPES.get(values["ssm_state_0"].dtype, "fp32")
    for state in state_table(spec, dtype, target.ssm_layout, ssm):
        for name in (state.name, state.present):
            values[name].shape = ir.Shape([ir.SymbolicDim("batch"), *state.shape])


def attributes_of(node: ir.Node, op: OpDef) -> dict[str, Any]:
    """All attributes of the op, defaults filled in."""
    found = {name: attr.value for name, attr in node.attributes.items()}
    return {name: found.get(name, _default(attr.default_value)) for name, attr in op.schema.attributes.items()}


def _default(proto: Any) -> int | float:
    return int(proto.i) if proto.type == proto.INT else float(proto.f)


class LowerOpsPass(ir.passes.InPlacePass):
    """Every node of the ``mamba`` domain becomes a plugin node (if the target keeps it) or its body."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for index, node in enumerate(list(model.graph)):
            if node.domain != DOMAIN:
                continue
            op = OPS[node.op_type]
            if self.target.plugins and op.plugin:
                self._keep(model, node, op)
            else:
                self._inline(node, op, index)
        return ir.passes.PassResult(model, modified=True)

    def _inline(self, node: ir.Node, op: OpDef, index: int) -> None:
        builder = Builder(f"{op.op_type}_{index}/", self.target.flavour)
        inputs = [value for value in node.inputs if value is not None]
        outputs = op.body(self.target.flavour)(builder, inputs, attributes_of(node, op))
        replace_node(node, builder.nodes, outputs)

    def _keep(self, model: ir.Model, node: ir.Node, op: OpDef) -> None:
        attributes = attributes_of(node, op)
        for name, value in {**attributes, **PLUGIN_ATTRIBUTES}.items():
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
        if not self.target.functions:
            return
        for overload in range(len(model.functions) + 1):
            key = (DOMAIN, op.op_type, str(overload) if overload else "")
            function = function_body(node, op, key[2])
            if key not in model.functions:
                model.functions[key] = function
            if model.functions[key].meta["signature"] == function.meta["signature"]:
                node.overload = key[2]
                return


def function_body(node: ir.Node, op: OpDef, overload: str = "") -> ir.Function:
    """A model-local function for ``node``, specialized to its attributes, dtypes and static dims.

    Attributes of an ONNX function can't steer which nodes it has; so one function serves all nodes that agree on
    them, and others get an overload of the same name.
    """
    attributes = attributes_of(node, op)
    inputs = []
    for i, value in enumerate(v for v in node.inputs if v is not None):
        inputs.append(ir.Value(name=f"in_{i}", type=value.type, shape=_static_shape(value)))
    builder = Builder(f"{op.op_type}/")
    outputs = op.portable(builder, inputs, attributes)
    graph = ir.Graph(inputs, outputs, nodes=builder.nodes, opset_imports={"": OPSET}, name=op.op_type)
    declared = [
        ir.convenience.convert_attribute(name, value) for name, value in {**attributes, **PLUGIN_ATTRIBUTES}.items()
    ]
    function = ir.Function(DOMAIN, op.op_type, overload, graph=graph, attributes=declared)
    function.meta["signature"] = (tuple(attributes.items()), tuple((str(v.type), str(v.shape)) for v in inputs))
    return function


def _static_shape(value: ir.Value) -> ir.Shape | None:
    if value.shape is None:
        return None
    return ir.Shape([dim if isinstance(dim, int) else None for dim in value.shape])


def for_stock_runtime(path: Path, bodies: bool, widen: bool) -> bytes:
    """The model at ``path`` for a runtime that lacks something, serialized; weights stay external.

    Args:
        path: a graph of a bundle.
        bodies: attach a function body to every plugin op.
        widen: compute bfloat16 in float32.
    """
    model = ir.load(path)
    if bodies:
        LowerOpsPass(get_target("tensorrt"))(model)
    if widen:
        WidenPass()(model)
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized
