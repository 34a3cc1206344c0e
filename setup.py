"""Where the packages lie: the rooms at the root (kernels/, plugins/, calibration/) install under mamba_export.

A folder with an __init__.py is a package, here and in every room; nothing needs to be listed. C++ and CUDA sources
travel along as data, so that `mamba-export plugin build` works from an installed wheel. Everything else about the
project is in pyproject.toml.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = {"mamba_export": "mamba_export"}
ROOMS |= {f"mamba_export.{r}": r for r in ("kernels", "plugins", "calibration") if Path(r, "__init__.py").is_file()}
SOURCES = (
    "*.cu",
    "*.cuh",
    "*.sh",
    "*.inl",
    "*.h",
    "*.hpp",
    "*.cpp",
    "*.cmake",
    "*.cmake.in",
    "*.map",
    "CMakeLists.txt",
)
PROGRAM = {"mamba_export.jetson": "examples/jetson"}  # C++ that `mamba-export kit` packs
DATA = ("*.yaml", "*.json", "*.md", "py.typed")


def packages() -> dict[str, str]:
    """Package name → folder."""
    found = dict(ROOMS)
    for prefix, room in ROOMS.items():
        found.update({f"{prefix}.{name}": f"{room}/{name.replace('.', '/')}" for name in find_packages(room)})
    return found | {name: folder for name, folder in PROGRAM.items() if Path(folder).is_dir()}


if __name__ == "__main__":
    setup(
        packages=sorted(packages()),
        package_dir=packages(),
        package_data={"": [f"**/{pattern}" for pattern in (*SOURCES, *DATA)]},
        exclude_package_data={"": ["build/**", "**/build/**"]},
    )
