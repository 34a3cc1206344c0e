"""`pip install .` into an empty environment: what a device gets before any extra is chosen."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mamba_export.commands import COMMANDS
from mamba_export.version import __version__
from tests.packaging.conftest import Run, pip

pytestmark = pytest.mark.slow
HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "transformers", "matplotlib", "pandas", "scipy")


def test_installs_the_version_of_the_package(run_bare: Run) -> None:
    done = run_bare("mamba-export", "--version")
    assert (done.returncode, done.stdout) == (0, f"mamba-export, version {__version__}\n")


def test_brings_no_heavy_package(run_bare: Run) -> None:
    listing = run_bare("python", "-m", "pip", "list", "--format", "json", "--disable-pip-version-check")
    installed = {row["name"].lower() for row in json.loads(listing.stdout)}
    assert "mamba-export" in installed
    assert installed.isdisjoint(HEAVY)


def test_help_takes_less_than_half_a_second(run_bare: Run) -> None:
    run_bare("mamba-export", "--help")  # compiles the modules, as the first run after an install does
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        done = run_bare("mamba-export", "--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert statistics.median(seconds) < 0.5, seconds


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_help(run_bare: Run, name: str) -> None:
    done = run_bare("mamba-export", name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: mamba-export {name}" in done.stdout


def test_a_missing_extra_is_named(run_bare: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    commands = {
        "export": ("onnx", "--ckpt", tiny_checkpoint, "-o", tmp_path / "bundle"),
        "cpu": ("generate", tiny_bundle, "--prompt", "def ", "-n", "4"),
    }
    for extra, command in commands.items():
        done = run_bare("mamba-export", *command)
        assert done.returncode == 5, (command, done.stderr)
        assert done.stderr.startswith("error: "), done.stderr
        assert f'hint: pip install "mamba-export[{extra}]"' in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_verify_names_the_extra_it_lacks(run_bare: Run, tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    done = run_bare("mamba-export", "verify", tiny_bundle, "--ckpt", tiny_checkpoint)
    assert done.returncode == 5, done.stderr
    assert 'hint: pip install "mamba-export[' in done.stderr


def test_a_bundle_is_inspected_and_its_checksums_are_checked(run_bare: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run_bare("mamba-export", "inspect", tiny_bundle)
    assert done.returncode == 0, done.stderr
    assert "mamba1" in done.stdout + done.stderr

    damaged = shutil.copytree(tiny_bundle, tmp_path / "damaged")
    weights = bytearray((damaged / "weights.bin").read_bytes())
    weights[len(weights) // 2] ^= 1
    (damaged / "weights.bin").write_bytes(weights)
    done = run_bare("python", "-c", f"import mamba_export; mamba_export.Bundle({str(damaged)!r})")
    assert "weights.bin is damaged" in done.stderr


def test_the_rooms_at_the_root_install_with_their_sources(run_bare: Run) -> None:
    script = (
        "from importlib.resources import files\n"
        "cuda = files('mamba_export.kernels') / 'cuda'\n"
        "print((cuda / 'CMakeLists.txt').is_file(), (cuda / 'include' / 'mamba' / 'common.h').is_file())\n"
    )
    assert run_bare("python", "-c", script).stdout == "True True\n"


def test_a_kit_is_made_without_extras(run_bare: Run, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_bundle(target="tensorrt", logits="last", dtype="fp16")
    done = run_bare("mamba-export", "kit", bundle, "--device", "orin-nano", "-o", tmp_path / "kit")
    assert done.returncode == 0, done.stderr
    for name in (
        "program/main.cpp",
        "program/unicode.inl",
        "plugins/tensorrt/CMakeLists.txt",
        "kernels/cuda/common.cu",
    ):
        assert (tmp_path / "kit" / name).is_file(), name


def test_nothing_lands_beside_the_package(run_bare: Run) -> None:
    script = "from importlib.metadata import files; print(sorted({f.parts[0] for f in files('mamba-export')}))"
    tops = run_bare("python", "-c", script).stdout
    assert tops.replace("..", "") != "", tops
    for room in ("kernels", "plugins", "calibration", "tests"):
        assert f"'{room}'" not in tops


def test_an_editable_install_finds_every_room(bare: Path, run_bare: Run, source_tree: Path) -> None:
    pip(bare, "install", "--no-deps", "--editable", str(source_tree))
    try:
        script = "import mamba_export, mamba_export.kernels as k; print(mamba_export.__file__); print(k.__file__)"
        done = run_bare("python", "-c", script)
        expected = [str(source_tree / "mamba_export" / "__init__.py"), str(source_tree / "kernels" / "__init__.py")]
        assert done.stdout.splitlines() == expected, done.stderr
        assert run_bare("mamba-export", "--help").returncode == 0
    finally:
        pip(bare, "install", "--no-deps", "--force-reinstall", str(source_tree))
