"""Calibration and quantization: statistics of activations, recipes, and the numbers of a quantized model.

``mamba_export.calibrate`` and ``mamba_export.quantize`` are the public functions; this package holds what they use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba_export.calibration.recipes import Recipe, load_recipe
    from mamba_export.calibration.simulation import simulate
    from mamba_export.calibration.statistics import Statistics, load_statistics

_HOMES = {
    "Recipe": "recipes",
    "Statistics": "statistics",
    "load_recipe": "recipes",
    "load_statistics": "statistics",
    "simulate": "simulation",
}

__all__ = ["Recipe", "Statistics", "load_recipe", "load_statistics", "simulate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
