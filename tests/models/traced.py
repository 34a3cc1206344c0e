"""Tracing is the slow part of an export and knows nothing of targets: tests trace each model once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx_ir as ir
import pytest

from mamba_export.graph import trace as tracing
from mamba_export.spec import ModelSpec


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """Remember traces by their arguments; hand out copies, for lowering changes a graph in place."""
    original = tracing.trace
    made: dict[tuple[ModelSpec, str, tracing.TraceOptions], ir.Model] = {}

    def trace(spec: ModelSpec, kind: tracing.GraphKind, options: tracing.TraceOptions) -> ir.Model:
        key = (spec, kind, options)
        if key not in made:
            made[key] = original(spec, kind, options)
        return made[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "trace", trace)
        yield
