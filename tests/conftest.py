"""Fixtures that every test may use: checkpoints, exported bundles, the command line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Workers side by side have a core each; threads of theirs that wait for each other's cores take several times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import mamba_export

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "checkpoints"

# Asserts of modules that tests share explain themselves like those of tests.
pytest.register_assert_rewrite(
    "tests.checkpoint.refusal", "tests.cli.refusal", "tests.models.compare", "tests.ops.oracle"
)

# From a checkout that is not installed the rooms at the root join the package here, as cli.py does it.
if any(importlib.util.find_spec(f"mamba_export.{room}") is None for room in ("kernels", "plugins", "calibration")):
    mamba_export.__path__.append(str(ROOT))

# Machines that run tests are shared and slow: an example may take its time. CI tries the same examples every run.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

MakeBundle = Callable[..., Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The small trained Mamba-1 checkpoint of the repository, with its goldens."""
    return ROOT / "examples" / "mamba1-tiny"


@pytest.fixture(scope="session")
def shared_checkpoint() -> Callable[[str], Path]:
    """``shared_checkpoint(name)``: a trained checkpoint that lies beside the repository; skips when it does not."""

    def find(name: str) -> Path:
        folder = SHARED / name
        if not folder.is_dir():
            pytest.skip(f"NOT TESTED: no trained checkpoint at ../shared/checkpoints/{name}")
        return folder

    return find


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> MakeBundle:
    """``make_bundle(target="ort", logits="all", …)``: a bundle of mamba1-tiny, exported once a test run.

    Takes ``ckpt`` and the options of :func:`mamba_export.export_onnx`. The bundle is shared: don't write to it.
    """
    from filelock import FileLock

    from mamba_export import export_onnx

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "bundles"
    shared.mkdir(exist_ok=True)

    def make(ckpt: Path = tiny_checkpoint, **options: Any) -> Path:
        options = {"target": "ort", "logits": "all", "verify": False, **options}
        name = "-".join([ckpt.name, *(f"{key}={options[key]}" for key in sorted(options))])
        with FileLock(shared / f"{name}.lock"):  # workers of pytest-xdist share what one of them made
            if not (shared / name).is_dir():
                export_onnx(ckpt, shared / name, **options)
        return shared / name

    return make


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: MakeBundle) -> Path:
    """mamba1-tiny for stock ONNX Runtime, float32, logits of all positions. Don't write to it."""
    return make_bundle()


@pytest.fixture(scope="session")
def cli() -> Cli:
    """``cli("inspect", path, …)``: run the command line in a process of its own, as a person would."""

    def run(*args: str | Path, cwd: Path = ROOT, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, args)]
        env = {**os.environ, "NO_COLOR": "1", **kwargs.pop("env", {})}
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **kwargs
        )

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the engines that this test run has built; tests tell of them with ``record_property("engine", …)``."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    facts = [
        value
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == "engine"
    ]
    if facts:
        terminalreporter.section("engines built")
        for fact in sorted(map(str, facts)):
            terminalreporter.write_line(fact)
