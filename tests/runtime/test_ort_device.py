"""A GPU that is asked for and not there is an error, never a silent run on the CPU."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from mamba_export import Bundle
from mamba_export.errors import EnvironmentProblem
from mamba_export.runtime import OrtRunner


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="there is CUDA here")
def test_cuda_that_does_not_start(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match="has no CUDAExecutionProvider"):
        OrtRunner(Bundle(tiny_bundle, check=False), device="cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    runner = OrtRunner(Bundle(tiny_bundle, check=False), device="cuda")
    for session in ("prefill_session", "step_session"):
        with pytest.raises(EnvironmentProblem, match="could not start its CUDAExecutionProvider"):
            getattr(runner, session)
