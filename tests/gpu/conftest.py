"""GPU tests: every test here needs an NVIDIA GPU and the kernel library, and says loudly which one is missing."""

from __future__ import annotations

import sys

import pytest


def _missing() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible"
    from kernels.library import available

    if not available():
        return "libmamba_kernels.so is not built (cmake -S kernels/cuda -B build && cmake --build build)"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if "tests/gpu/" in item.path.as_posix()]
    if not here:
        return
    for item in here:
        item.add_marker(pytest.mark.gpu)
    reason = _missing()
    if reason:
        print(f"\nGPU TESTS SKIPPED ({len(here)}): {reason}", file=sys.stderr)
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))
