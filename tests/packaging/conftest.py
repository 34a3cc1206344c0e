"""An empty virtual environment with nothing but `pip install .`, made once for the tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def source_tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the checkout and finds nothing stale there."""
    tree = tmp_path_factory.mktemp("source") / "mamba-export"
    skip = shutil.ignore_patterns(
        ".*",
        "build",
        "dist",
        "out",
        "mamba1-tiny",
        "tests",
        "docs",
        "benchmarks",
        "*.egg-info",
        "__pycache__",
        "*.so",
        "*.o",
    )
    shutil.copytree(root, tree, ignore=skip)
    return tree


@pytest.fixture(scope="session")
def bare(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a virtual environment after `pip install .`: no extras, no torch, no onnx."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, with_pip=True)
    pip(home / "bin", "install", str(source_tree))
    return home / "bin"


def pip(bin_folder: Path, *args: str) -> None:
    command = [str(bin_folder / "python"), "-m", "pip", "--disable-pip-version-check", "-q", *args]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def run_bare(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run_bare("mamba-export", "--help")``: run a program of the bare environment, away from the checkout."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    env |= {"NO_COLOR": "1", "PATH": f"{bare}{os.pathsep}{env['PATH']}"}

    def run(program: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(bare / program), *map(str, args)]
        return subprocess.run(
            command, cwd=elsewhere, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )

    return run
