"""Real engines on a machine without a GPU: TensorRT-RTX compiles ahead of time for named GPUs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_export.bundle import Bundle, file_sha256
from mamba_export.engine import BuildOptions, PluginLibrary, Range, build_engines, build_plugin, describe_engine
from mamba_export.engine.device import find_device
from mamba_export.errors import EnvironmentProblem, OutputExistsError, UsageError
from mamba_export.extras import available

if not available("tensorrt_rtx"):
    pytest.skip(
        "NOT TESTED: engines; TensorRT-RTX is not installed (pip install tensorrt-rtx)", allow_module_level=True
    )

SM = ("86", "89", "120")
CHECKPOINTS = ["mamba1-tiny", "mamba1-small", "mamba2-small"]
CopyBundle = Callable[..., Bundle]


def options(**changes: Any) -> BuildOptions:
    return BuildOptions(**{"runtime": "tensorrt-rtx", "sm": SM, "seq": Range(1, 64, 512), **changes})


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginLibrary]:
    """The plugin library for sm_86; skips where CUDA's compiler or TensorRT's headers are missing."""
    if find_device() is None and not os.environ.get("TENSORRT_ROOT"):
        pytest.skip("NOT TESTED: the plugin library; set TENSORRT_ROOT to a folder with TensorRT's headers")
    try:
        yield build_plugin(["sm_86"])
    except EnvironmentProblem as error:
        if "not found" not in str(error):
            raise
        pytest.skip(f"NOT TESTED: the plugin library; {error}")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_checkpoint_builds_through_its_function_bodies(
    checkpoint: str, shared_checkpoint: Callable[[str], Path], copy_bundle: CopyBundle
) -> None:
    bundle = copy_bundle(ckpt=shared_checkpoint(checkpoint))
    result = build_engines(bundle, options())
    assert [entry["kind"] for entry in result.engines] == ["prefill", "step"]
    for entry in result.engines:
        print(f"{checkpoint} {entry['file']} {entry['bytes']} bytes, {entry['seconds']} s")
        assert entry["bytes"] > 1_000_000
        assert "PLUGIN_V3" not in entry["layers"]
    assert result.engines[0]["layers"]["RECURRENCE"] == bundle.spec.n_layer  # one scan a layer
    assert "RECURRENCE" not in result.engines[1]["layers"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_checkpoint_builds_through_the_plugin_library(
    checkpoint: str, shared_checkpoint: Callable[[str], Path], copy_bundle: CopyBundle, plugin: PluginLibrary
) -> None:
    bundle = copy_bundle(ckpt=shared_checkpoint(checkpoint))
    result = build_engines(bundle, options(plugin=Path(plugin.path)))
    for entry in result.engines:
        print(f"{checkpoint} {entry['file']} {entry['bytes']} bytes, {entry['seconds']} s")
        assert entry["layers"]["PLUGIN_V3"] == 2 * bundle.spec.n_layer  # convolution and scan
        assert "RECURRENCE" not in entry["layers"]
        assert entry["plugin"] == {"file": "libmamba_plugins.so", "sha256": file_sha256(Path(plugin.path))}


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


def test_ort_bundles_are_refused(copy_bundle: CopyBundle) -> None:
    bundle = copy_bundle(target="ort", dtype="fp32")
    with pytest.raises(UsageError, match="ONNX Runtime's own ops"):
        build_engines(bundle, options(sm=("86",)))


def test_the_command_prints_json(copy_bundle: CopyBundle, cli: Callable[..., Any]) -> None:
    bundle = copy_bundle()
    done = cli("build", bundle.path, "--runtime", "tensorrt-rtx", "--sm", "86", "--profile", "1,64,128", "--json")
    assert done.returncode == 0, done.stderr
    assert [entry["kind"] for entry in json.loads(done.stdout)["engines"]] == ["prefill", "step"]
    done = cli("build", bundle.path, "--runtime", "tensorrt-rtx", "--profile", "9,1,2")
    assert done.returncode == 2
    assert "1 ≤ min ≤ opt ≤ max" in done.stderr
