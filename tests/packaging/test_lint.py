"""The checks of `make lint`, so that one command and one closing line tell whether a change is good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy", "mamba_export", "kernels", "plugins", "calibration"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_lint(name: str, root: Path) -> None:
    module, *args = [
        arg for arg in CHECKS[name] if arg not in ("kernels", "plugins", "calibration") or (root / arg).is_dir()
    ]
    done = subprocess.run([sys.executable, "-m", module, *args], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
