"""Kits for devices: what is in them, and the way from build.sh to text, on stand-ins for NVIDIA's tools."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_export.bundle import Bundle
from mamba_export.devices import DEVICES
from mamba_export.engine import Range
from mamba_export.engine.kit import make_kit
from mamba_export.engine.kit_text import shape_options
from mamba_export.engine.plugin import source_files
from mamba_export.engine.profiles import ONE, Profile
from mamba_export.errors import OutputExistsError, UsageError
from tests.engine.conftest import CopyBundle, StandIn
from tests.engine.served import Served, compile_nvinfer, header_folders, need_headers

PROGRAM = Path(__file__).parents[2] / "examples" / "jetson"


def test_a_kit_has_all_a_jetson_needs(copy_bundle: CopyBundle, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    bundle = copy_bundle()
    kit = make_kit(bundle, "orin-nano", tmp_path / "kit")
    folder = Path(kit.path)
    assert (kit.device, kit.arch, kit.single_engine, kit.seq) == ("orin-nano-4gb", "sm_87", True, [1, 128, 512])
    inside = Bundle(folder / "bundle")  # checks every file
    assert inside.target.name == "tensorrt-10.3"  # what TensorRT 10.3 reads, and everything after it
    for name in ("prefill.onnx", "step.onnx"):
        meant = onnx.load(bundle.file(name), load_external_data=False)
        del meant.functions[:]
        assert onnx.load(inside.file(name), load_external_data=False) == meant
    for name, path in source_files().items():
        assert "/tests/" in name or (folder / name).read_bytes() == path.read_bytes()
    for path in PROGRAM.glob("*.cpp"):
        assert (folder / "program" / path.name).read_bytes() == path.read_bytes()
    facts = json.loads((folder / "kit.json").read_text())
    assert facts["plan"]["fits"] and facts["arch"] == "sm_87"
    readme = (folder / "README.md").read_text()
    for text in ("JetPack 6", "JetPack 7", "TensorRT 10.3", "./build.sh", "./generate.sh --prompt", "Orin Nano"):
        assert text in readme
    assert not re.findall(r"@[A-Z]+@", readme + (folder / "build.sh").read_text())
    assert os.access(folder / "build.sh", os.X_OK) and os.access(folder / "generate.sh", os.X_OK)


@pytest.mark.parametrize("device", [name for name, device in DEVICES.items() if device.sm])
def test_scripts_of_every_device_are_sound(device: str, copy_bundle: CopyBundle, tmp_path: Path) -> None:
    kit = make_kit(copy_bundle(), device, tmp_path / "kit")
    for script in ("build.sh", "generate.sh"):
        subprocess.run(["bash", "-n", Path(kit.path) / script], check=True)
    text = (Path(kit.path) / "build.sh").read_text()
    assert f"-DCMAKE_CUDA_ARCHITECTURES={DEVICES[device].sm} " in text
    assert kit.single_engine == (DEVICES[device].memory < 16e9)
    assert text.count("\nbuild_engine ") == (1 if kit.single_engine else 2)


@pytest.mark.parametrize("ragged", [False, True])
def test_shapes_for_trtexec_name_every_input(copy_bundle: CopyBundle, ragged: bool) -> None:
    onnx = pytest.importorskip("onnx")
    bundle = copy_bundle(ragged=ragged)
    for graph, profile in (
        ("prefill.onnx", Profile("prefill", ONE, Range(1, 8, 32))),
        ("step.onnx", Profile("step", ONE, ONE)),
    ):
        options = shape_options(bundle, profile)
        assert [option.split("=")[0] for option in options] == ["--minShapes", "--optShapes", "--maxShapes"]
        wanted = {}
        for value in onnx.load(bundle.file(graph), load_external_data=False).graph.input:
            dims = value.type.tensor_type.shape.dim
            wanted[value.name] = [d.dim_value if d.HasField("dim_value") else -1 for d in dims]
        for option, length in zip(options, profile.seq.to_list(), strict=True):
            pairs = [item.split(":") for item in option.split("=", 1)[1].split(",")]
            shapes = {name: [int(size) for size in shape.split("x")] for name, shape in pairs}
            assert shapes.keys() == wanted.keys()
            for name, shape in shapes.items():
                assert len(shape) == len(wanted[name])
                assert all(size in (known, 1, length) for size, known in zip(shape, wanted[name], strict=True))
            assert shapes["input_ids"] == [1, length]


def test_engines_of_the_device_come_along(copy_bundle: CopyBundle, standin: StandIn, tmp_path: Path) -> None:
    bundle = copy_bundle(dtype="fp32")
    standin.build(bundle, plugin=standin.plugin)  # for sm_87
    kit = make_kit(bundle, "orin-nx", tmp_path / "orin")
    assert kit.engines == ["engines/model-tensorrt-sm87.engine"]
    engines = Path(kit.path) / "engines"
    assert (engines / "model.engine").read_bytes() == bundle.file(kit.engines[0]).read_bytes()
    assert (engines / "libmamba_plugins.so").is_file()
    inside = Bundle(Path(kit.path) / "bundle")
    (row,) = inside.manifest.engines
    assert all(inside.manifest.files[name]["sha256"] == sha256 for name, sha256 in row["source"].items())
    assert make_kit(bundle, "thor", tmp_path / "thor").engines == []
    assert not (tmp_path / "thor" / "engines").exists()


def test_what_it_refuses(copy_bundle: CopyBundle, tmp_path: Path) -> None:
    bundle = copy_bundle()
    with pytest.raises(UsageError, match="no device named 'orin-pico'"):
        make_kit(bundle, "orin-pico", tmp_path / "kit")
    with pytest.raises(UsageError, match="has no NVIDIA GPU"):
        make_kit(bundle, "raspberry-pi-5", tmp_path / "kit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(OutputExistsError, match="is not a kit"):
        make_kit(bundle, "thor", tmp_path / "mine", force=True)
    make_kit(bundle, "thor", tmp_path / "kit")
    with pytest.raises(OutputExistsError, match="exists"):
        make_kit(bundle, "thor", tmp_path / "kit")
    make_kit(bundle, "orin-nano", tmp_path / "kit", force=True)
    assert json.loads((tmp_path / "kit" / "kit.json").read_text())["device"] == "orin-nano-4gb"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "kit", "mine"]  # nothing half-made is left


def test_a_bundle_of_onnx_runtime_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ONNX Runtime's own ops"):
        make_kit(Bundle(tiny_bundle, check=False), "thor", tmp_path / "kit")


TRTEXEC = """#!{python}
import json, sys
if "--help" in sys.argv:
    print("--stronglyTyped --skipInference")
    sys.exit()
options = [word.split("=", 1) for word in sys.argv[1:]]
with open({log!r}, "a") as log:
    log.write(json.dumps(options) + "\\n")
name = dict(o for o in options if len(o) == 2)["--saveEngine"].split("/")[-1]
open("build/" + name, "w").write(open({engines!r} + "/" + name).read())
"""


@pytest.mark.parametrize("device", ["orin-nano", "thor"])
def test_from_build_sh_to_text(
    device: str,
    copy_bundle: CopyBundle,
    tmp_path: Path,
    tiny_checkpoint: Path,
    standin_libraries: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scripts as they are; trtexec is a stand-in, and so are TensorRT's library and CUDA below the program."""
    include = need_headers((header_folders() or [None])[0])
    bundle = copy_bundle(dtype="fp32")
    kit = make_kit(bundle, device, tmp_path / "kit", seq=Range(1, 4, 4))
    served = Served(bundle, tmp_path / "served", kit.single_engine, longest=4, plugin=True)
    root = tmp_path / "tensorrt"
    (root / "lib").mkdir(parents=True)
    (root / "include").symlink_to(include)
    compile_nvinfer(root / "lib", include, standin_libraries)
    trtexec = tmp_path / "trtexec"
    log = tmp_path / "log"
    trtexec.write_text(TRTEXEC.format(python=sys.executable, log=str(log), engines=str(tmp_path / "served")))
    trtexec.chmod(0o755)
    library = standin_libraries / "libmamba_plugins.so"
    settings = {"TENSORRT_ROOT": root, "TRTEXEC": trtexec, "PLUGIN_LIBRARY": library, "WORKSPACE": "256"}
    env = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    env["LDFLAGS"] = "-Wl,--allow-shlib-undefined"  # the stand-in below the program is there when it runs
    done = subprocess.run([Path(kit.path) / "build.sh"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(runs) == (1 if kit.single_engine else 2)
    for run in runs:
        names = [option[0] for option in run]
        assert {"--stronglyTyped", "--skipInference", "--timingCacheFile"} <= set(names)
        assert ["--dynamicPlugins", "engines/libmamba_plugins.so"] in run
        assert ["--memPoolSize", "workspace:256"] in run
        assert names.count("--minShapes") == (2 if kit.single_engine else 1)
    case = json.loads((tiny_checkpoint / "golden_greedy.json").read_text())[0]
    monkeypatch.setenv("LD_PRELOAD", str(standin_libraries / "libcudart.so"))
    text = served.run(Path(kit.path) / "generate.sh", "--prompt", case["prompt"], "-n", "12", "--eos", "-1")
    assert text.returncode == 0, text.stderr
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
    assert text.stdout == reference.decode(case["greedy_ids"][:12]) + "\n"
    monkeypatch.delenv("LD_PRELOAD")
    again = subprocess.run([Path(kit.path) / "build.sh"], env=env, capture_output=True, text=True, check=True)
    assert len(log.read_text().splitlines()) == len(runs), again.stdout  # what is there is kept


def test_the_command_prints_json(copy_bundle: CopyBundle, cli: Callable[..., Any], tmp_path: Path) -> None:
    bundle = copy_bundle()
    done = cli("kit", bundle.path, "--device", "orin-nano", "-o", tmp_path / "kit", "--profile", "1,32,64", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seq"] == [1, 32, 64]
    done = cli("kit", bundle.path, "--device", "orin-nano", "-o", tmp_path / "kit")
    assert done.returncode == 2 and "exists" in done.stderr
    done = cli("kit", bundle.path, "--device", "orin-nano", "-o", tmp_path / "kit", "--force")
    assert "next: copy it to the device, then ./build.sh" in done.stderr
