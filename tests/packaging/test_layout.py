"""setup.py finds every package, and everything installs under mamba_export."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


@pytest.fixture
def packages(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(root)
    found: dict[str, str] = runpy.run_path("setup.py", run_name="setup")["packages"]()
    return found


def test_every_package_of_every_room_is_installed(root: Path, packages: dict[str, str]) -> None:
    rooms = [root / room for room in ("mamba_export", "kernels", "plugins", "calibration")]
    folders = {p.parent.relative_to(root).as_posix() for room in rooms for p in room.rglob("__init__.py")}
    assert set(packages.values()) == folders | {"examples/jetson"}


def test_modules_lie_in_packages(root: Path, packages: dict[str, str]) -> None:
    for room in ("mamba_export", "kernels", "plugins", "calibration"):
        for module in (root / room).rglob("*.py"):
            folder = module.parent.relative_to(root).as_posix()
            assert folder in packages.values(), f"{folder} has Python files but no __init__.py: they won't be installed"


def test_all_names_are_under_mamba_export(packages: dict[str, str]) -> None:
    assert all(name.split(".")[0] == "mamba_export" for name in packages)
    assert packages["mamba_export.kernels"] == "kernels"
