"""What the project knows about one op, in one record: torch op, ONNX schema, translation and bodies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor

from mamba_export.ops.builder import Builder, Flavour

DOMAIN = "mamba"
VERSION = 1

Inputs = Sequence[ir.Value]
Attributes = dict[str, Any]
Body = Callable[[Builder, Inputs, Attributes], list[ir.Value]]
"""Builds the op from other ops: ``body(op, inputs, attributes) -> outputs``. Inputs carry dtypes and static dims."""


@dataclass(frozen=True)
class OpDef:
    """One op of the ``mamba`` domain.

    Attributes:
        schema: the ONNX schema; its name is the op type.
        torch_op: the overload that the tracer meets.
        translate: makes the ONNX node from the torch arguments (an entry of the exporter's translation table).
        portable: body in standard ops, opset 20.
        ort: body with ONNX Runtime's contrib ops; None means ``portable``.
        ort_cpu: body for ONNX Runtime on a CPU, where another one is faster; None means ``ort``.
        plugin: whether targets with plugins keep the node. Others are always replaced by a body.
    """

    schema: onnx.defs.OpSchema
    torch_op: Any
    translate: Callable[..., Any]
    portable: Body
    ort: Body | None = None
    ort_cpu: Body | None = None
    plugin: bool = True

    @property
    def op_type(self) -> str:
        return str(self.schema.name)

    def body(self, flavour: Flavour) -> Body:
        """The body that ``flavour`` uses."""
        candidates = {"portable": (), "ort": (self.ort,), "ort-cpu": (self.ort_cpu, self.ort)}[flavour]
        return next((body for body in candidates if body is not None), self.portable)


def onnx_op(schema: onnx.defs.OpSchema) -> onnxscript.values.Op:
    """A callable that emits a node of ``schema`` while torch's exporter runs."""
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), schema.name, schema)


def fake_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of what every scan and state update returns: y like x, the present state like the state."""
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state)


_FLOAT_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def make_schema(
    name: str,
    doc: str,
    inputs: dict[str, str],
    outputs: dict[str, str],
    attributes: dict[str, tuple[int | float, str]],
    extras: Sequence[str] = (),
) -> onnx.defs.OpSchema:
    """An :class:`onnx.defs.OpSchema` of the ``mamba`` domain.

    Args:
        name: the op type.
        doc: semantics.
        inputs: name → type: ``T`` (any float), ``S`` (float32) or a literal ONNX type.
        outputs: the same.
        attributes: name → (default, description); the type follows from the default.
        extras: descriptions of trailing inputs whose presence the attributes tell. TensorRT rejects empty optional
            inputs, so inputs are dense, and what is absent is left out: the first extra present is ``extra_0``.
    """
    op = onnx.defs.OpSchema
    formal = [op.FormalParameter(key, kind) for key, kind in inputs.items()]
    optional = op.FormalParameterOption.Optional
    formal += [op.FormalParameter(f"extra_{i}", f"X{i}", t, param_option=optional) for i, t in enumerate(extras)]
    make = onnx.helper.make_attribute
    attrs = [op.Attribute(key, make(key, default), text) for key, (default, text) in attributes.items()]
    constraints = [
        ("T", _FLOAT_TYPES, "activations"),
        ("R", _FLOAT_TYPES, "residual stream"),
        ("W", _FLOAT_TYPES, "weight"),
    ]
    constraints.append(("S", ["tensor(float)"], "float32"))
    constraints += [(f"X{i}", [*_FLOAT_TYPES, "tensor(int32)"], "optional input") for i in range(len(extras))]
    used = {*inputs.values(), *outputs.values(), *(f"X{i}" for i in range(len(extras)))}
    return op(
        name,
        DOMAIN,
        VERSION,
        doc=doc,
        inputs=formal,
        outputs=[op.FormalParameter(key, kind) for key, kind in outputs.items()],
        type_constraints=[c for c in constraints if c[0] in used],
        attributes=attrs,
    )
