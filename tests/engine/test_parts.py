"""What needs no TensorRT: ranges, profiles, architectures, headers, and the graph without its functions."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mamba_export.engine import Range, build_plugin
from mamba_export.engine.onnx_wire import external_bytes, without_functions
from mamba_export.engine.plugin import hash_sources, parse_arch, source_files
from mamba_export.engine.profiles import Profile
from mamba_export.engine.toolchain import find_headers, find_toolchain, tensorrt_version
from mamba_export.engine.watch import make_monitor, run_cancellable
from mamba_export.errors import BundleError, EnvironmentProblem, UsageError


@pytest.mark.parametrize(("text", "numbers"), [("1,512,2048", [1, 512, 2048]), ("4", [4, 4, 4]), ("1:2:3", [1, 2, 3])])
def test_ranges(text: str, numbers: list[int]) -> None:
    assert Range.parse(text).to_list() == numbers


@pytest.mark.parametrize("text", ["", "a,b,c", "1,2", "0,1,2", "3,2,1", "1,5,4", "1.5"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        Range.parse(text)


def test_profiles_fill_dynamic_dims_alone() -> None:
    profile = Profile("prefill", Range(1, 2, 8), Range(1, 64, 512))
    assert profile.shapes([-1, -1]) == ([1, 1], [2, 64], [8, 512])
    assert profile.shapes([-1, 768, 16]) == ([1, 768, 16], [2, 768, 16], [8, 768, 16])


@pytest.mark.parametrize(("text", "arch"), [("sm_87", "87"), ("8.7", "87"), ("SM110", "110"), ("sm_90a", "90a")])
def test_architectures(text: str, arch: str) -> None:
    assert parse_arch(text) == arch


@pytest.mark.parametrize("text", ["", "orin", "sm_", "sm_8", "sm_1234", "87;rm"])
def test_architectures_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="GPU architecture"):
        parse_arch(text)


def test_functions_are_stripped_and_nothing_else(make_bundle: Callable[..., Path]) -> None:
    onnx = pytest.importorskip("onnx")
    data = (make_bundle(target="tensorrt") / "prefill.onnx").read_bytes()
    model = onnx.load_from_string(data)
    assert model.functions
    stripped = onnx.load_from_string(without_functions(data))
    assert not stripped.functions
    del model.functions[:]
    assert stripped == model


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x20short", b"\x0b", b"\x0a\xff\xff\xff\xff\xff"])
def test_damaged_graphs_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="not an ONNX model"):
        without_functions(data)


@pytest.mark.parametrize("graph", ["prefill.onnx", "step.onnx"])
def test_the_bytes_a_graph_refers_to(graph: str, make_bundle: Callable[..., Path]) -> None:
    onnx = pytest.importorskip("onnx")
    data = (make_bundle(target="tensorrt") / graph).read_bytes()
    spans = set()
    for tensor in onnx.load_from_string(data).graph.initializer:
        found = {entry.key: entry.value for entry in tensor.external_data}
        if found:
            spans.add((int(found.get("offset", 0)), int(found["length"])))
    assert len(spans) > 10
    assert external_bytes(data) == sum(length for _, length in spans)
    with pytest.raises(BundleError, match="not an ONNX model"):
        external_bytes(data[: len(data) // 2])


def test_headers_say_their_version(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInferRuntime.h").touch()
    version = tmp_path / "include" / "NvInferVersion.h"
    version.write_text("#define NV_TENSORRT_MAJOR 10 //!< major\n#define NV_TENSORRT_MINOR 3 //!< minor\n")
    assert tensorrt_version(find_headers(tmp_path)) == (10, 3)
    version.write_text("#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n")
    assert tensorrt_version(find_headers(tmp_path)) == (11, 1)
    version.write_text("")
    with pytest.raises(EnvironmentProblem, match="does not say"):
        tensorrt_version(find_headers(tmp_path))


def test_missing_tools_say_where_they_were_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"looked at .*/include"):
        find_headers(tmp_path)
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.6, V12.6.1'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(compiler))
    monkeypatch.setattr("mamba_export.engine.toolchain.shutil.which", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="cmake"):
        find_toolchain(tmp_path)
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setattr("mamba_export.engine.toolchain.Path.is_file", lambda path: False)
    with pytest.raises(EnvironmentProblem, match=r"nvcc was not found; looked at .*nowhere"):
        build_plugin(["sm_87"], tensorrt_root=tmp_path)


def test_the_sources_are_complete() -> None:
    names = source_files()
    for name in (
        "plugins/tensorrt/CMakeLists.txt",
        "plugins/tensorrt/exports.map",
        "kernels/cuda/include/mamba/common.h",
    ):
        assert name in names
    for op in ("causal_conv1d", "selective_scan", "selective_state_update", "ssd_scan", "ssd_state_update"):
        assert {f"plugins/tensorrt/src/ops/{op}.cpp", f"kernels/cuda/{op}.cu"} <= names.keys()
    assert hash_sources() == hash_sources()


def test_an_interrupted_build_is_cancelled_and_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled, ended = threading.Event(), threading.Event()

    def job() -> None:
        cancelled.wait(10)
        ended.set()

    def interrupted(self: concurrent.futures.Future[None], timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cancellable(job, cancelled.set)
    assert ended.is_set()


def test_progress_counts_to_a_hundred() -> None:
    ticks: list[int] = []

    class Base:
        def __init__(self) -> None:
            pass

    monitor = make_monitor(SimpleNamespace(IProgressMonitor=Base), ticks.append)
    monitor.phase_start("build", None, 3)
    monitor.phase_start("tactics", "build", 50)
    assert monitor.step_complete("tactics", 4)
    for step in range(3):
        assert monitor.step_complete("build", step)
    monitor.phase_finish("build")
    assert sum(ticks) == 100
    monitor.cancelled = True
    assert not monitor.step_complete("build", 0)
