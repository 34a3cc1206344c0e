"""Passes over a traced graph. Each is small, in place, and says what it requires."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from numpy.typing import NDArray


def replace_node(node: ir.Node, new_nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
    """Put ``new_nodes`` where ``node`` is and let ``outputs`` take over names, types and uses of its outputs."""
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, new_nodes)
    for old, new in zip(node.outputs, outputs, strict=True):
        new.name, new.type, new.shape = old.name, new.type or old.type, new.shape or old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def constant_value(value: ir.Value | None) -> NDArray[Any] | None:
    """The array behind a Constant node's output, else None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Constant" or "value" not in node.attributes:
        return None
    return node.attributes["value"].as_tensor().numpy()


class NameDimsPass(ir.passes.InPlacePass):
    """Give the symbolic dims of the inputs stable names: axis 0 and 1 of the first input are batch and sequence.

    Requires: symbols are named by the tracer, consistently over the graph.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        first = model.graph.inputs[0].shape
        assert first is not None
        renamed = {d.value: name for d, name in zip(first, self.names, strict=False) if isinstance(d, ir.SymbolicDim)}
        for value in _values(model):
            if value.shape is not None:
                dims = [self._rename(d, renamed) for d in value.shape]
                value.shape = ir.Shape(dims)
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def _rename(dim: int | ir.SymbolicDim, renamed: dict[str | None, str]) -> int | ir.SymbolicDim:
        if isinstance(dim, ir.SymbolicDim) and dim.value in renamed:
            return ir.SymbolicDim(renamed[dim.value])
        return dim


def _values(model: ir.Model) -> list[ir.Value]:
    values = list(model.graph.inputs)
    for node in model.graph:
        values += node.outputs
    return values


class SplitSequencesPass(ir.passes.InPlacePass):
    """SplitToSequence followed by SequenceAt becomes Split, which every runtime knows."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "SplitToSequence":
                continue
            users = [use.node for use in node.outputs[0].uses()]
            sizes = constant_value(node.inputs[1])
            assert sizes is not None and all(user.op_type == "SequenceAt" for user in users)
            split = ir.Node(
                "", "Split", node.inputs, [node.attributes["axis"]], num_outputs=sizes.size, name=f"{node.name}_split"
            )
            model.graph.insert_before(node, split)
            for i, output in enumerate(split.outputs):
                output.name = f"{split.name}_{i}"
            for user in users:
                index = constant_value(user.inputs[1])
                assert index is not None
                output, old = split.outputs[int(index)], user.outputs[0]
                output.name, output.type, output.shape = old.name, old.type, old.shape
                old.replace_all_uses_with(output)
                model.graph.remove(user, safe=True)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


class StaticReshapePass(ir.passes.InPlacePass):
    """Reshape targets computed from Shape become constants: leading dynamic dims that are kept are written as 0.

    Applies where the output shape is known but for leading dims equal to those of the input, and at most one other.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Reshape" or constant_value(node.inputs[1]) is not None:
                continue
            target = self._target(node)
            if target is None:
                continue
            tensor = ir.tensor(np.array(target, np.int64))
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name=f"{node.name}_shape")
            constant.outputs[0].name = f"{node.name}_shape"
            model.graph.insert_before(node, constant)
            node.replace_input_with(1, constant.outputs[0])
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
            modified = True
        ir.passes.common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _target(node: ir.Node) -> list[int] | None:
        source, result = node.inputs[0], node.outputs[0].shape
        if source is None or source.shape is None or result is None:
            return None
        target = []
        for axis, dim in enumerate(result):
            if isinstance(dim, int):
                target.append(dim)
            elif axis < len(source.shape) and source.shape[axis] == dim:
                target.append(0)
            else:
                target.append(-1)
        return target if target.count(-1) <= 1 else None


class FoldReshapesPass(ir.passes.InPlacePass):
    """A Reshape that undoes the Reshape before it disappears; the first one too, if nothing else uses it.

    Requires: the targets of both are constants, and the shape of what enters the first is known.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            first = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
            if first is None or first.op_type != "Reshape":
                continue
            source = first.inputs[0]
            shape = list(source.shape) if source is not None and source.shape is not None else None
            if source is None or shape is None or _reshaped(node, _reshaped(first, shape)) != shape:
                continue
            if node.outputs[0].is_graph_output():
                continue
            node.outputs[0].replace_all_uses_with(source)
            modified = True
        ir.passes.common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _reshaped(node: ir.Node, shape: list[int | ir.SymbolicDim] | None) -> list[int | ir.SymbolicDim] | None:
    """The shape that a Reshape gives to ``shape``; None where it can't be told."""
    target = constant_value(node.inputs[1])
    keeps_zeros = "allowzero" in node.attributes and node.attributes["allowzero"].as_int() == 1
    if shape is None or target is None or -1 in target or keeps_zeros:
        return None
    if any(dim == 0 and axis >= len(shape) for axis, dim in enumerate(target)):
        return None
    return [shape[axis] if dim == 0 else int(dim) for axis, dim in enumerate(target)]


class FoldConstantsPass(ir.passes.InPlacePass):
    """Evaluate what depends on constants alone, and merge equal constants. Weights have no data yet: they stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = onnxscript.optimizer.fold_constants(model)
        ir.passes.common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(result.modified))


class FuseLinearPass(ir.passes.InPlacePass):
    """MatMul(x, Transpose(W)) becomes com.microsoft FusedMatMul(x, W, transB): weights stay as the checkpoint has
    them, [out, in], and ONNX Runtime packs them once instead of transposing a copy first."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "MatMul":
                continue
            transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
            weight = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
            if weight is None or not weight.is_initializer():
                continue
            fused = ir.Node(
                "com.microsoft",
                "FusedMatMul",
                [node.inputs[0], weight],
                [ir.AttrInt64("transB", 1)],
                name=f"{node.name}_linear",
            )
            replace_node(node, [fused], fused.outputs)
            modified = True
        ir.passes.common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


class WidenPass(ir.passes.InPlacePass):
    """bfloat16 becomes float32 everywhere but in the weights, which are cast where they are used.

    For runtimes without bfloat16 kernels. What the graph computes keeps its weights and gains precision.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        narrow = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.BFLOAT16]
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            self._widen(graph)
        for value in narrow:
            value.dtype = ir.DataType.BFLOAT16
            cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], name=f"{value.name}_wide")
            cast.outputs[0].name = f"{value.name}_wide"
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            model.graph.insert_before(model.graph[0], cast)
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def _widen(graph: ir.Graph) -> None:
        values = [*graph.inputs]
        for node in graph.all_nodes():
            values += node.outputs
            if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            tensor = (
                node.attributes["value"].as_tensor()
                if "value" in node.attributes and node.op_type == "Constant"
                else None
            )
            if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))
        for value in values:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
