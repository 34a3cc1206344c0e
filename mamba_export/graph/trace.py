"""Trace the torch model with torch's own exporter, on fake tensors: no weight is read, no memory is taken for one."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba_export.graph.passes import FoldConstantsPass, NameDimsPass, SplitSequencesPass, StaticReshapePass
from mamba_export.models import MambaLM, build_model
from mamba_export.ops import DOMAIN, OPS, VERSION
from mamba_export.spec import ModelSpec
from mamba_export.states import State, state_table

OPSET = 20
GraphKind = Literal["prefill", "step"]
_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Example sizes for the tracer. Both are dynamic in the graph; 0 and 1 would be specialized by torch.export.
_BATCH, _SEQ = 2, 24


@dataclass(frozen=True)
class TraceOptions:
    """What decides the shape of the graphs besides the model itself.

    Attributes:
        dtype: of weights and activations: ``fp32``, ``fp16`` or ``bf16``.
        logits: of the prefill graph: ``last`` valid position or ``all``.
        ragged: the prefill graph takes ``seq_lens``.
    """

    dtype: str = "fp32"
    logits: Literal["last", "all"] = "last"
    ragged: bool = False


def trace(spec: ModelSpec, kind: GraphKind, options: TraceOptions) -> ir.Model:
    """One graph of the bundle contract, with every op of the ``mamba`` domain still a node.

    Returns:
        An ONNX IR model whose initializers have names, dtypes and shapes, but no data yet.
    """
    model = build_model(spec, options.dtype, step=kind == "step", logits=options.logits)
    states = state_table(spec, options.dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _to_fake(model, fake)
    ragged = options.ragged and kind == "prefill"
    args, dims = _example(states, kind, ragged, fake)
    names = ["input_ids", *(s.name for s in states), *(["seq_lens"] if ragged else [])]
    with _quiet():
        program = torch.export.export(model, args, dynamic_shapes=dims, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=names,
            output_names=["logits", *(s.present for s in states)],
            custom_translation_table={op.torch_op: op.translate for op in OPS.values()},
        )
    assert exported is not None
    graph = exported.model
    if spec.tie_embeddings:
        _tie_head(graph)
    _check_names(graph, model)
    graph.opset_imports[DOMAIN] = VERSION
    graph.ir_version = 10
    graph.producer_name = "mamba-export"
    graph.graph.name = kind
    for value in graph.graph.initializers.values():
        value.const_value = None
    passes = ir.passes.Sequential(
        NameDimsPass(["batch", "seq"]), SplitSequencesPass(), StaticReshapePass(), FoldConstantsPass()
    )
    return passes(graph).model


def _example(states: list[State], kind: GraphKind, ragged: bool, fake: FakeTensorMode) -> tuple[tuple[Any, ...], Any]:
    """Fake arguments of the forward pass and which of their axes are dynamic."""
    batch, seq = torch.export.Dim("batch", min=1), torch.export.Dim("seq", min=1)
    length = 1 if kind == "step" else _SEQ
    with fake:
        ids = torch.zeros(_BATCH, length, dtype=torch.int64)
        values = [torch.zeros(_BATCH, *s.shape, dtype=_TORCH_DTYPES[s.dtype]) for s in states]
        seq_lens = torch.zeros(_BATCH, dtype=torch.int32) if ragged else None
    ids_dims = {0: batch} if kind == "step" else {0: batch, 1: seq}
    dims = (ids_dims, [{0: batch} for _ in states], {0: batch} if ragged else None)
    return (ids, values, seq_lens), dims


def _to_fake(model: MambaLM, fake: FakeTensorMode) -> None:
    """Replace every meta parameter by a fake CPU one; tied parameters stay tied."""
    seen: dict[int, nn.Parameter] = {}
    with fake:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    twin = torch.empty(parameter.shape, dtype=parameter.dtype)
                    seen[id(parameter)] = nn.Parameter(twin, requires_grad=False)
                setattr(module, name, seen[id(parameter)])


def _tie_head(graph: ir.Model) -> None:
    """A tied head uses the embedding's initializer, whichever name the tracer kept: one tensor, two uses."""
    initializers = graph.graph.initializers
    head = initializers.pop("lm_head.weight", None)
    if head is None:
        return
    name = "backbone.embedding.weight"
    if name in initializers:
        head.replace_all_uses_with(initializers[name])
    else:
        head.name = name
        initializers.add(head)


def _check_names(graph: ir.Model, model: nn.Module) -> None:
    """Every initializer is a parameter of the model: nothing was baked into the graph."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name in graph.graph.initializers:
        if name not in parameters:
            raise AssertionError(f"the tracer made an initializer that is no parameter: {name}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns about things of its own; errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
