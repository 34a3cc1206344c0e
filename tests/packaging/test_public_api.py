"""The public surface: what it is, that all of it exists, and that importing the package costs next to nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mamba_export

# What users may rely on. A name may join; one that leaves is a breaking change and belongs into CHANGELOG.md.
PROMISED = {
    "Bundle",
    "Checkpoint",
    "MambaExportError",
    "ModelSpec",
    "OrtRunner",
    "Runner",
    "State",
    "__version__",
    "export_onnx",
    "open_checkpoint",
    "state_table",
}
HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "polygraphy",
    "safetensors",
    "tokenizers",
    "rich",
    "numpy",
)


def test_no_promised_name_has_left() -> None:
    assert set(mamba_export.__all__) >= PROMISED
    assert len(set(mamba_export.__all__)) == len(mamba_export.__all__)


@pytest.mark.parametrize("name", mamba_export.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(mamba_export, name)
    assert name == "__version__" or value.__doc__, f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        mamba_export.no_such_name  # noqa: B018


def test_importing_the_package_imports_nothing_heavy(root: Path) -> None:
    script = f"import sys, mamba_export; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
