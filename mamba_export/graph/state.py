"""The type of the SSM state at the graph's edge: float16, or int8 with a scale a channel. Inside it stays float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mamba_export.ops.builder import Builder
from mamba_export.spec import ModelSpec
from mamba_export.states import INT8_MAX, LEAST_SCALE, Layout, State, StateType, state_table


class StatePass(ir.passes.InPlacePass):
    """Give SSM states another type, before targets choose their layout.

    Requires: a traced graph, with every SSM state in float32 and ops of the ``mamba`` domain.
    """

    def __init__(self, spec: ModelSpec, dtype: str, layout: Layout, ssm: StateType) -> None:
        super().__init__()
        self.table, self.ssm = state_table(spec, dtype, layout, ssm), ssm

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        self.graph = graph
        for state in self.table:
            if state.kind == "ssm":
                self._input(state)
                self._output(state)
        return ir.passes.PassResult(model, modified=True)

    def _input(self, state: State) -> None:
        inputs = self.graph.inputs
        place = next(i for i, value in enumerate(inputs) if value.name == state.name)
        old = inputs[place]
        old.shape = _shape(state)
        op = Builder(f"{state.name}/in/")
        new = ir.Value(name=state.name, shape=old.shape, type=ir.TensorType(_TYPES[self.ssm]))
        if self.ssm == "fp16":
            wide = op.Cast(new, to=int(ir.DataType.FLOAT))
        else:
            scale = _scale_value(state)
            inputs.insert(place + 1, scale)
            wide = op.Mul(op.DequantizeLinear(new, op.f32(1.0)), op.unsqueeze(scale, _axis(state)))
        wide.type, wide.shape = old.type, old.shape
        old.replace_all_uses_with(wide)
        old.name = f"{state.name}/float"
        inputs[place] = new
        self.graph.insert_before(self.graph[0], op.nodes)

    def _output(self, state: State) -> None:
        outputs = self.graph.outputs
        place = next(i for i, value in enumerate(outputs) if value.name == state.present)
        wide = outputs[place]
        wide.shape = _shape(state)
        wide.name = f"{state.present}/float"
        op = Builder(f"{state.name}/out/")
        if self.ssm == "fp16":
            narrow = op.Cast(wide, to=int(ir.DataType.FLOAT16))
        else:
            peak = op.ReduceMax(op.Abs(wide), op.i64([_axis(state)]), keepdims=1)
            scale = op.Mul(op.Max(peak, op.f32(LEAST_SCALE * INT8_MAX)), op.f32(1.0 / INT8_MAX))
            zero = op.constant(np.zeros((), np.int8))
            narrow = op.QuantizeLinear(op.Div(wide, scale), op.f32(1.0), zero)
            flat = op.Squeeze(scale, op.i64([_axis(state)]))
            flat.name = state.present.replace("ssm_state", "ssm_scale")
            flat.type, flat.shape = ir.TensorType(ir.DataType.FLOAT), _scale_shape(state)
            outputs.insert(place + 1, flat)
        narrow.name, narrow.shape, narrow.type = state.present, wide.shape, ir.TensorType(_TYPES[self.ssm])
        outputs[place] = narrow
        self.graph.extend(op.nodes)


_TYPES = {"fp16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}


def _axis(state: State) -> int:
    return state.axes.index("d_state")


def _shape(state: State) -> ir.Shape:
    return ir.Shape([ir.SymbolicDim("batch"), *state.shape])


def _scale_shape(state: State) -> ir.Shape:
    kept = [size for axis, size in enumerate(state.shape, start=1) if axis != _axis(state)]
    return ir.Shape([ir.SymbolicDim("batch"), *kept])


def _scale_value(state: State) -> ir.Value:
    name = state.name.replace("ssm_state", "ssm_scale")
    return ir.Value(name=name, shape=_scale_shape(state), type=ir.TensorType(ir.DataType.FLOAT))
