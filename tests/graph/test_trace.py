"""Tracing: no weight is touched, nothing grows with the parameters, and the result is the same every time."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from mamba_export import ModelSpec, export_onnx
from mamba_export.checkpoint.storage import LazyTensor
from mamba_export.graph.lower import lower
from mamba_export.graph.trace import TraceOptions, trace
from mamba_export.progress import Tick
from mamba_export.targets import get_target
from tests.graph.conftest import MakeGraphs


class Stages:
    """A progress observer that knows which stage runs."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.seen: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Tick]:
        self.running.append(name)
        self.seen.append(name)
        try:
            yield lambda done: None
        finally:
            self.running.pop()


def test_tracing_touches_no_weights(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, loads = Stages(), []
    load = LazyTensor.load

    def watched(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        loads.append(tuple(stages.running))
        return load(self, *args, **kwargs)

    monkeypatch.setattr(LazyTensor, "load", watched)
    export_onnx(checkpoints["mamba1"], tmp_path / "out", verify=False, progress=stages)
    assert {"trace prefill", "trace step", "write weights"} <= set(stages.seen)
    assert loads
    assert set(loads) == {("write weights",)}


def test_memory_of_a_trace_does_not_grow_with_the_parameters() -> None:
    """Two layers of width 16,384 would take 13 GB."""
    width = 16384
    spec = ModelSpec(
        family="mamba1",
        d_model=width,
        n_layer=2,
        vocab_size=1000,
        padded_vocab_size=1000,
        d_inner=2 * width,
        d_ssm=2 * width,
        d_state=16,
        dt_rank=width // 16,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = lower(trace(spec, "prefill", TraceOptions()), spec, "fp32", get_target("ort"))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    numel = sum(size(value) for value in model.graph.initializers.values())
    assert 4 * numel > 12e9
    assert grown < 0.5e9


def size(value: ir.Value) -> int:
    """Number of elements of an initializer that has a shape and no data."""
    assert value.const_value is None
    assert value.shape is not None
    count = 1
    for dim in value.shape:
        assert isinstance(dim, int)
        count *= dim
    return count


@pytest.mark.parametrize("target", ["tensorrt", "ort"])
def test_two_exports_are_identical(
    target: str, graphs: MakeGraphs, checkpoints: dict[str, Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Byte for byte, the second made by another process with another hash seed."""
    first, out = graphs("mamba2", target), tmp_path / "again"
    command = ("onnx", "--ckpt", checkpoints["mamba2"], "-o", out, "--target", target, "--no-verify")
    result = cli(*command, env={"PYTHONHASHSEED": "7"})
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in first.path.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    for name in names:
        assert first.file(name).read_bytes() == (out / name).read_bytes(), name
