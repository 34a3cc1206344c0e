"""Fuse a step graph into one node: the whole model as one op, whose function body is the graph it replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from mamba_export.fused_step import OP_TYPE, parameter_names
from mamba_export.graph.lower import PLUGIN_ATTRIBUTES
from mamba_export.ops.decode_stack import attributes_of_spec
from mamba_export.ops.opdef import DOMAIN, VERSION
from mamba_export.spec import ModelSpec

if TYPE_CHECKING:
    from mamba_export.kernels.packed_weights import Format


class FuseStepPass(ir.passes.InPlacePass):
    """All nodes of a step graph become the body of one ``MambaDecodeStack`` node.

    Requires: a lowered step graph; its initializers are the model's parameters, under their names.
    Ensures: inputs, outputs and initializers of the graph are what they were.

    Args:
        spec: the model.
        form: of the rows where the graph's matrices are packed (:class:`mamba_export.graph.packed.PackedQuantizePass`).
        packed_embedding: the embedding is the head's packed rows.
    """

    def __init__(self, spec: ModelSpec, form: Format | None = None, packed_embedding: bool = False) -> None:
        super().__init__()
        self.attributes = attributes_of_spec(spec, form, packed_embedding)
        self.parameters = parameter_names(spec, form is not None, packed_embedding)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        inputs = [*graph.inputs, *(graph.initializers[name] for name in self.parameters)]
        constants = [self._constant(graph, name) for name in sorted({*graph.initializers} - {*self.parameters})]
        nodes, results = [*constants, *graph], list(graph.outputs)
        body_inputs: dict[str, ir.Value] = {}
        formal = []
        for i, value in enumerate(inputs):
            # A name that no function within the body has for an input: TensorRT's parser takes them for one value.
            twin = ir.Value(name=f"operand_{i}", type=value.type, shape=value.shape)
            formal.append(twin)
            body_inputs.setdefault(value.name or "", twin)
        graph.outputs.clear()
        graph.remove(list(graph))
        for value in inputs:
            twin = body_inputs[value.name or ""]
            for use in list(value.uses()):
                use.node.replace_input_with(use.idx, twin)
        attributes: dict[str, Any] = {**self.attributes, **PLUGIN_ATTRIBUTES}
        attrs = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
        opsets = dict(model.opset_imports)
        body = ir.Graph(formal, results, nodes=nodes, opset_imports=opsets, name=OP_TYPE)
        model.functions[(DOMAIN, OP_TYPE, "")] = ir.Function(DOMAIN, OP_TYPE, "", graph=body, attributes=attrs)
        node = ir.Node(DOMAIN, OP_TYPE, inputs, attrs, num_outputs=len(results), name="decode_stack")
        for out, result in zip(node.outputs, results, strict=True):
            out.name, out.type, out.shape = result.name, result.type, result.shape
            graph.outputs.append(out)
        graph.append(node)
        model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def _constant(graph: ir.Graph, name: str) -> ir.Node:
        """A node in place of an initializer that is no parameter: functions have no initializers."""
        value = graph.initializers.pop(name)
        assert value.const_value is not None, f"the fused op has no input for the parameter {name}"
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)], name=f"{name}_constant")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
        value.replace_all_uses_with(node.outputs[0])
        return node
