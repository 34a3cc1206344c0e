"""What a torch op takes on a GPU: the choice, without a GPU."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mamba_export.errors import EnvironmentProblem
from mamba_export.ops import OPS, dispatch
from tests.ops.samples import KINDS, PREFILL_OPS, STEP_OPS

NAMES = ["causal_conv1d", "selective_scan", "selective_state_update", "ssd_scan", "ssd_state_update"]


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    forget_choice = dispatch.kind_on_gpu.cache_clear
    forget_choice()
    yield
    forget_choice()


@pytest.mark.parametrize(
    ("present", "wanted"),
    [({"cuda", "triton"}, "cuda"), ({"cuda"}, "cuda"), ({"triton"}, "triton"), (set(), "reference")],
)
def test_library_then_triton_then_reference(present: set[str], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_available", lambda kind, name, insist=False: kind in present or kind == "reference")
    assert dispatch.kind_on_gpu("ssd_scan") == wanted


def test_the_environment_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_available", lambda kind, name, insist=False: kind != "cuda")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert dispatch.kind_on_gpu("ssd_scan") == "reference"
    for name, message in (("cuda", "libmamba_kernels.so is not found"), ("fast", "is 'fast'")):
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, name)
        dispatch.kind_on_gpu.cache_clear()
        with pytest.raises(EnvironmentProblem, match=message):
            dispatch.kind_on_gpu("ssd_scan")


@pytest.mark.parametrize(("library", "nvrtc"), [(True, False), (False, True), (False, False)])
def test_nvrtc_stands_in_where_cuda_is_asked_for(library: bool, nvrtc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("mamba_export.kernels.library")
    monkeypatch.setattr(kernels, "available", lambda: library)
    monkeypatch.setattr(importlib.import_module("mamba_export.kernels.nvrtc"), "available", lambda: nvrtc)
    assert {name for name in NAMES if dispatch.kind_on_gpu(name) == "cuda"} == (set(NAMES) if library else set())
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cuda")
    dispatch.kind_on_gpu.cache_clear()
    for name in NAMES:
        if library or (nvrtc and not name.endswith("scan")):
            assert dispatch.kind_on_gpu(name) == "cuda"
        else:
            with pytest.raises(EnvironmentProblem, match=r"libmamba_kernels.so"):
                dispatch.kind_on_gpu(name)


@pytest.mark.parametrize("kind", dispatch.PACKAGES)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_called_like_the_torch_op(name: str, kind: str) -> None:
    if kind == "triton":
        pytest.importorskip("triton", reason="NOT TESTED: the Triton ops, for triton is not installed")
    schema = getattr(torch.ops.mamba_export, name).default._schema
    parameters = inspect.signature(dispatch.implementation(name, kind)).parameters.values()
    positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [argument.name for argument in schema.arguments]


@pytest.mark.parametrize("name", NAMES)
def test_gpu_tensors_take_the_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that is registered for CUDA tensors, called as torch calls it."""
    taken: list[str] = []

    def pretend(kind: str) -> Any:
        return lambda *arguments: taken.append(kind)

    monkeypatch.setattr(dispatch, "implementation", lambda name, kind: pretend(kind))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernel = dispatch.on_gpu(name, pretend("reference"))
    for kind in ("cuda", "triton", "reference"):
        monkeypatch.setattr(dispatch, "kind_on_gpu", lambda name, kind=kind: kind)
        kernel(torch.zeros(1))
    kernel(torch.zeros(1, dtype=torch.float64))
    assert taken == ["cuda", "triton", "reference", "reference"]


def test_every_op_of_a_plugin_registers_for_cuda() -> None:
    assert {op.torch_op._schema.name for op in OPS.values() if op.plugin} == {f"mamba_export::{n}" for n in NAMES}
    for op in [*PREFILL_OPS.values(), *STEP_OPS.values()]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op._qualname, "CUDA")
    assert len(KINDS) == len(PREFILL_OPS)
