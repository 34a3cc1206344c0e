"""Real engines on a machine without a GPU: TensorRT-RTX compiles ahead of time for named GPUs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_export.bundle import Bundle, file_sha256
from mamba_export.engine import BuildOptions, BuildResult, PluginLibrary, Range, build_engines, describe_engine
from mamba_export.engine.device import find_device
from mamba_export.errors import EnvironmentProblem, OutputExistsError, UsageError
from mamba_export.extras import available
from tests.engine.conftest import CopyBundle

if not available("tensorrt_rtx"):
    pytest.skip(
        "NOT TESTED: engines; TensorRT-RTX is not installed (pip install tensorrt-rtx)", allow_module_level=True
    )

SM = ("86", "89", "120")
CHECKPOINTS = ["mamba1-tiny", "mamba1-small", "mamba2-small"]


def options(**changes: Any) -> BuildOptions:
    return BuildOptions(**{"runtime": "tensorrt-rtx", "sm": SM, "seq": Range(1, 64, 512), **changes})


Built = Callable[[str, BuildResult], None]


@pytest.fixture
def show(record_property: Callable[[str, object], None]) -> Built:
    """``show(checkpoint, result)``: engines for the summary at the end of the test run."""

    def show(checkpoint: str, result: BuildResult) -> None:
        for row in result.engines:
            plugins = row["layers"].get("PLUGIN_V3", 0)
            through = f"{plugins} plugin layers" if plugins else "function bodies"
            gpus = " ".join(f"sm_{sm}" for sm in row["compute_capabilities"])
            size = f"{row['bytes'] / 1e6:.1f} MB, {row['seconds']} s"
            record_property("engine", f"{checkpoint:<13} {row['kind']:<8} {gpus} · {through} · {size}")

    return show


@pytest.fixture
def find_checkpoint(tiny_checkpoint: Path, shared_checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """``find_checkpoint(name)``: its folder. The small one is in the repository; tests of the others skip."""
    return lambda name: tiny_checkpoint if name == tiny_checkpoint.name else shared_checkpoint(name)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_checkpoint_builds_through_its_function_bodies(
    checkpoint: str, find_checkpoint: Callable[[str], Path], copy_bundle: CopyBundle, show: Built
) -> None:
    bundle = copy_bundle(ckpt=find_checkpoint(checkpoint))
    result = build_engines(bundle, options())
    show(checkpoint, result)
    assert [entry["kind"] for entry in result.engines] == ["prefill", "step"]
    for entry in result.engines:
        assert entry["compute_capabilities"] == list(SM)
        assert entry["bytes"] > 1_000_000
        assert "PLUGIN_V3" not in entry["layers"]
    assert result.engines[0]["layers"]["RECURRENCE"] == bundle.spec.n_layer  # one scan a layer
    assert "RECURRENCE" not in result.engines[1]["layers"]


# The tests behind this one load the plugin library, which stays in the process: the parser would take the plugin.
def test_a_fused_step_builds_through_its_function_body(copy_bundle: CopyBundle, show: Built) -> None:
    bundle = copy_bundle(fuse_step=True)
    result = build_engines(bundle, options())
    show("mamba1-tiny, fused", result)
    assert "PLUGIN_V3" not in result.engines[1]["layers"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_checkpoint_builds_through_the_plugin_library(
    checkpoint: str,
    find_checkpoint: Callable[[str], Path],
    copy_bundle: CopyBundle,
    plugin: PluginLibrary,
    show: Built,
) -> None:
    bundle = copy_bundle(ckpt=find_checkpoint(checkpoint))
    result = build_engines(bundle, options(plugin=Path(plugin.path)))
    show(checkpoint, result)
    for entry in result.engines:
        assert entry["layers"]["PLUGIN_V3"] == 2 * bundle.spec.n_layer  # convolution and scan
        assert "RECURRENCE" not in entry["layers"]
        assert entry["plugin"] == {"file": "libmamba_plugins.so", "sha256": file_sha256(Path(plugin.path))}
    assert file_sha256(bundle.file("engines/libmamba_plugins.so")) == file_sha256(Path(plugin.path))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_fused_step_builds_as_one_plugin_layer(
    checkpoint: str,
    find_checkpoint: Callable[[str], Path],
    copy_bundle: CopyBundle,
    plugin: PluginLibrary,
    show: Built,
) -> None:
    bundle = copy_bundle(ckpt=find_checkpoint(checkpoint), fuse_step=True)
    result = build_engines(bundle, options(plugin=Path(plugin.path)))
    show(f"{checkpoint}, fused", result)
    prefill, step = (entry["layers"] for entry in result.engines)
    assert prefill["PLUGIN_V3"] == 2 * bundle.spec.n_layer
    assert set(step) == {"CONSTANT", "PLUGIN_V3"} and step["PLUGIN_V3"] == 1


@pytest.mark.slow
def test_polygraphy_alone_builds_through_the_plugin_library(
    copy_bundle: CopyBundle, plugin: PluginLibrary, tmp_path: Path
) -> None:
    """As docs/tensorrt.md shows it, with nothing of this project but graph and library."""
    libraries = pytest.importorskip("tensorrt_rtx_libs")
    (real,) = {*Path(libraries.__file__).parent.rglob("libtensorrt_rtx.so.1")}
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtensorrt_rtx.so").symlink_to(real)
    bundle = copy_bundle()
    program = [sys.executable, "-c", "from polygraphy.tools import main; main()", "convert", bundle.file("step.onnx")]
    options = ["--convert-to", "trt", "--compute-capabilities", "8.6", "12.0", "--plugins", plugin.static_path]
    options += ["--onnx-flags", "enable_plugin_override", "-o", str(tmp_path / "step.engine"), "-v"]
    env = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "LD_LIBRARY_PATH": f"{tmp_path / 'lib'}:{real.parent}"}
    done = subprocess.run([*program, *options], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "step.engine").stat().st_size > 1_000_000
    # A library built against older headers than the runtime does not touch its registry; the bodies serve then.
    import tensorrt_rtx

    new = tuple(map(int, tensorrt_rtx.__version__.split(".")[:2])) >= (1, 7)
    assert ("whose registry is another" in done.stderr) == (new and int(plugin.tensorrt.split(".")[0]) < 11)


def test_the_manifest_knows_the_engines(copy_bundle: CopyBundle) -> None:
    bundle = copy_bundle()
    built = build_engines(bundle, options(sm=("86",))).engines
    again = Bundle(bundle.path)  # checks every file
    assert again.manifest.engines == built
    prefill = built[0]
    assert prefill["file"] == "engines/prefill-tensorrt-rtx-sm86.engine"
    assert prefill["profiles"] == [{"name": "prefill", "batch": [1, 1, 4], "seq": [1, 64, 512]}]
    assert prefill["source"]["prefill.onnx"] == again.manifest.files["prefill.onnx"]["sha256"]
    facts = describe_engine(bundle.file(prefill["file"]))
    assert facts["manifest"] == prefill
    assert facts["intact"]
    if find_device() is None:
        assert facts["not_loaded"] == "there is no NVIDIA GPU here"


def test_a_changed_engine_is_not_intact(copy_bundle: CopyBundle) -> None:
    bundle = copy_bundle()
    entry = build_engines(bundle, options(sm=("86",))).engines[0]
    path = bundle.file(entry["file"])
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert not describe_engine(path)["intact"]
    loose = path.parent.parent.parent / "loose.engine"
    shutil.copyfile(path, loose)
    assert describe_engine(loose)["manifest"] is None


def test_one_engine_with_two_profiles(copy_bundle: CopyBundle) -> None:
    bundle = copy_bundle()
    (entry,) = build_engines(bundle, options(sm=("120",), single_engine=True, batch=Range.parse("1"))).engines
    assert entry["kind"] == "model"
    assert [profile["seq"] for profile in entry["profiles"]] == [[1, 64, 512], [1, 1, 1]]
    engine, weights = bundle.file(entry["file"]).read_bytes(), bundle.file("weights.bin").read_bytes()
    for name, (start, length) in large_weights(bundle).items():
        piece = weights[start + length // 2 : start + length // 2 + 64]
        assert engine.count(piece) == 1, f"{name} is not there just once"


def large_weights(bundle: Bundle) -> dict[str, tuple[int, int]]:
    """Where matrices lie in weights.bin: name → (offset, bytes)."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle.file("prefill.onnx"), load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if int(where.get("length", 0)) > 50_000:
            found[tensor.name] = (int(where.get("offset", 0)), int(where["length"]))
    assert len(found) >= 2 * bundle.spec.n_layer
    return found


def test_ctrl_c_cancels_a_build_and_leaves_nothing(copy_bundle: CopyBundle) -> None:
    """The builder itself says when it is at work: the signal comes at its first sign of progress."""
    bundle = copy_bundle()
    script = """
import contextlib, os, signal, sys
from mamba_export.bundle import Bundle
from mamba_export.engine import BuildOptions, build_engines

signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupts:
    @contextlib.contextmanager
    def stage(self, name, total=None):
        yield lambda done: os.kill(os.getpid(), signal.SIGINT)

try:
    options = BuildOptions(runtime="tensorrt-rtx", sm=("86", "89", "120"))
    build_engines(Bundle(sys.argv[1]), options, progress=Interrupts())
except KeyboardInterrupt:
    sys.exit(130)
"""
    command = [sys.executable, "-c", script, str(bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode in (130, -signal.SIGINT), done.stderr
    assert not bundle.file("engines").exists()
    assert Bundle(bundle.path).manifest.engines == []


def test_engines_are_replaced_only_by_force(copy_bundle: CopyBundle) -> None:
    bundle = copy_bundle()
    build_engines(bundle, options(sm=("86",)))
    with pytest.raises(OutputExistsError, match="exists"):
        build_engines(bundle, options(sm=("86",)))
    build_engines(bundle, options(sm=("86",)), force=True)
    assert len(bundle.manifest.engines) == 2


def test_a_graph_tensorrt_cannot_read_is_an_error_with_its_words(copy_bundle: CopyBundle) -> None:
    bundle = copy_bundle()
    bundle.file("prefill.onnx").write_bytes(b"\x08\x0a nonsense")
    with pytest.raises(EnvironmentProblem, match=r"can't read prefill\.onnx"):
        build_engines(bundle, options(sm=("86",)))
    assert bundle.manifest.engines == []
    assert not bundle.file("engines").exists()


def test_ragged_graphs_build(copy_bundle: CopyBundle) -> None:
    build_engines(copy_bundle(ragged=True), options(sm=("86",)))


def test_gpus_it_does_not_build_for_are_named(copy_bundle: CopyBundle) -> None:
    with pytest.raises(UsageError, match="sm_90"):
        build_engines(copy_bundle(), options(sm=("sm_90",)))


def test_ort_bundles_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="ONNX Runtime's own ops"):
        build_engines(Bundle(tiny_bundle, check=False), options(sm=("86",)))


def test_the_command_prints_json(copy_bundle: CopyBundle, cli: Callable[..., Any]) -> None:
    bundle = copy_bundle()
    done = cli("build", bundle.path, "--runtime", "tensorrt-rtx", "--sm", "86", "--profile", "1,64,128", "--json")
    assert done.returncode == 0, done.stderr
    assert [entry["kind"] for entry in json.loads(done.stdout)["engines"]] == ["prefill", "step"]
    done = cli("build", bundle.path, "--runtime", "tensorrt-rtx", "--profile", "9,1,2")
    assert done.returncode == 2
    assert "1 ≤ min ≤ opt ≤ max" in done.stderr
