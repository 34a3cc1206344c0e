"""mamba-export: trained Mamba checkpoints to verified ONNX bundles, engines and text.

The public surface is ``__all__``; everything else may change. Names are imported on first use, so that
``import mamba_export`` needs nothing but the base install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mamba_export.version import __version__

if TYPE_CHECKING:
    from mamba_export.bundle import Bundle
    from mamba_export.calibration.collect import calibrate
    from mamba_export.checkpoint import Checkpoint, open_checkpoint
    from mamba_export.diagnosis import doctor
    from mamba_export.engine import build_engines, build_plugin, make_kit
    from mamba_export.errors import MambaExportError
    from mamba_export.export import export_onnx
    from mamba_export.inspection import inspect
    from mamba_export.quantization import quantize
    from mamba_export.runtime import OrtRunner, Runner
    from mamba_export.runtime.generate import generate, stream
    from mamba_export.runtime.sampling import Sampling
    from mamba_export.runtime.trt import TrtRunner
    from mamba_export.spec import ModelSpec
    from mamba_export.states import State, state_table
    from mamba_export.verification import verify
    from mamba_export.verification.perplexity import perplexity
    from mamba_export.verification.quality import quality

_HOMES = {
    "Bundle": "mamba_export.bundle",
    "Checkpoint": "mamba_export.checkpoint",
    "MambaExportError": "mamba_export.errors",
    "ModelSpec": "mamba_export.spec",
    "OrtRunner": "mamba_export.runtime",
    "Runner": "mamba_export.runtime",
    "Sampling": "mamba_export.runtime.sampling",
    "State": "mamba_export.states",
    "TrtRunner": "mamba_export.runtime.trt",
    "build_engines": "mamba_export.engine",
    "build_plugin": "mamba_export.engine",
    "calibrate": "mamba_export.calibration.collect",
    "doctor": "mamba_export.diagnosis",
    "export_onnx": "mamba_export.export",
    "generate": "mamba_export.runtime.generate",
    "inspect": "mamba_export.inspection",
    "make_kit": "mamba_export.engine",
    "open_checkpoint": "mamba_export.checkpoint",
    "perplexity": "mamba_export.verification.perplexity",
    "quality": "mamba_export.verification.quality",
    "quantize": "mamba_export.quantization",
    "state_table": "mamba_export.states",
    "stream": "mamba_export.runtime.generate",
    "verify": "mamba_export.verification",
}

__all__ = [
    "Bundle",
    "Checkpoint",
    "MambaExportError",
    "ModelSpec",
    "OrtRunner",
    "Runner",
    "Sampling",
    "State",
    "TrtRunner",
    "__version__",
    "build_engines",
    "build_plugin",
    "calibrate",
    "doctor",
    "export_onnx",
    "generate",
    "inspect",
    "make_kit",
    "open_checkpoint",
    "perplexity",
    "quality",
    "quantize",
    "state_table",
    "stream",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mamba_export' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
